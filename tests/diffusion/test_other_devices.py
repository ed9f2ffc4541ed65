"""Coupling, decoding, training and evaluation on another device than the CPU.

The other device is a GPU where there is one, and a pretended one everywhere, see ``tests/pretended_device.py``.
"""

import typing

import pytest
import torch

import circuits as ct
from diffusion import (
    CircuitTraining,
    CoupledDistribution,
    CoupledHead,
    DenoiserSpec,
    NoiseCalibration,
    TransformerConfig,
    TransformerDenoiser,
    cache_logits,
    fit_coupled,
    generate,
    infill,
)
from diffusion.decoding.config import MODES, Strategy
from diffusion.evaluation.few_steps import few_step_quality
from diffusion.evaluation.gap import misspecification_gap
from diffusion.training.denoiser import DenoiserTraining, held_out_loss, train_denoiser

V, CONTEXT, L, MASK = 9, 4, 4, 8
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NEARLY = {"rtol": 1e-4, "atol": 1e-4}  # float32


def circuit(device="cpu", dtype=torch.float32):
    return ct.compile(ct.structures.hmm(L, 3, V), seed=0, device=device, dtype=dtype)


def head(device="cpu", **options):
    return CoupledHead(circuit(device), **options)


def transformer(device="cpu"):
    config = TransformerConfig(
        vocab_size=V, mask_id=MASK, pad_id=7, eos_id=6, forbidden_ids=(7, 8), context_length=CONTEXT, block_length=L,
        width=16, num_layers=1, num_heads=2,
    )  # fmt: skip
    return TransformerDenoiser(config, seed=0).eval().to(device)


class TableDenoiser:
    """The same logits whatever is visible."""

    spec = DenoiserSpec(vocab_size=V, mask_id=MASK, eos_ids=(6,), pad_id=7, forbidden_ids=(7, 8), max_length=40)

    def __init__(self, device="cpu"):
        table = torch.randn(40, V, generator=torch.Generator().manual_seed(0))
        table[:, 6] = -50.0
        self.table = table.to(device)
        self.device = self.table.device

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        assert tokens.device == self.device
        start, stop = window or (0, tokens.shape[1])
        return self.table[start:stop].expand(len(tokens), -1, -1).clone()


def texts(count=50):
    return torch.randint(0, 6, (count, CONTEXT + L), generator=torch.Generator().manual_seed(0))


def problem(device="cpu"):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, L, V, dtype=torch.float64, generator=generator)
    tokens = torch.randint(V, (5, L), generator=generator)
    masked = torch.rand(5, L, generator=generator) < 0.6
    return logits.to(device), tokens.to(device), masked.to(device)


def greedy(device, decode, prompt, **options):
    options = {"gen_length": 2 * L, "block_length": L, "num_steps": 4, "decode": decode, **options}
    return generate(TableDenoiser(device), prompt, head=head(device), **options)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("normalization", ["global", "local"])
def test_the_coupled_distribution(normalization, top_k, elsewhere):
    found = []
    for device in ("cpu", elsewhere.device):
        logits, tokens, masked = problem(device)
        pc = circuit(device, torch.float64)
        include = tokens if top_k else None
        options = {"normalization": normalization, "top_k": top_k, "include": include}
        dist = CoupledDistribution(pc, logits.requires_grad_(), tokens, masked, **options)
        score = dist.log_prob(tokens)
        gradients = torch.autograd.grad(score.sum(), [logits, *pc.parameters()])
        found.append([dist.log_partition, dist.marginal_probs, dist.mode, score, *gradients])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there.detach().cpu(), here.detach(), **CLOSE)


def test_coupled_samples_follow_their_marginals(elsewhere):
    logits, tokens, masked = problem(elsewhere.device)
    dist = CoupledDistribution(circuit(elsewhere.device, torch.float64), logits, tokens, masked)
    samples = dist.sample((4000,), generator=elsewhere.generator())
    assert samples.device == dist.pc.device
    frequencies = torch.nn.functional.one_hot(samples.cpu(), V).double().mean(0)
    torch.testing.assert_close(frequencies, dist.marginal_probs.detach().cpu(), rtol=0, atol=0.04)


@pytest.mark.parametrize("decode", tuple(MODES))
def test_greedy_text(decode, elsewhere):
    prompt = torch.tensor([[0, 1, 2], [3, 4, 5]])
    there = greedy(elsewhere.device, decode, prompt.to(elsewhere.device))
    assert there.tokens.device == elsewhere.device
    assert torch.equal(there.tokens.cpu(), greedy("cpu", decode, prompt).tokens)


@pytest.mark.parametrize("prompt", [[[0, 1, 2], [3]], torch.tensor([[0, 1], [2, 3]])], ids=["lists", "tensor"])
def test_prompts_go_where_the_denoiser_is(prompt, elsewhere):
    there = greedy(elsewhere.device, "marginal", prompt)
    assert there.tokens.device == there.valid.device == elsewhere.device
    assert torch.equal(there.tokens.cpu(), greedy("cpu", "marginal", prompt).tokens)


