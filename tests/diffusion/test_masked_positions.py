"""Predictions of masked positions alone: what training reads, and pays for; answers are those of whole predictions."""

import numpy as np
import pytest
import torch
from contextual_cases import DOUBLE, B, H, random_block, random_prediction
from hmm_cases import L, N, V, joints, texts

import circuits as ct
from circuits.algebra import logspace
from diffusion import (
    CircuitAlone,
    CircuitTraining,
    Conditioned,
    Conditioner,
    CoupledDistribution,
    CoupledHead,
    LatentPotentials,
    LogitCache,
    LowRankTransitions,
    MixtureWeights,
    NoiseCalibration,
    Prediction,
    TransitionGates,
)
from diffusion.errors import ArgumentError, ImpossibleEvidenceError
from diffusion.training.circuit import CacheTraining, coupled_loss, losses_by_ratio

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NORMALIZATIONS = ["global", "local"]
CONDITIONERS = {
    "none": lambda pc: [],
    "calibration": lambda pc: [NoiseCalibration(V)],
    "potentials": lambda pc: [LatentPotentials.for_hmm(pc, H)],
    "gates": lambda pc: [TransitionGates.for_hmm(pc, H, num_tables=2)],
    "low rank": lambda pc: [LowRankTransitions.for_hmm(pc, H, rank=1)],
    "all": lambda pc: [
        NoiseCalibration(V), LatentPotentials.for_hmm(pc, H, hidden=3), TransitionGates.for_hmm(pc, H, num_tables=2)
    ],
    "mixture": lambda pc: [NoiseCalibration(V), MixtureWeights.for_mixture(pc, H, power=0.5)],
    "two chains": lambda pc: [NoiseCalibration(V)],  # one layer reads two tables
    "by position": lambda pc: [NoiseCalibration(V)],  # and here each position its own
}  # fmt: skip
STRUCTURES = {
    "mixture": lambda: ct.structures.mixture_of([ct.structures.hmm(L, N, V), ct.structures.fully_factorized(L, V)]),
    "two chains": lambda: ct.structures.mixture_of([ct.structures.hmm(L, N, V), ct.structures.hmm(L, N, V)]),
    "by position": lambda: ct.structures.hmm(L, N, V, homogeneous=False),
}


def compiled(name="hmm"):
    structure = STRUCTURES.get(name, lambda: ct.structures.hmm(L, N, V))
    return ct.compile(structure(), dtype=DOUBLE, seed=0)


