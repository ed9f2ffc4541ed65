"""LLaDA's sampler, spelled out in NumPy, chooses the same tokens as ``diffusion.compat.generate`` at temperature 0."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuits import ArgumentError
from diffusion import compat
from diffusion.testing import chi_square, decoder_law, reference, worlds

V, MASK, EOS, EOT = 9, 8, 7, 6


class RandomModel:
    """Logits of every position are a random linear function of all tokens; the mask is never the best token."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=V)

    def __init__(self, seed, length, mask_logit=-30.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(length, V, length, V, generator=generator)
        self.mask_logit = mask_logit
        self.calls = []

    def __call__(self, input_ids, attention_mask=None):
        self.calls.append((input_ids.clone(), attention_mask))
        one_hot = torch.nn.functional.one_hot(input_ids, V).float()
        if attention_mask is not None:
            one_hot = one_hot * attention_mask.unsqueeze(-1)
        logits = torch.einsum("blv,lvmw->bmw", one_hot, self.table)
        logits[..., MASK] += self.mask_logit
        return SimpleNamespace(logits=logits)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def llada(model, prompt, attention, steps, gen_length, block_length, cfg_scale=0.0, no_eos=False, ends_last=False):
    """The published algorithm: per block, base counts with the remainder in the first steps, most confident first."""
    x = np.concatenate([prompt, np.full((len(prompt), gen_length), MASK)], 1)
    start = prompt.shape[1]
    num_blocks = gen_length // block_length
    steps_of_block = steps // num_blocks
    if attention is not None:
        attention = np.concatenate([attention, np.ones((len(prompt), gen_length), int)], 1)

    def ask(tokens):
        mask = None if attention is None else torch.from_numpy(attention)
        return model(torch.from_numpy(tokens), attention_mask=mask).logits.double().numpy()

    for block in range(num_blocks):
        end = start + (block + 1) * block_length
        base, remainder = divmod(block_length, steps_of_block)
        for step in range(steps_of_block):
            logits = ask(x)
            if cfg_scale:
                without = x.copy()
                without[:, :start] = MASK
                u = ask(without)
                logits = u + (cfg_scale + 1) * (logits - u)
            if no_eos:
                logits[..., EOS] = -np.inf
            best = logits.argmax(-1)
            if ends_last:
                logits[..., [EOS, EOT]] = -np.inf
            confidence = np.take_along_axis(softmax(logits), best[..., None], -1)[..., 0]
            confidence = np.where(x == MASK, confidence, -np.inf)
            confidence[:, end:] = -np.inf
            for row in range(len(x)):
                chosen = np.argsort(-confidence[row], kind="stable")[: base + (step < remainder)]
                chosen = chosen[confidence[row, chosen] > -np.inf]
                x[row, chosen] = best[row, chosen]
    return x


def prompts(seed, length, batch=3):
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("steps", "gen_length", "block_length"), [(8, 8, 8), (4, 8, 4), (6, 12, 6), (10, 12, 6), (4, 4, 2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tokens_are_those_of_the_published_algorithm(steps, gen_length, block_length, seed):
    model, prompt = RandomModel(seed, 3 + gen_length), prompts(seed, 3)
    expected = llada(model, prompt.numpy(), None, steps, gen_length, block_length)
    found = compat.generate(model, prompt, None, steps, gen_length, block_length, mask_id=MASK)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("cfg_scale", [0.5, 2.0])
@pytest.mark.parametrize("padded", [False, True])
def test_guidance_and_padding(cfg_scale, padded):
    model, prompt = RandomModel(3, 12), prompts(3, 4)
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]) if padded else None
    numbers = None if attention is None else attention.numpy()
    expected = llada(model, prompt.numpy(), numbers, 4, 8, 4, cfg_scale=cfg_scale)
    found = compat.generate(model, prompt, attention, 4, 8, 4, cfg_scale=cfg_scale, mask_id=MASK)
    assert found.tolist() == expected.tolist()
    plain = compat.generate(model, prompt, attention, 4, 8, 4, mask_id=MASK)
    assert plain.tolist() == llada(model, prompt.numpy(), numbers, 4, 8, 4).tolist() != found.tolist()


@pytest.mark.parametrize(("no_eos", "ends_last"), [(True, False), (False, True), (True, True)])
def test_end_of_text_options(no_eos, ends_last):
    ids = {"eos_id": EOS, "eot_id": EOT}
    for seed in range(4):
        model, prompt = RandomModel(seed, 10), prompts(seed, 2)
        expected = llada(model, prompt.numpy(), None, 8, 8, 4, no_eos=no_eos, ends_last=ends_last)
        options = {"logits_eos_inf": no_eos, "confidence_eos_eot_inf": ends_last}
        found = compat.generate(model, prompt, None, 8, 8, 4, mask_id=MASK, **options, **ids)
        assert found.tolist() == expected.tolist()
        assert not (no_eos and bool((found[:, 2:] == EOS).any()))


def test_the_mask_has_its_share_of_the_probability_and_is_not_written():
    """A mask of the same logit as the others changes confidences; where it is the best token the next best is taken."""
    model, prompt = RandomModel(5, 8, mask_logit=1.0), prompts(5, 2)
    found = compat.generate(model, prompt, None, 6, 6, 6, mask_id=MASK)
    assert not bool((found == MASK).any())


def test_the_model_is_asked_as_often_as_there_are_steps():
    model = RandomModel(0, 8)
    compat.generate(model, prompts(0, 2), None, 3, 6, 6, mask_id=MASK)
    assert len(model.calls) == 3
    assert all(mask is None for _, mask in model.calls)


def test_a_denoiser_brings_its_own_ids():
    world = worlds.cities()
    torch.manual_seed(0)
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    texts = world.decode(compat.generate(world.denoiser(), nothing, None, 2, 2, 2))
    assert set(texts) <= set(world.texts)


def test_draws_follow_the_law_of_low_confidence():
    world = worlds.random(3, length=3, concentration=1.0)
    torch.manual_seed(0)
    nothing = torch.zeros(4000, 0, dtype=torch.int64)
    samples = compat.generate(world.denoiser(), nothing, None, 3, 3, 3, temperature=1.0)
    rule = reference.Rule(strategy="low_confidence", num_steps=3)
    assert chi_square(samples, decoder_law(reference.independent(world.denoiser(), rule), world.blank)) > 1e-4
    torch.manual_seed(0)
    again = compat.generate(world.denoiser(), nothing, None, 3, 3, 3, temperature=1.0)
    assert torch.equal(samples, again)
    torch.manual_seed(0)
    uniform = compat.generate(world.denoiser(), nothing, None, 3, 3, 3, temperature=1.0, remasking="random")
    assert chi_square(uniform, world) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, "prompt: expected int64"),
        ({"prompt": torch.full((1, 2), MASK)}, "prompt: expected no mask"),
        ({"mask_id": 126336}, "mask_id: expected an id from 0 to 8"),
        ({"remasking": "entropy"}, "remasking: expected"),
        ({"cfg_scale": -1.0}, "cfg_scale: expected"),
        ({"logits_eos_inf": True}, "eos_id: expected an id from 0 to 8, got 126081"),
        ({"confidence_eos_eot_inf": True, "eos_id": 1}, "eot_id: expected an id"),
        ({"eos": 1}, "eos: no such option"),
        ({"steps": 0}, "num_steps"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"prompt": prompts(0, 2, 1), "steps": 2, "gen_length": 2, "block_length": 2, "mask_id": MASK}
    with pytest.raises(ArgumentError, match=message):
        compat.generate(RandomModel(0, 4), **{**arguments, **changes})


