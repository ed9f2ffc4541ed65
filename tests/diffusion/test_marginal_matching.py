"""Factors under which the product's own marginals become what the denoiser predicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from contextual_cases import DOUBLE, B, H, piecewise, random_block, random_prediction, small_denoiser, told_windows
from hmm_cases import TEXTS, L, V, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from diffusion import (
    CircuitTraining,
    CoupledDistribution,
    CoupledHead,
    HeadMixture,
    LatentPotentials,
    LowRankTransitions,
    MarginalMatching,
    NoiseCalibration,
    TransitionGates,
    cache_logits,
    fit_coupled,
    generate,
)
from diffusion.errors import ArgumentError, ImpossibleEvidenceError
from diffusion.training.circuit import coupled_loss

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
ONE_HOT = np.eye(V)[np.array(TEXTS)]  # (texts, L, V)


@pytest.fixture
def pc():
    return ct.compile(ct.structures.hmm(L, 3, V), dtype=DOUBLE, seed=0)


def moved(generator, num_steps=3, **options):
    """A matching after some training, so to say."""
    made = MarginalMatching(num_steps, 3, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=DOUBLE, generator=generator))
    return made


def enumerated(pc, log_q, tokens, masked, scale, discount):
    """The law of every block over all texts after the steps of the formula, (B, texts), by enumeration."""
    with torch.no_grad():
        prior = ct.queries.log_likelihood(pc, torch.tensor(TEXTS)).exp().numpy()
    laws = []
    for b in range(B):
        fits = np.all((np.array(TEXTS) == tokens[b].numpy()) | masked[b].numpy(), 1)
        here = masked[b].numpy()
        log_f = np.zeros((L, V))
        for step in range(scale.shape[1] + 1):
            law = prior * fits * np.exp((ONE_HOT[:, here] * log_f[here]).sum((1, 2)))
            law /= law.sum()
            if step < scale.shape[1]:
                log_m = np.log(np.einsum("x,xlv->lv", law, ONE_HOT)[here])
                log_f[here] += scale[b, step] * log_q[b].numpy()[here] - discount[b, step] * log_m
        laws.append(law)
    return np.stack(laws)


def law_of(dist):
    return dist.log_prob(texts(B)).exp().detach().numpy().T


def test_it_takes_the_steps_of_the_formula(pc, said, block, generator):
    tokens, masked = block
    made = moved(generator)
    ratio = masked.double().mean(1).numpy()
    # the scale is interpolated as its logarithm
    scale = np.exp(piecewise(made.log_scale, ratio))
    law = enumerated(pc, said.log_q, tokens, masked, scale, piecewise(made.discount, ratio))
    dist = CoupledHead(pc, conditioners=[made])(said, tokens, masked)
    np.testing.assert_allclose(law_of(dist), law, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(dist.marginal_probs.detach(), np.einsum("bx,xlv->blv", law, ONE_HOT), atol=1e-10)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_with_many_steps_the_marginals_are_the_prediction(seed):
    generator = torch.Generator().manual_seed(seed)
    pc = ct.compile(ct.structures.hmm(L, 3, V, homogeneous=False), dtype=DOUBLE, seed=seed)
    said, (tokens, masked) = random_prediction(generator), random_block(generator)
    with torch.no_grad():
        dist = CoupledHead(pc, conditioners=[MarginalMatching(150, step=0.5).double()])(said, tokens, masked)
    torch.testing.assert_close(dist.marginal_probs[masked], said.log_q.exp()[masked], rtol=1e-3, atol=1e-4)


def test_it_is_the_nearest_to_the_circuit_with_these_marginals(pc, said):
    """Its relative entropy to the circuit is less than that of the product of the marginals."""
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    with torch.no_grad():
        prior = ct.queries.log_likelihood(pc, torch.tensor(TEXTS)).exp().numpy()
        found = law_of(CoupledHead(pc, conditioners=[MarginalMatching(100).double()])(said, tokens, masked))
    independent = np.exp(np.einsum("xlv,blv->bx", ONE_HOT, said.log_q.numpy()))
    to_circuit = [(law * np.log(law / prior)).sum(1) for law in (found, independent)]
    assert (to_circuit[0] < to_circuit[1] - 1e-4).all()


def test_one_step_without_discount_is_the_plain_product(pc, said, block):
    made = MarginalMatching(1, step=1.0).double()
    with torch.no_grad():
        made.discount.zero_()
    found, plain = (CoupledHead(pc, conditioners=one)(said, *block) for one in ([made], []))
    torch.testing.assert_close(found.log_prob(texts(B)), plain.log_prob(texts(B)), **CLOSE)


def test_an_independent_circuit_becomes_the_prediction(said, block):
    pc = ct.compile(ct.structures.fully_factorized(L, V), dtype=DOUBLE, seed=1)
    dist = CoupledHead(pc, conditioners=[MarginalMatching(1, step=1.0).double()])(said, *block)
    torch.testing.assert_close(dist.marginal_probs[block[1]], said.log_q.exp()[block[1]], **CLOSE)


def test_lists_and_masked_positions_alone_give_the_same(pc, said, block, generator):
    tokens, masked = block
    head = CoupledHead(pc, conditioners=[moved(generator)])
    whole = law_of(head(said, tokens, masked))
    values = said.log_q.argsort(2)
    shuffled = replace(said, log_q=said.log_q.gather(2, values), values=values)
    np.testing.assert_allclose(law_of(head(shuffled, tokens, masked)), whole, rtol=1e-9, atol=1e-14)
    truth = torch.where(masked, torch.randint(V, (B, L), generator=generator), tokens)
    np.testing.assert_allclose(
        head(said.only(masked), tokens, masked).log_prob(truth).detach(),
        head(said, tokens, masked).log_prob(truth).detach(),
        rtol=1e-9,
    )


def test_a_block_does_not_depend_on_its_batch_mates(pc, said, block, generator):
    head = CoupledHead(pc, conditioners=[moved(generator)])
    tokens, masked = block
    together = head(said, tokens, masked).log_prob(texts(B))
    for b in range(B):
        alone = head(said.rows(slice(b, b + 1)), tokens[b : b + 1], masked[b : b + 1]).log_prob(texts(1))
        torch.testing.assert_close(alone[:, 0], together[:, b], **CLOSE)


def test_absent_positions_are_summed_out(pc, said, block, generator):
    tokens, masked = block
    absent = torch.tensor([[False, False, True]] * B)
    head, shorter = CoupledHead(pc, conditioners=[moved(generator)]), said.log_q.clone()
    shorter[absent] = torch.randn(B, V, dtype=DOUBLE, generator=generator)
    one = head.distribution(said, tokens, masked, absent=absent).marginal_probs
    other = head.distribution(replace(said, log_q=shorter), tokens, masked, absent=absent).marginal_probs
    torch.testing.assert_close(one[~absent], other[~absent], **CLOSE)


def test_forbidden_tokens_stay_so(pc, said, generator):
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    log_q = said.log_q.clone()
    log_q[:, :, 1] = -torch.inf
    log_q[0] = torch.where(torch.arange(V) == 2, 0.0, -torch.inf).double()
    made = moved(generator)
    dist = CoupledHead(pc, conditioners=[made])(replace(said, log_q=log_q).normalised(), tokens, masked)
    assert bool((dist.marginal_probs[:, :, 1] == 0).all())
    torch.testing.assert_close(dist.marginal_probs[0, :, 2], torch.ones(L, dtype=DOUBLE))
    dist.log_prob(torch.full((B, L), 2)).sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in made.parameters())


def test_a_token_that_the_circuit_rules_out_stays_impossible(said):
    emission = torch.tensor([[0.0, *[1 / (V - 1)] * (V - 1)]], dtype=DOUBLE)
    pc = ct.compile(ct.structures.hmm(L, 1, V, emission=emission), dtype=DOUBLE)
    tokens, masked = torch.ones(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    head = CoupledHead(pc, conditioners=[MarginalMatching().double()])
    dist = head(said, tokens, masked)
    assert bool((dist.marginal_probs[..., 0] == 0).all())
    masked[:, 0] = False
    with pytest.raises(ImpossibleEvidenceError, match="circuit and denoiser rule out"):
        head(said, tokens * 0, masked).log_prob(tokens * 0)


CONTEXTUAL = {
    "static": lambda pc: [],
    "potentials": lambda pc: [LatentPotentials.for_hmm(pc, H).double()],
    "gates": lambda pc: [TransitionGates.for_hmm(pc, H).double()],
    "low rank": lambda pc: [LowRankTransitions.for_hmm(pc, H).double(), LatentPotentials.for_hmm(pc, H).double()],
}


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("name", CONTEXTUAL)
def test_gradients_go_through_all_steps(name, is_listed, pc, said, block, generator):
    tokens, masked = block
    said = replace(said, values=torch.arange(V).expand(B, L, V)) if is_listed else said
    contextual, made = CONTEXTUAL[name](pc), moved(generator, 2)
    with torch.no_grad():
        for parameter in (one for conditioner in contextual for one in conditioner.parameters()):
            parameter.add_(torch.rand(parameter.shape, dtype=DOUBLE, generator=generator))
    head = CoupledHead(pc, conditioners=[*contextual, made])
    truth = torch.where(masked, torch.randint(V, (B, L), generator=generator), tokens)
    log_q = said.log_q.clone().requires_grad_()

    def loss():
        return -head(replace(said, log_q=log_q), tokens, masked).log_prob(truth).sum()

    tensors = [log_q, *head.parameters()]
    found = torch.autograd.grad(loss(), tensors)
    with torch.no_grad():
        for tensor, gradient in zip(tensors, found, strict=True):
            flat, grad = tensor.view(-1), gradient.reshape(-1)
            for index in range(min(5, len(flat))):
                values = []
                for change in (1e-5, -2e-5):
                    flat[index] += change
                    values.append(float(loss()))
                flat[index] += 1e-5
                assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(grad[index]), rel=1e-5, abs=1e-7)


def test_potentials_and_gates_before_it_hold_in_its_marginals(pc, said, block, generator):
    """With many steps the marginals are the prediction, whatever the others say; the law is another one."""
    made = [LatentPotentials.for_hmm(pc, H).double(), TransitionGates.for_hmm(pc, H).double()]
    with torch.no_grad():
        for parameter in (one for conditioner in made for one in conditioner.parameters()):
            parameter.add_(torch.randn(parameter.shape, dtype=DOUBLE, generator=generator))
        static, contextual = (
            CoupledHead(pc, conditioners=[*one, MarginalMatching(150, step=0.5).double()])(said, *block)
            for one in ([], made)
        )
    masked = block[1]
    torch.testing.assert_close(contextual.marginal_probs[masked], said.log_q.exp()[masked], rtol=1e-3, atol=1e-4)
    assert float((static.log_prob(texts(B)) - contextual.log_prob(texts(B))).nan_to_num(0.0).abs().max()) > 1e-2


def test_it_works_where_nothing_is_recorded(pc, said, block, generator):
    head = CoupledHead(pc, conditioners=[LatentPotentials.for_hmm(pc, H).double(), moved(generator)])
    expected = head(said, *block).marginal_probs
    with torch.inference_mode():
        torch.testing.assert_close(head(said, *block).marginal_probs, expected.detach(), **CLOSE)
        assert head(said, *block).draw(1.0).shape == (B, L)
    found = head.requires_grad_(False)(said, *block).marginal_probs
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), **CLOSE)


def test_whole_texts_are_decoded_in_inference_mode():
    denoiser, pc = small_denoiser(), ct.compile(ct.structures.hmm(4, 3, 9), seed=0)
    for made in ([], [MarginalMatching(2)], [TransitionGates.for_hmm(pc, 16), MarginalMatching(2)]):
        head = CoupledHead(pc, conditioners=made)
        with torch.inference_mode():
            out = generate(denoiser, torch.zeros(2, 4, dtype=torch.int64), gen_length=4, num_steps=2, head=head)
        assert out.tokens.shape == (2, 8)


def test_a_head_has_one(pc):
    with pytest.raises(ArgumentError, match="conditioners: expected at most one"):
        CoupledHead(pc, conditioners=[MarginalMatching(), MarginalMatching()])


def test_training_a_circuit_too_costs_two_questions_a_step(pc, said, block, monkeypatch):
    """Not a number of them that grows with the square of the steps."""
    asked, of = [], CoupledDistribution.log_partition.__get__
    count = property(lambda dist: (asked.append(dist), of(dist))[1])
    monkeypatch.setattr(CoupledDistribution, "log_partition", count)
    numbers = []
    for steps in (4, 8):
        asked.clear()
        CoupledHead(pc, conditioners=[MarginalMatching(steps).double()])(said, *block).log_partition.sum().backward()
        numbers.append(len(asked))
    assert numbers == [9, 17]


def test_it_is_saved_and_loaded(pc, said, block, generator, tmp_path):
    head = CoupledHead(pc, conditioners=[moved(generator, 2)])
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head")
    assert loaded.conditioners[0].settings() == head.conditioners[0].settings()
    torch.testing.assert_close(law_of(loaded(said, *block)), law_of(head(said, *block)), rtol=0, atol=0)


def test_local_normalisation_is_refused(pc, said, block):
    head = CoupledHead(pc, normalization="local", conditioners=[MarginalMatching().double()])
    with pytest.raises(ArgumentError, match="normalization: expected 'global' for MarginalMatching"):
        head(said, *block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_knots": 1}, "num_knots"),
        ({"step": 0}, "step: expected a number above 0"),
        ({"step": 1.5}, "step"),
        ({"step": float("nan")}, "step"),
        ({"step": "0.3"}, "step"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        MarginalMatching(**options)


def test_training_learns_how_far_to_go(tmp_path):
    """Blocks of one token four times: the circuit knows that they are equal, the denoiser nothing."""
    windows, denoiser = told_windows(), small_denoiser()
    cache = cache_logits(denoiser, windows, tmp_path / "cache", block_length=4, progress=False)
    pc = ct.compile(ct.structures.hmm(4, 6, 9), seed=0)
    ct.learning.fit(pc, windows[:, -4:].contiguous(), optimizer=ct.learning.EM(), num_epochs=10, progress=False)
    head = CoupledHead(pc, conditioners=[MarginalMatching(2)])
    head.pc.requires_grad_(False)
    before = coupled_loss(head, cache)
    config = CircuitTraining(steps=40, batch_size=30, learning_rate=0.1, validate_every=40)
    fit_coupled(head, cache, config=config, progress=False)
    assert coupled_loss(head, cache) < before - 0.05


def test_decoding_and_mixtures_take_it():
    denoiser = small_denoiser()
    pc = ct.compile(ct.structures.hmm(4, 3, 9), seed=0)
    heads = [CoupledHead(pc, conditioners=[one]) for one in (MarginalMatching(2), NoiseCalibration(9))]
    prompt = torch.zeros(2, 4, dtype=torch.int64)
    for head in (heads[0], HeadMixture(heads, vocab_size=9)):
        one, other = (
            generate(denoiser, prompt, gen_length=4, num_steps=2, head=head, decode="joint", temperature=1.0,
                     generator=torch.Generator().manual_seed(0)).tokens
            for _ in range(2)
        )  # fmt: skip
        assert torch.equal(one, other)