def head_of(name, normalization="global", **options):
    pc = compiled(name)
    head = CoupledHead(pc, normalization=normalization, conditioners=CONDITIONERS[name](pc), **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return head


@pytest.fixture
def block(generator):
    return random_block(generator)


@pytest.fixture(params=["all tokens", "listed tokens"])
def prediction(request, generator, block):
    said = random_prediction(generator)
    return said if request.param == "all tokens" else said.listed(2, block[0])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("structure", ["hmm", "by position"])
def test_the_law_is_the_enumerated_product(structure, normalization, prediction, block):
    tokens, masked = block
    pc = compiled(structure)
    dist = CoupledDistribution.of(pc, prediction.only(masked), tokens, masked, normalization=normalization)
    expected = joints(pc, prediction.dense().exp().numpy(), tokens, masked, normalization).sum(2)  # (B, V ** L)
    found = torch.stack([dist.log_prob(text) for text in texts(B)]).exp().detach()
    torch.testing.assert_close(found, torch.from_numpy(expected.T), **CLOSE)
    both = torch.stack([dist.log_prob(text, log_partition=dist.log_partition) for text in texts(B)]).exp()
    torch.testing.assert_close(both.detach(), found, **CLOSE)
    torch.testing.assert_close(dist.log_prob(texts(B)).exp().detach(), found, **CLOSE)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_question_has_the_answer_of_the_whole_prediction(normalization, prediction, block):
    tokens, masked = block
    pc = compiled()
    whole, only = (
        CoupledDistribution.of(pc, said, tokens, masked, normalization=normalization)
        for said in (prediction, prediction.only(masked))
    )
    given = tokens, masked & (torch.arange(L) == 0)
    with torch.no_grad():
        for ask in (
            lambda dist: dist.log_partition,
            lambda dist: dist.marginal_probs,
            lambda dist: dist.posterior().log_q.exp()[masked],
            lambda dist: dist.mode,
            lambda dist: dist.draw(0.0),
            lambda dist: dist.given(*given).marginal_probs,
            lambda dist: dist.given(*given).log_prob(tokens),
            lambda dist: dist.log_prob_at(*given),
            lambda dist: dist.prediction.log_prob_of(tokens),
        ):
            torch.testing.assert_close(ask(only), ask(whole), **CLOSE)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", CONDITIONERS)
def test_all_gradients_are_those_of_the_whole_prediction(name, normalization, prediction, block):
    tokens, masked = block
    head = head_of(name, normalization)
    losses, gradients = [], []
    for said in (prediction, prediction.only(masked)):
        head.zero_grad()
        losses.append(head.distribution(said, tokens, masked, include=tokens).log_prob(tokens))
        (losses[-1] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    torch.testing.assert_close(*losses, **CLOSE)
    torch.testing.assert_close(*gradients, **CLOSE)
    assert all(bool(parameter.grad.any()) for one in head.conditioners for parameter in one.parameters())


def cached(prediction, tokens, masked, num_copies=1):
    said = prediction.log_q.float().numpy(), None if prediction.values is None else prediction.values.numpy()
    features = prediction.features.float().numpy()
    arrays = [None if one is None else np.concatenate([one] * num_copies) for one in (*said, features)]
    tokens, masked = (np.concatenate([one.numpy()] * num_copies) for one in (tokens, masked))
    return LogitCache(tokens, masked, *arrays[:2], V, "made", arrays[2])


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_batch_of_masked_positions_holds_the_rows_of_the_whole_one(top_k, prediction, block):
    tokens, masked = block
    cache, head = cached(prediction, tokens, masked), head_of("all", top_k=top_k)
    for index in (slice(1, 3), np.array([2, 0])):
        whole, only = (cache.batch(index, masked_only=masked_only) for masked_only in (False, True))
        assert torch.equal(only.log_q[0], whole.log_q[whole.masked])
        assert prediction.values is None or torch.equal(only.values[0], whole.values[whole.masked])
        found = (batch.distribution(head).log_prob(batch.tokens).detach() for batch in (whole, only))
        torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("optimizer", ["adam", "anemone"])
def test_an_update_is_that_of_the_whole_prediction(optimizer, prediction, block, monkeypatch):
    cache, found = cached(prediction, *block), []
    for needs_observed in (False, True):
        monkeypatch.setattr(NoiseCalibration, "needs_observed", needs_observed)
        head = head_of("calibration")
        assert head.needs_observed is needs_observed
        training = CacheTraining(head, cache, None, CircuitTraining(batch_size=3, optimizer=optimizer, steps=5))
        losses = [training.update(step) for step in range(3)]
        measured = [coupled_loss(head, cache, batch_size=2), *losses_by_ratio(head, cache, num_bins=3, batch_size=2)]
        found.append([torch.stack(losses), torch.tensor(measured, dtype=DOUBLE), *head.state_dict().values()])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("name", ["all", "by position"])
def test_an_update_multiplies_a_table_once_for_every_masked_position(name, generator, block, monkeypatch):
    cache, columns, contract = cached(random_prediction(generator), *block, num_copies=5), [], logspace.contract

    def counted(log_weights, weights, x, *, record):
        columns.append(len(x) * x.shape[2] if x.shape[1] == V else 0)
        return contract(log_weights, weights, x, record=record)

    monkeypatch.setattr(logspace, "contract", counted)
    CacheTraining(head_of(name), cache, None, CircuitTraining(batch_size=15, steps=1)).update(0)
    assert sum(columns) == cache.masked.sum() < cache.masked.size


class Confidence(Conditioner):
    """Reads how sure the denoiser is of what it sees, as the library's own conditioners do not."""

    def condition(self, prediction, masked):
        self.seen = prediction.log_q.shape
        return Conditioned(prediction)

    def settings(self):
        return {}


def test_a_conditioner_of_ones_own_is_told_everything(generator, block):
    mine = Confidence()
    head = CoupledHead(compiled(), conditioners=[NoiseCalibration(V).double(), mine])
    coupled_loss(head, cached(random_prediction(generator), *block))
    assert mine.seen == (B, L, V)


def test_blocks_without_a_mask_are_certain(generator):
    tokens, nothing = torch.randint(V, (B, L), generator=generator), torch.zeros(B, L, dtype=torch.bool)
    dist = CoupledDistribution.of(compiled(), random_prediction(generator).only(nothing), tokens, nothing)
    torch.testing.assert_close(dist.log_prob(tokens), torch.zeros(B, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_what_is_said_of_other_positions_is_refused(generator, block):
    tokens, masked = block
    prediction = random_prediction(generator)
    with pytest.raises(ArgumentError, match="one of all masked positions, got one that lacks some"):
        CoupledDistribution.of(compiled(), prediction.only(masked & (torch.arange(L) > 0)), tokens, masked)
    with pytest.raises(ArgumentError, match="where: expected bool"):
        Prediction(log_q=prediction.log_q[:1], vocab_size=V, where=torch.ones(B, L, dtype=torch.bool))
    more = CoupledDistribution.of(compiled(), prediction.only(torch.ones_like(masked)), tokens, masked)
    expected = CoupledDistribution.of(compiled(), prediction, tokens, masked).log_prob(tokens)
    torch.testing.assert_close(more.log_prob(tokens), expected, **CLOSE)
    pc = compiled()
    pc.set_weights("emission0", torch.eye(V)[:, :1].expand(-1, N))
    dist = CoupledDistribution.of(pc, prediction.only(masked), tokens.clamp_min(1), masked)
    with pytest.raises(ImpossibleEvidenceError, match="rule out every text"):
        dist.log_prob(tokens.clamp_min(1))


def test_a_conditioner_that_reads_what_is_seen_refuses_masked_positions_alone(generator, block):
    tokens, masked = block
    head = CoupledHead(compiled(), conditioners=[Confidence()])
    with pytest.raises(ArgumentError, match="prediction: expected one of all positions, at which Confidence"):
        head.conditional_log_likelihood(random_prediction(generator).only(masked), tokens, masked)


def test_positions_that_do_not_fit_are_refused(generator, block):
    said, (_, masked) = random_prediction(generator), block
    for where in (masked[:2], masked.long(), masked[0], masked.tolist()):
        with pytest.raises(ArgumentError, match=r"where: expected bool \(3, 3\)"):
            said.only(where)
    with pytest.raises(ArgumentError, match="where: expected bool"):
        Prediction(log_q=said.log_q[:1], vocab_size=V, where=torch.ones(1, L))
    first = masked & (torch.arange(L) == 0)
    torch.testing.assert_close(said.only(masked).only(first).log_q, said.only(first).log_q, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="where: expected bool"):
        said.only(first).only(masked)


@pytest.mark.parametrize("masked_only", [False, True])
def test_the_circuit_alone_rules_out_what_a_cache_holds_as_zero(masked_only, generator, block):
    tokens, masked = block
    tokens = tokens.clamp(max=V - 2)
    logits = random_prediction(generator).log_q.index_fill(2, torch.tensor([V - 1]), -torch.inf)
    pc, live = compiled(), Prediction.from_logits(logits)
    q = (live.dense() > -torch.inf).double().numpy() / (V - 1)
    law = joints(pc, q, tokens, masked, "global").sum(2)  # (B, V ** L)
    kept = live.log_q.clamp_min(-6e4).half().numpy()
    batch = LogitCache(tokens.numpy(), masked.numpy(), kept, None, V, "made").batch(
        slice(None), masked_only=masked_only
    )
    dist = batch.distribution(CoupledHead(pc, conditioners=[CircuitAlone()]))
    found = dist.log_prob(texts(B)).exp().detach()
    torch.testing.assert_close(found, torch.from_numpy(law.T), **CLOSE)
