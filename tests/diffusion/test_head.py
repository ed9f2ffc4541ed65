"""One head, one meaning: training, scoring and decoding ask the same distribution, which is the enumerated one."""

import json

import numpy as np
import pytest
import torch
from hmm_cases import STATES, L, N, V, hmm, joints, texts, truncated
from safetensors.torch import save_file
from scipy import stats

import circuits as ct
from diffusion import CoupledDistribution, CoupledHead, DecodingConfig, NoiseCalibration, Prediction
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.head import circuit_hash
from diffusion.training.logit_cache import CachedBatch

B = 3
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
NORMALIZATIONS = ["global", "local"]


@pytest.fixture
def pc():
    return hmm()


@pytest.fixture
def block(generator):
    logits = torch.randn(B, L, V, dtype=torch.float64, generator=generator)
    tokens = torch.randint(V, (B, L), generator=generator)
    masked = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    return logits, tokens, masked


def probabilities(logits):
    return torch.softmax(logits.double(), -1).numpy()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 1, 2, V])
def test_training_scoring_and_decoding_ask_the_enumerated_distribution(top_k, normalization, pc, block):
    logits, tokens, masked = block
    head = CoupledHead(pc, normalization=normalization, top_k=top_k)
    log_q = torch.log_softmax(logits, -1)
    order = log_q.argsort(-1, descending=True)
    for include in (None, tokens):
        law = joints(pc, truncated(probabilities(logits), top_k, include), tokens, masked, normalization).sum(-1)
        asked = {
            "logits": head.distribution(logits, tokens, masked, include=include),
            "prediction": head.distribution(Prediction.from_logits(logits), tokens, masked, include=include),
            "list": head.distribution(
                Prediction.from_logits(logits, top_k=top_k, include=include), tokens, masked, include=include
            ),
        }
        if include is not None:
            asked["cache of all"] = CachedBatch(tokens, masked, log_q, None, V).distribution(head)
            asked["cached list"] = CachedBatch(tokens, masked, log_q.gather(2, order), order, V).distribution(head)
        for name, dist in asked.items():
            found = dist.log_prob(texts(B)).exp().T.detach().numpy()
            np.testing.assert_allclose(found, law, rtol=1e-7, atol=1e-12, err_msg=name)
    cll = np.log([law[b][V ** np.arange(L)[::-1] @ tokens[b].numpy()] for b in range(B)])
    np.testing.assert_allclose(head.conditional_log_likelihood(logits, tokens, masked).detach(), cll, rtol=1e-7)


