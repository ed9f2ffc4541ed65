"""Calibration by the noise level: what it computes, that it starts where it says, and that a head keeps it."""

import shutil

import pytest
import torch

import circuits as ct
from diffusion import CoupledHead, NoiseCalibration
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.training.logit_cache import CachedBatch

V, L, B = 5, 4, 3


@pytest.fixture
def pc():
    return ct.compile(ct.structures.hmm(L, 3, V), seed=0)


@pytest.fixture
def block(generator):
    logits = torch.randn(B, L, V, generator=generator)
    tokens = torch.randint(V, (B, L), generator=generator)
    masked = torch.tensor([[True, True, True, True], [True, False, True, False], [False, False, False, True]])
    return logits, tokens, masked


@pytest.fixture
def calibration(generator):
    made = NoiseCalibration(V, num_knots=3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def test_a_new_calibration_is_the_plain_product(pc, block):
    plain, calibrated = CoupledHead(pc), CoupledHead(pc, calibration=NoiseCalibration(V))
    torch.testing.assert_close(calibrated(*block).marginal_probs, plain(*block).marginal_probs)


def test_factors_are_interpolated_between_the_knots_by_each_blocks_own_mask_ratio(calibration, block):
    logits, _, masked = block
    factors = calibration(logits, masked)
    scale, bias = calibration.log_scale.detach().exp(), calibration.bias.detach()  # at the ratios 0, 1/2 and 1
    log_scale = calibration.log_scale.detach()
    torch.testing.assert_close(factors[0], scale[2] * logits[0] + bias[2])
    torch.testing.assert_close(factors[1], scale[1] * logits[1] + bias[1])
    quarter = ((log_scale[0] + log_scale[1]) / 2).exp() * logits[2] + (bias[0] + bias[1]) / 2
    torch.testing.assert_close(factors[2], quarter)


def test_forbidden_tokens_stay_forbidden_and_give_no_nan(calibration, pc, block):
    logits, tokens, masked = block
    logits[..., 1] = -torch.inf
    factors = calibration(logits, masked)
    assert (factors[..., 1] == -torch.inf).all()
    head = CoupledHead(pc, calibration=calibration)
    head.conditional_log_likelihood(logits, tokens.where(tokens != 1, 0), masked).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_listed_tokens_get_the_factors_that_they_have_among_all(calibration, block):
    logits, _, masked = block
    listed, values = logits.topk(3, -1)
    torch.testing.assert_close(calibration(listed, masked, values), calibration(logits, masked).gather(2, values))


def test_a_cached_batch_is_calibrated_like_the_logits(calibration, pc, block):
    logits, tokens, masked = block
    head = CoupledHead(pc, calibration=calibration)
    expected = head(*block).log_partition
    log_q = torch.log_softmax(logits, -1)
    order = torch.arange(V).flip(0).expand(B, L, V)
    for batch in (
        CachedBatch(tokens, masked, log_q, None),
        CachedBatch(tokens, masked, log_q.gather(2, order), order),
    ):
        marginals = batch.distribution(head).marginal_probs
        torch.testing.assert_close(marginals, head(*block).marginal_probs)
        assert batch.distribution(head).log_partition.shape == expected.shape


def test_dividing_out_makes_frequent_tokens_cost_more():
    counts = torch.tensor([99, 9, 0])
    calibration = NoiseCalibration.dividing_out(counts, strength=0.5)
    frequency = (counts + 1).double() / (counts + 1).sum()
    torch.testing.assert_close(calibration.bias[0].detach().double(), -0.5 * frequency.log())
    assert (calibration.log_scale == 0).all()


def test_latent_decoding_uses_the_calibrated_prediction(calibration, pc, block):
    logits, tokens, masked = block
    calibrated, plain = CoupledHead(pc, calibration=calibration), CoupledHead(pc)
    given = [
        head.distribution(scores, tokens, masked).given_latents(ct.RowGenerators(torch.arange(len(tokens)))).log_q
        for head, scores in ((calibrated, logits), (plain, calibration(logits, masked).detach()))
    ]
    assert torch.equal(*given)


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_loaded_head_is_the_saved_one(is_calibrated, calibration, pc, block, tmp_path):
    head = CoupledHead(pc, 0.4, 0.5, normalization="local", top_k=4, calibration=calibration if is_calibrated else None)
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head")
    for name in ("activation_threshold", "temperature", "normalization", "top_k"):
        assert getattr(loaded, name) == getattr(head, name)
    assert torch.equal(loaded(*block).marginal_probs, head(*block).marginal_probs)


def test_a_damaged_head_is_refused(calibration, pc, tmp_path):
    folder = tmp_path / "head"
    CoupledHead(pc, calibration=calibration).save(folder)
    ct.save(ct.compile(pc.circuit, seed=1), folder / "circuit")
    with pytest.raises(CheckpointError, match="expected the content that its hash is of"):
        CoupledHead.load(folder)
    (folder / "manifest.json").unlink()  # as heads of older versions
    with pytest.raises(CheckpointError, match="expected a head of the circuit beside it"):
        CoupledHead.load(folder)
    file = folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="expected a file that can be read"):
        CoupledHead.load(folder)
    shutil.rmtree(folder / "circuit")
    with pytest.raises(CheckpointError):
        CoupledHead.load(folder)


def test_wrong_arguments_are_named(pc):
    with pytest.raises(ArgumentError, match="num_knots"):
        NoiseCalibration(V, num_knots=1)
    with pytest.raises(ArgumentError, match="token_counts"):
        NoiseCalibration.dividing_out(torch.tensor([-1, 2]))
    with pytest.raises(ArgumentError, match="calibration: it is for 7 tokens"):
        CoupledHead(pc, calibration=NoiseCalibration(7))