def entropy_by_hand(denoiser, prompt, length, steps):
    """Dream's ``entropy`` at temperature 0 in equal shares: the positions of the least entropy first."""
    mask = denoiser.spec.mask_id
    x = np.concatenate([prompt, np.full((len(prompt), length), mask)], 1)
    base, remainder = divmod(length, steps)
    for step in range(steps):
        logits = denoiser.logits(torch.from_numpy(x)).double().numpy()
        logits[..., list(denoiser.spec.forbidden_ids)] = -np.inf
        p = softmax(logits)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
        entropy = np.where(x == mask, entropy, np.inf)
        for row in range(len(x)):
            chosen = np.argsort(entropy[row], kind="stable")[: base + (step < remainder)]
            x[row, chosen] = logits[row, chosen].argmax(-1)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_dreams_function_fills_the_whole_text_by_entropy(steps):
    denoiser = worlds.random(3, length=4, concentration=1.0).denoiser()
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    out = compat.diffusion_generate(denoiser, nothing, max_new_tokens=4, steps=steps, alg="entropy", alg_temp=0.0)
    assert out.sequences.tolist() == entropy_by_hand(denoiser, nothing.numpy(), 4, steps).tolist()
    assert out.num_calls == steps


def test_of_one_candidate_the_draw_is_the_best_token():
    denoiser, nothing = worlds.random(3, length=4, concentration=1.0).denoiser(), torch.zeros(1, 0, dtype=torch.int64)
    options = {"max_new_tokens": 4, "steps": 1, "alg": "entropy"}
    greedy = compat.diffusion_generate(denoiser, nothing, **options).sequences
    drawn = compat.diffusion_generate(denoiser, nothing, temperature=1.0, top_k=1, **options).sequences
    assert torch.equal(drawn, greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alg_temp": 0.5}, "alg_temp: expected 0 or None"),
        ({"alg": "best"}, "strategy: expected one of"),
        ({"eps": 1e-3}, "eps: no such option"),
        ({"steps": 0}, "num_steps"),
    ],
)
def test_options_of_dream_that_are_not_here_are_named(options, message):
    denoiser = worlds.random(3, length=4, concentration=1.0).denoiser()
    with pytest.raises(ArgumentError, match=message):
        compat.diffusion_generate(denoiser, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=4, **options)