def test_holes_go_where_the_denoiser_is(elsewhere):
    tokens, masked = torch.tensor([[0, 8, 2, 3, 8, 1, 7]]), torch.tensor([[0, 1, 0, 1, 1, 0, 0]]).bool()
    texts = [
        infill(TableDenoiser(device), given, masked, valid=(tokens != 7), head=head(device)).tokens.cpu()
        for device, given in (
            ("cpu", tokens),
            (elsewhere.device, tokens),
            (elsewhere.device, tokens.to(elsewhere.device)),
        )
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


MIXED = [(mode, "entropy") for mode in tuple(MODES)]
MIXED += [("latent", strategy) for strategy in typing.get_args(Strategy)]


@pytest.mark.parametrize(("decode", "strategy"), MIXED)
def test_drawn_text_is_that_of_its_seeds(decode, strategy, elsewhere):
    options = {"strategy": strategy, "temperature": 1.0, "seeds": [3, 4], "gen_length": L, "num_steps": 2}
    prompt = [[0, 1, 2], [3]]
    there = greedy(elsewhere.device, decode, prompt, **options)
    assert torch.equal(there.tokens.cpu(), greedy("cpu", decode, prompt, **options).tokens)


def test_conditioned_text(elsewhere):
    calibration = NoiseCalibration(V).to(elsewhere.device)
    with_head = CoupledHead(circuit(elsewhere.device), 0.9, top_k=4, calibration=calibration)
    out = generate(
        TableDenoiser(elsewhere.device), [[0, 1, 2]], gen_length=2 * L, block_length=L, num_steps=4, head=with_head,
        temperature=1.0, generator=elsewhere.generator(),
    )  # fmt: skip
    assert bool((out.generated < 7).all())


def test_saved_heads(elsewhere, tmp_path):
    there = head(elsewhere.device, calibration=NoiseCalibration(V).to(elsewhere.device))
    there.save(tmp_path / "head")
    logits, tokens, masked = problem()
    for device in ("cpu", elsewhere.device):
        loaded = CoupledHead.load(tmp_path / "head", device=device)
        score = loaded.conditional_log_likelihood(logits.to(device), tokens.to(device), masked.to(device))
        expected = there.conditional_log_likelihood(*problem(elsewhere.device))
        torch.testing.assert_close(score.detach().cpu(), expected.detach().cpu(), **NEARLY)


@pytest.mark.parametrize("top_k", [None, 3])
def test_cached_logits_and_what_is_fitted_to_them(top_k, elsewhere, tmp_path):
    found = []
    for device in ("cpu", elsewhere.device):
        name = f"{torch.device(device).type}-{top_k}"
        options = {"block_length": L, "batch_size": 16, "progress": False, "device": device, "top_k": top_k}
        cache = cache_logits(transformer(device), texts(), tmp_path / name, **options)
        fitted = head(device)
        config = CircuitTraining(steps=3, batch_size=16)
        path = tmp_path / f"{name}.safetensors"
        curve = fit_coupled(fitted, cache, cache, config=config, progress=False, checkpoint_path=path)
        found.append([torch.from_numpy(cache.log_q.copy()).float(), torch.tensor([*curve.train, *curve.held_out])])
        found[-1] += [parameter.detach().cpu() for parameter in fitted.parameters()]
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=5e-3, atol=5e-3)  # float16 on disk


def test_evaluating_a_denoiser(elsewhere):
    found = []
    for device in ("cpu", elsewhere.device):
        model, data = transformer(device), texts().to(device)
        table = misspecification_gap(model, head(device), data, mask_ratios=(0.5,), num_bootstrap=10)
        row = table.rows[0]
        losses = [row.one_step.value, row.circuit_alone.value, row.coupled.value, row.sequential.value]
        found.append(torch.tensor([held_out_loss(model, data, block_length=L), *losses]))
    torch.testing.assert_close(*found, **NEARLY)


def test_only_the_best_logits_leave_the_device(elsewhere, tmp_path):
    if elsewhere.pretended is None:
        pytest.skip("only the pretended device counts")
    options = {"block_length": L, "batch_size": 16, "progress": False, "device": elsewhere.device, "top_k": 3}
    cache_logits(transformer(elsewhere.device), texts(), tmp_path / "cache", **options)
    assert elsewhere.pretended.most_read == 16 * L * 4 < 16 * L * V


@pytest.mark.gpu
def test_training_a_denoiser(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stream = torch.randint(0, 6, (400,), generator=torch.Generator().manual_seed(0))
    config = DenoiserTraining(steps=4, batch_size=8, warmup_steps=1, validation_windows=8, precision="float32")
    found = []
    for device in ("cpu", "cuda"):
        options = {"config": config, "checkpoint_path": tmp_path / f"{device}.safetensors", "progress": False}
        model = transformer(device)
        curve = train_denoiser(model, stream, stream, **options)
        assert train_denoiser(transformer(device), stream, stream, **options) == curve  # read from the checkpoint
        found.append(torch.tensor([*curve.train, *curve.held_out]))
    torch.testing.assert_close(*found, **NEARLY)


def test_few_steps(elsewhere):
    prompts = texts(6)[:, :CONTEXT].to(elsewhere.device)
    denoiser = TableDenoiser(elsewhere.device)
    options = {"criterion": "any", "steps": (1, 2), "decode": "marginal", "temperature": 0.0}
    table = few_step_quality(denoiser, head(elsewhere.device), prompts, lambda prompt, text: len(text) == L, **options)
    assert [row.num_steps for row in table.rows] == [1, 2]


@pytest.mark.gpu
def test_autocast_changes_nothing():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pc = ct.compile(ct.structures.hmm(32, 128, 50), seed=0, device="cuda")
    x = torch.randint(50, (8, 32), generator=torch.Generator().manual_seed(0)).cuda()
    expected = pc(x).detach()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            found = pc(x)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.detach(), expected)
            found.sum().backward()
            dist = CoupledDistribution(circuit("cuda"), *problem("cuda"))
            assert dist.marginal_probs.dtype == torch.float32
            torch.testing.assert_close(dist.marginal_probs.sum(-1), torch.ones(5, L, device="cuda"), **NEARLY)