def test_a_cache_of_all_tokens_is_scored_with_the_heads_top_k(pc, block):
    """With one token each and the true one, the product is over at most two tokens a position."""
    logits, tokens, masked = block
    head = CoupledHead(pc, top_k=1)
    batch = CachedBatch(tokens, masked, torch.log_softmax(logits, -1), None, V)
    found = batch.distribution(head).log_prob(batch.tokens)
    torch.testing.assert_close(found, head.conditional_log_likelihood(logits, tokens, masked), **CLOSE)
    assert not torch.allclose(found, CoupledHead(pc).conditional_log_likelihood(logits, tokens, masked))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_given_more_tokens_it_is_the_conditional_of_the_same_joint(top_k, normalization, pc, block):
    logits, tokens, masked = block
    law = joints(pc, truncated(probabilities(logits), top_k), tokens, masked, normalization).sum(-1)
    dist = CoupledDistribution(pc, logits, tokens, masked, normalization=normalization, top_k=top_k)
    chosen = dist.sample(generator=torch.Generator().manual_seed(0))
    observed = torch.tensor([[True, False, False], [False, True, True], [False, True, False]])
    agrees = ((texts(B) == chosen) | ~observed).all(-1).T.numpy()
    expected = np.where(agrees, law, 0.0)
    expected = expected / expected.sum(1, keepdims=True)
    further = dist.given(chosen, observed)
    np.testing.assert_allclose(further.log_prob(texts(B)).exp().T.detach(), expected, rtol=1e-7, atol=1e-12)
    assert torch.equal(further.masked, masked & ~observed)
    for position in range(L):
        of_value = [expected[:, texts(1)[:, 0, position] == v].sum(1) for v in range(V)]
        np.testing.assert_allclose(further.marginal_probs[:, position].detach(), np.stack(of_value, 1), atol=1e-9)
    again = dist.given(chosen, observed & masked).given(chosen, torch.zeros_like(observed))
    torch.testing.assert_close(again.marginal_probs, further.marginal_probs)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_posterior_is_a_prediction_of_the_exact_marginals(top_k, normalization, pc, block):
    logits, tokens, masked = block
    dist = CoupledHead(pc, normalization=normalization, top_k=top_k).distribution(logits, tokens, masked)
    posterior = dist.posterior()
    assert posterior.num_listed == (top_k or V)
    torch.testing.assert_close(posterior.dense().exp(), dist.marginal_probs)
    torch.testing.assert_close(posterior.log_prob_of(tokens)[~masked].exp(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_latents_come_from_their_posterior(top_k, normalization, pc, block, generator):
    """Seen by the emissions of the states that were drawn: they follow p(z | observed tokens, q)."""
    logits, tokens, masked = block
    rows = 6000
    q = truncated(probabilities(logits[:1]), top_k)
    law = joints(pc, q, tokens[:1], masked[:1], normalization)[0].sum(0)
    many = [part[:1].expand(rows, *part.shape[1:]) for part in block]
    dist = CoupledDistribution(pc, *many, normalization=normalization, top_k=top_k)
    emissions = torch.stack(
        [pc.log_weights(leaf).detach().t() for leaf in sorted(pc.circuit.inputs, key=lambda n: n.var)]
    )

    def states_of(said):
        """The states (n, L) whose emissions of the listed tokens are these."""
        listed = torch.arange(V).expand(*said.log_q.shape[:2], -1) if said.values is None else said.values
        expected = (
            emissions.unsqueeze(0).expand(len(listed), -1, -1, -1).gather(3, listed.unsqueeze(2).expand(-1, -1, N, -1))
        )
        return (expected == said.log_q.unsqueeze(2)).all(-1).int().argmax(-1)

    drawn = (states_of(dist.given_latents(generator)) * torch.tensor([4, 2, 1])).sum(-1)
    assert stats.chisquare(torch.bincount(drawn, minlength=N**L), law * rows).pvalue > 1e-3
    best = states_of(dist.given(tokens[:1].expand(rows, -1), ~many[2]).given_latents(temperature=0.0))
    assert tuple(best[0].tolist()) == STATES[law.argmax()]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_factors_on_latents_and_weights_at_run_time_are_part_of_the_product(normalization, pc, block, generator):
    logits, tokens, masked = block
    factors = torch.randn(B, L, N, dtype=torch.float64, generator=generator)
    names = ["initial", "transition0", "transition1"]
    latents = dict(zip(names, factors.unbind(1), strict=True))
    q = probabilities(logits)
    law = joints(pc, q, tokens, masked, normalization, factors.exp().numpy())
    dist = CoupledDistribution.of(
        pc, Prediction.from_logits(logits), tokens, masked, normalization=normalization, latents=latents
    )
    np.testing.assert_allclose(dist.log_prob(texts(B)).exp().T.detach(), law.sum(-1), rtol=1e-7, atol=1e-12)

    external = torch.log_softmax(torch.randn(B, N, N, dtype=torch.float64, generator=generator), -1)
    weights = pc.weights(external={"transition0": external})
    dist = CoupledDistribution.of(
        pc, Prediction.from_logits(logits, top_k=3), tokens, masked, normalization=normalization, weights=weights
    )
    for b in range(B):
        pc.set_weights(pc.sum_node("transition0"), external[b].exp())
        expected = joints(pc, truncated(q, 3), tokens, masked, normalization)[b].sum(-1)
        np.testing.assert_allclose(dist.log_prob(texts(B)).exp()[:, b].detach(), expected, rtol=1e-7, atol=1e-12)
    assert dist.sample((4,)).shape == (4, B, L)
    assert dist.mode.shape == (B, L)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_batch_of_no_blocks_has_no_answers(top_k, normalization, pc):
    empty = torch.zeros(0, L, dtype=torch.int64)
    dist = CoupledDistribution(pc, torch.zeros(0, L, V), empty, empty.bool(), normalization=normalization, top_k=top_k)
    assert dist.log_prob(empty).shape == (0,)
    assert dist.log_prob(torch.zeros(5, 0, L, dtype=torch.int64)).shape == (5, 0)
    assert dist.sample((2,)).shape == (2, 0, L)
    assert dist.marginal_probs.shape == (0, L, V)
    assert dist.posterior().shape == (0, L)


def test_labels_that_do_not_count_are_ignored_where_tokens_are_observed_and_named_elsewhere(pc, block):
    logits, tokens, masked = block
    head = CoupledHead(pc)
    dist = head.distribution(logits, tokens, masked)
    labels = tokens.masked_fill(~masked, -100)
    torch.testing.assert_close(dist.log_prob(labels), dist.log_prob(tokens))
    for attempt, message in (
        (lambda: dist.log_prob(torch.full_like(tokens, -100)), "value: expected tokens from 0 to 3, got -100"),
        (lambda: head.distribution(logits, labels, masked), "tokens: expected tokens from 0 to 3, got -100"),
        (lambda: head.conditional_log_likelihood(logits, labels, masked), "targets: expected tokens from 0 to 3"),
        (lambda: dist.log_prob(tokens.double()), "value: expected int64"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attempt()


def test_the_circuit_is_used_at_every_ratio_unless_the_head_is_told_otherwise(pc):
    assert CoupledHead(pc).activation_threshold == 1.0


SETTINGS = {"activation_threshold": 0.4, "temperature": 0.5, "normalization": "local", "top_k": 3}


def old_file(folder, pc, calibration, settings=SETTINGS):
    """Write a head as it was written before heads had conditioners."""
    ct.save(pc, folder / "circuit")
    metadata = {
        "format": "unfactor-coupled-head",
        "format_version": "1",
        "settings": json.dumps(settings),
        "circuit_sha256": circuit_hash(folder),
    }
    tensors = {} if calibration is None else {k: v.contiguous() for k, v in calibration.state_dict().items()}
    save_file(tensors, folder / "head.safetensors", metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_is_loaded_in_the_precision_that_it_was_saved_in(dtype, pc, block, tmp_path):
    logits, tokens, masked = block
    calibration = NoiseCalibration(V, 2).to(dtype)
    with torch.no_grad():
        calibration.log_scale.fill_(0.1)  # no number of float32
    head = CoupledHead(pc.to(dtype), calibration=calibration)
    head.save(tmp_path / "head")
    loaded = CoupledHead.load(tmp_path / "head")
    for one, other in zip(head.parameters(), loaded.parameters(), strict=True):
        assert other.dtype == dtype
        assert torch.equal(one, other)
    assert torch.equal(head(logits, tokens, masked).log_prob(tokens), loaded(logits, tokens, masked).log_prob(tokens))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation_threshold": True}, r"settings: activation_threshold: expected a number from 0 to inf, got True"),
        ({"top_k": 3.0}, r"settings: top_k: expected an integer from .*, got 3\.0"),
        ({"tokenizer_fingerprint": 7}, r"settings: tokenizer_fingerprint: expected str, got 7"),
        ({"normalization": ["local"]}, r"settings: normalization: expected one of global, local, got a list of 1"),
        ({"conditioners": []}, r"settings: keys: expected no others, got 'conditioners'"),
        ({"decoding": 7}, r"decoding: expected an object with keys, got 7"),
    ],
)
def test_settings_in_a_file_are_of_their_types(changed, message, pc, tmp_path):
    old_file(tmp_path, pc, None, SETTINGS | changed)
    with pytest.raises(CheckpointError, match=rf"head\.safetensors: {message}; save the head again"):
        CoupledHead.load(tmp_path)


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_heads_written_before_still_load(is_calibrated, pc, block, tmp_path):
    calibration = None
    if is_calibrated:
        calibration = NoiseCalibration(V, 3)
        torch.nn.init.normal_(calibration.bias)
    old_file(tmp_path, pc, calibration)
    loaded = CoupledHead.load(tmp_path)
    head = CoupledHead(pc, 0.4, 0.5, normalization="local", top_k=3, calibration=calibration)
    for name in ("activation_threshold", "temperature", "normalization", "top_k"):
        assert getattr(loaded, name) == getattr(head, name)
    assert (loaded.calibration is None) == (not is_calibrated)
    assert torch.equal(loaded(*block).marginal_probs, head(*block).marginal_probs)


@pytest.mark.parametrize("temperature", [1e-38, 1e39, -1.0, float("nan"), float("inf"), "warm", True])
def test_temperatures_that_float32_cannot_divide_by_are_refused(temperature, pc):
    with pytest.raises(ArgumentError, match="temperature: expected 0, or a number"):
        CoupledHead(pc, temperature=temperature)
    with pytest.raises(ArgumentError, match="temperature: expected 0, or a number"):
        DecodingConfig(temperature=temperature)
