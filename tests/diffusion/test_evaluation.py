"""The gap table on a problem whose answer is known, and the few-step table."""

import json
import math

import numpy as np
import pytest
import torch

import circuits as ct
from diffusion import CircuitTraining, CoupledHead, DenoiserSpec, cache_logits, fit_coupled
from diffusion.errors import ArgumentError
from diffusion.evaluation.few_steps import few_step_quality
from diffusion.evaluation.gap import _masks, _summarise, misspecification_gap
from diffusion.evaluation.plots import draw_few_steps, draw_gap

L = 3
STICKY = torch.tensor([[0.95, 0.05], [0.05, 0.95]], dtype=torch.float64)
EMISSION = torch.tensor([[0.50, 0.46, 0.03, 0.01], [0.01, 0.03, 0.46, 0.50]], dtype=torch.float64)
TRUTH = ct.compile(
    ct.structures.hmm(L, 2, 4, initial=torch.tensor([0.6, 0.4]), transition=STICKY, emission=EMISSION),
    dtype=torch.float64,
)
"""The data's distribution over tokens 0..3; token 4 is the mask."""


class ExactDenoiser:
    """The true conditional marginals given the visible tokens: as good as a factorized prediction can be."""

    spec = DenoiserSpec(vocab_size=5, mask_id=4, eos_ids=(), pad_id=4, forbidden_ids=(4,), max_length=8)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        block = tokens[:, start:stop]
        marginals = ct.queries.marginals(TRUTH, ct.Evidence.observe(block.clamp(max=3), block != 4))
        logits = marginals.log().float().clamp_min(-50)
        return torch.cat([logits, torch.full_like(logits[..., :1], -50.0)], -1)


def blocks(count):
    return ct.queries.sample(TRUTH, count, generator=torch.Generator().manual_seed(0))


def uniform_head():
    leaves = [ct.inputs(i, 1, ct.Categorical(5), weights=torch.full((5, 1), 0.2)) for i in range(L)]
    return CoupledHead(ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed=0))


def entropy_per_token(log_probs):
    return -(log_probs.exp() * log_probs).sum() / L


def test_the_gap_of_an_exact_denoiser_is_the_total_correlation():
    data = blocks(4000)
    table = misspecification_gap(ExactDenoiser(), uniform_head(), data, mask_ratios=[1.0], batch_size=1000)
    (row,) = table.rows
    joint = ct.testing.enumerate_joint(TRUTH)
    singles = [torch.logsumexp(joint.movedim(i, 0).flatten(1), 1) for i in range(L)]
    factorized = math.exp(sum(float(entropy_per_token(single)) for single in singles))
    exact = math.exp(float(entropy_per_token(joint.flatten())))
    assert row.one_step.low < factorized < row.one_step.high
    assert row.sequential.low < exact < row.sequential.high
    assert row.num_masked == L
    assert row.coupled.value == pytest.approx(row.one_step.value, rel=1e-5)  # a uniform circuit adds nothing
    assert row.share_closed.value == pytest.approx(0.0, abs=1e-3)
    assert row.circuit_alone.value == pytest.approx(5.0)
    assert row.is_meaningful


def test_a_circuit_that_undoes_the_marginals_closes_the_gap(tmp_path):
    """With p(x) / prod_i p_i(x_i) as the circuit the product is the truth; an HMM fitted to the coupling gets near."""
    data = blocks(3000)
    head = CoupledHead(ct.compile(ct.structures.hmm(L, 4, 5, homogeneous=False), seed=0))
    cache = cache_logits(ExactDenoiser(), data, tmp_path, block_length=L, progress=False, batch_size=1000)
    fit_coupled(head, cache, config=CircuitTraining(steps=300, batch_size=512, learning_rate=0.1), progress=False)
    table = misspecification_gap(ExactDenoiser(), head, blocks(2000), mask_ratios=[1.0], batch_size=1000)
    assert table.rows[0].share_closed.value > 0.6


def test_a_weak_denoiser_is_flagged():
    class Clueless(ExactDenoiser):
        def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
            return torch.zeros(len(tokens), L, 5)

    table = misspecification_gap(Clueless(), CoupledHead(TRUTH_WITH_MASK), blocks(200), mask_ratios=[1.0])
    assert not table.rows[0].is_meaningful
    assert "not meaningful" in str(table)


class Uniform:
    """Four tokens, all equally probable whatever is visible: every perplexity is 4."""

    spec = DenoiserSpec(vocab_size=5, mask_id=4, eos_ids=(), pad_id=4, forbidden_ids=(4,), max_length=256)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return torch.zeros(len(tokens), window[1] - window[0], 5)


@pytest.mark.parametrize(("length", "ratio"), [(45, 0.7), (50, 0.59), (90, 0.35), (7, 0.5), (3, 0.01)])
def test_a_uniform_model_has_the_perplexity_of_its_tokens_and_no_gap(length, ratio):
    pc = ct.compile(ct.structures.fully_factorized(length, 5))
    for leaf in pc.circuit.inputs:
        pc.set_weights(leaf, torch.tensor([[0.25]] * 4 + [[0.0]]))
    data = torch.randint(4, (64, length), generator=torch.Generator().manual_seed(0))
    (row,) = misspecification_gap(Uniform(), CoupledHead(pc, 1.0), data, mask_ratios=[ratio], batch_size=24).rows
    for estimate in (row.one_step, row.circuit_alone, row.coupled, row.sequential):
        assert (estimate.low, estimate.value, estimate.high) == pytest.approx((4, 4, 4), rel=2e-6)
    assert row.one_step == row.sequential
    assert not row.is_meaningful


