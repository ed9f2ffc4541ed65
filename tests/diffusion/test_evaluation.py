"""The gap table on a problem whose answer is known, and the few-step table."""

import json
import math

import pytest
import torch

import circuits as ct
from diffusion import CircuitTraining, CoupledHead, DenoiserSpec, cache_logits, fit_coupled
from diffusion.errors import ArgumentError
from diffusion.evaluation.few_steps import few_step_quality
from diffusion.evaluation.gap import misspecification_gap
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
