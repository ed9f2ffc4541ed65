"""Explanations at a temperature follow the power of their joint distribution; rows of random numbers are their own."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from query_cases import compiled_with_evidence

import circuits as ct

pytestmark = pytest.mark.usefixtures("one_thread")


def tempered_law(pc, factors, temperature):
    """Return ``sum_z (p(x, z) prod_i e_i(x_i))^(1 / tau)``, normalised, of every x of a chain: (C,) * L."""
    length, num_values = factors.shape
    initial, transition = (pc.log_weights(pc.circuit.node(name)).detach() for name in ("initial", "transition0"))
    emission = pc.log_weights(pc.circuit.node("emission0")).detach().t()
    law = torch.zeros((num_values,) * length, dtype=torch.float64)
    for states in itertools.product(range(len(transition)), repeat=length):
        log_weight = initial[0, states[0]] + sum(transition[pair] for pair in itertools.pairwise(states))
        columns = emission[list(states)] + factors
        table = sum(column.reshape([-1 if i == j else 1 for j in range(length)]) for i, column in enumerate(columns))
        law += ((table + log_weight) / temperature).exp()
    return law / law.sum()


@pytest.fixture
def case():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=0)
    return pc, torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("by_row", [False, True])
def test_samples_follow_the_tempered_law(case, temperature, by_row):
    pc, factors = case
    generator = ct.RowGenerators(torch.tensor([5])) if by_row else torch.Generator().manual_seed(0)
    evidence = ct.Evidence.soft(factors.unsqueeze(0))
    draws = ct.queries.sample(pc, 20_000, evidence, generator, temperature=temperature)[:, 0]
    law = tempered_law(pc, factors, temperature).flatten()
    counts = (draws @ torch.tensor([9, 3, 1])).bincount(minlength=27).double()
    is_common = law * len(draws) >= 5
    statistic = ((counts - law * len(draws)).square() / (law * len(draws)))[is_common].sum()
    assert float(statistic) < 60  # 26 degrees of freedom at most: exceeded once in 5,000 draws of a right law


@settings(max_examples=30)
@given(compiled_with_evidence(), st.integers(0, 99))
def test_towards_zero_the_best_explanation_is_drawn(drawn, seed):
    pc, evidence = drawn
    if bool((pc.log_partition(evidence) == -torch.inf).any()):
        return
    best = ct.queries.sample(pc, 1, evidence, temperature=0)
    cold = ct.queries.sample(pc, 2, evidence, torch.Generator().manual_seed(seed), temperature=1e-6)
    known = ~evidence.says_nothing(pc.num_categories)
    scores = [pc.log_partition(ct.Evidence.where(known, ct.Evidence.observe(x), evidence)) for x in (best[0], *cold)]
    if len(torch.unique(torch.stack(scores), dim=0)) == 1:  # else several explanations are the best
        assert all(torch.equal(x[known], best[0][known]) for x in cold)


def test_missing_variables_do_not_move_what_is_drawn_at_a_temperature():
    short, long = (ct.compile(ct.structures.hmm(n, 3, 4), seed=0, dtype=torch.float64) for n in (4, 9))
    factors = torch.randn(5, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    missing = (torch.arange(9) >= 4).expand(5, 9)
    padded = ct.Evidence.soft(factors).without(missing)
    for temperature in (0.0, 0.4):
        seeds = ct.RowGenerators(torch.arange(5))
        one = ct.queries.sample(short, 2000, ct.Evidence.soft(factors[:, :4]), seeds, temperature=temperature)
        other = ct.queries.sample(long, 2000, padded, seeds, temperature=temperature)[..., :4]
        shares = [(draws == value).double().mean((0, 1)) for draws in (one, other) for value in range(4)]
        for mine, its in zip(shares[:4], shares[4:], strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0.0 if temperature == 0 else 0.06)


@settings(max_examples=40)
@given(compiled_with_evidence(batch_size=3), st.sampled_from([0.5, 1.0]))
def test_a_row_is_drawn_alike_whoever_is_in_its_batch(drawn, temperature):
    pc, evidence = drawn
    if bool((pc.log_partition(evidence) == -torch.inf).any()):
        return
    seeds = torch.tensor([3, 1, 4])
    together = ct.queries.sample(pc, 2, evidence, ct.RowGenerators(seeds), temperature=temperature)
    for row in range(3):
        alone = evidence.rows(torch.tensor([row]))
        found = ct.queries.sample(pc, 2, alone, ct.RowGenerators(seeds[row : row + 1]), temperature=temperature)
        assert torch.equal(found[:, 0], together[:, row])


def test_uniform_numbers_are_uniform_and_independent_of_each_other():
    numbers = ct.RowGenerators(torch.arange(2000)).uniform(50)
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=0.002)
    correlations = torch.corrcoef(numbers.t()) - torch.eye(50, dtype=torch.float64)
    assert float(correlations.abs().max()) < 0.12
    assert len(torch.unique(numbers)) == numbers.numel()


@pytest.mark.parametrize("seeds", [torch.arange(2), torch.arange(3.0), torch.zeros(3, 1, dtype=torch.int64), [1, 2, 3]])
def test_seeds_are_one_integer_per_query(seeds):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    with pytest.raises(ct.ArgumentError, match="seeds"):
        ct.queries.sample(pc, 1, ct.Evidence.nothing(3, 3), ct.RowGenerators(seeds))