def gap_row(one_step, circuit_alone, coupled, sequential):
    """Return the row of such losses per window, in nats per masked token."""
    losses = {"one_step": one_step, "circuit_alone": circuit_alone, "coupled": coupled, "sequential": sequential}
    return _summarise(1.0, 4, {name: np.array(loss) for name, loss in losses.items()}, 1000, 0)


def test_equal_losses_up_to_rounding_or_chance_are_no_gap():
    rng = np.random.default_rng(0)
    loss = rng.gamma(2.0, size=100)
    noise = rng.normal(size=100)
    noise -= noise.mean()
    assert not gap_row(loss, loss, loss, loss).is_meaningful
    assert not gap_row(loss, loss, loss, loss - 1e-7).is_meaningful  # all of one sign, as rounding may be
    assert not gap_row(loss, loss, loss, loss + noise - 0.01).is_meaningful  # better on average, by chance
    assert not gap_row(loss, loss - 0.02, loss, loss - 0.01).is_meaningful  # the circuit alone is better
    assert gap_row(loss, loss, loss, loss + 0.01 * noise - 0.01).is_meaningful  # window by window, on nearly all


def test_an_impossible_token_is_not_a_gap_closed():
    finite, infinite = np.ones(8), np.full(8, np.inf)
    assert not gap_row(infinite, infinite, infinite, infinite).is_meaningful
    row = gap_row(infinite, infinite, infinite, finite)
    assert row.is_meaningful
    assert math.isnan(row.share_closed.value)


def test_the_table_does_not_depend_on_the_batch_size():
    head, data = CoupledHead(TRUTH_WITH_MASK), blocks(50)
    first, second = (
        misspecification_gap(ExactDenoiser(), head, data, mask_ratios=[0.7], batch_size=size).rows[0]
        for size in (7, 50)
    )
    for name in ("one_step", "circuit_alone", "coupled", "sequential", "share_closed"):
        values = [(e.value, e.low, e.high) for e in (getattr(first, name), getattr(second, name))]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_visible_token_that_may_not_be_generated_costs_nothing():
    """Token 4 is forbidden: that its probability is 0 must not matter where it is not asked for."""
    masked, _ = _masks(64, 4, 0.5, seed=0)
    data = torch.randint(4, (64, 4), generator=torch.Generator().manual_seed(0)).masked_fill(~masked, 4)
    head = CoupledHead(ct.compile(ct.structures.fully_factorized(4, 5), seed=0))
    (row,) = misspecification_gap(Uniform(), head, data, mask_ratios=[0.5], seed=0).rows
    assert row.one_step.value == row.sequential.value == pytest.approx(4.0)


def with_a_mask_token():
    """TRUTH over five tokens, the last of them impossible."""
    new = {}
    for node in TRUTH.circuit.nodes:
        children = [new[child] for child in node.children]
        if isinstance(node, ct.Input):
            weights = torch.nn.functional.pad(TRUTH.log_weights(node).detach().exp(), (0, 0, 0, 1))
            new[node] = ct.inputs(node.var, node.num_units, ct.Categorical(5), weights=weights)
        elif isinstance(node, ct.Product):
            new[node] = ct.product(*children)
        else:
            new[node] = ct.sum(*children, num_units=node.num_units, weights=TRUTH.log_weights(node).detach().exp())
    return ct.compile(ct.Circuit(new[TRUTH.circuit.root]), dtype=torch.float64)


TRUTH_WITH_MASK = with_a_mask_token()


def test_masks_are_the_same_for_all_models_and_seeds_repeat():
    first, second, other = (
        misspecification_gap(ExactDenoiser(), CoupledHead(TRUTH_WITH_MASK), blocks(64), mask_ratios=[0.5], seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first.rows[0].one_step != other.rows[0].one_step
    alone = first.rows[0].circuit_alone.value  # the true circuit's conditional is the sequential optimum
    assert alone == pytest.approx(first.rows[0].sequential.value, rel=1e-4)


def test_tables_are_saved_and_drawn(tmp_path):
    head = CoupledHead(TRUTH_WITH_MASK, activation_threshold=1.0)
    table = misspecification_gap(ExactDenoiser(), head, blocks(64), mask_ratios=[0.5, 1.0])
    table.save(tmp_path / "gap.json")
    assert json.loads((tmp_path / "gap.json").read_text())["num_windows"] == 64
    draw_gap(table, tmp_path / "gap.png")
    prompts = torch.zeros(40, 1, dtype=torch.int64)
    few = few_step_quality(
        ExactDenoiser(), head, prompts, lambda prompt, text: bool(text[0] == text[1]), criterion="pairs", steps=(1, 3)
    )
    assert [row.num_steps for row in few.rows] == [1, 3]
    assert all(0 <= row.without.low <= row.without.value <= row.without.high <= 1 for row in few.rows)
    draw_few_steps(few, tmp_path / "few.png")
    for name in ("gap.png", "few.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change", [{"mask_ratios": [0.0]}, {"mask_ratios": []}, {"data": torch.zeros(5, 2).long()}])
def test_wrong_arguments_are_named(change):
    arguments = {"data": blocks(8), "mask_ratios": [1.0], **change}
    with pytest.raises(ArgumentError, match=next(iter(change))):
        misspecification_gap(ExactDenoiser(), uniform_head(), **arguments)
