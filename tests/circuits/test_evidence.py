"""Kinds of evidence: what each says of every value, joined in any order, and where it says nothing at all."""

import math

import pytest
import torch
from torch import Tensor

import circuits as ct
from circuits.evidence import Dense, Indexed, Listed

DOUBLE, INF = torch.float64, torch.inf


def _column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DOUBLE).unsqueeze(1)


def _poisson_mixture() -> tuple[ct.CompiledCircuit, list[float], list[float]]:
    """Return two components over one count, with their shares and rates."""
    shares, rates = [0.3, 0.7], [0.5, 4.0]
    leaf = ct.inputs(0, 2, ct.Poisson(), weights=torch.tensor([rates]))
    root = ct.sum(leaf, num_units=1, weights=torch.tensor([shares]))
    return ct.compile(ct.Circuit(root), dtype=DOUBLE), shares, rates


def test_bounds_below_every_count_say_nothing() -> None:
    """Counts begin at 0: ``v > -1`` is no knowledge, ``v > 0`` is."""
    pc, shares, rates = _poisson_mixture()
    evidence = ct.Evidence.interval(_column(-INF, -1, -0.5, 0, -1), _column(INF, INF, INF, INF, 3))
    assert evidence.says_nothing(pc.num_categories).flatten().tolist() == [True, True, True, False, False]
    up_to_3 = [sum(math.exp(-r) * r**v / math.factorial(v) for v in range(4)) for r in rates]
    above_0 = [1 - math.exp(-r) for r in rates]
    expected = [1, 1, 1, *(sum(w * p for w, p in zip(shares, part, strict=True)) for part in (above_0, up_to_3))]
    torch.testing.assert_close(pc(evidence), torch.tensor(expected, dtype=DOUBLE).log())


def test_bounds_that_cut_nothing_count_no_flow() -> None:
    """Explanations are those of a missing variable, and nothing is learnt from it."""
    pc, _, _ = _poisson_mixture()
    free, missing = ct.Evidence.interval(_column(-1), _column(INF)), ct.Evidence.nothing(1, 1)
    assert ct.queries.mpe(pc, free).log_score.item() == ct.queries.mpe(pc, missing).log_score.item()
    for evidence in (free, missing):
        flows = ct.learning.expected_flows(pc, evidence)
        assert all(float(flow.abs().sum()) == 0 for flow in flows.flows.values())


@pytest.mark.parametrize(
    ("family", "lower", "upper", "silent"),
    [
        (ct.Gaussian(), -1.0, INF, False),
        (ct.Gaussian(), -INF, INF, True),
        (ct.Categorical(3), -1.0, 2.0, True),
        (ct.Categorical(3), -0.1, INF, True),
        (ct.Categorical(3), -1.0, 1.9, False),
        (ct.Categorical(3), 0.0, INF, False),
    ],
)
def test_where_bounds_hold_all_values(family: ct.Distribution, lower: float, upper: float, silent: bool) -> None:
    pc = ct.compile(ct.Circuit(ct.sum(ct.inputs(0, 2, family), num_units=1)), seed=0, dtype=DOUBLE)
    evidence = ct.Evidence.interval(_column(lower), _column(upper))
    assert evidence.says_nothing(pc.num_categories).item() is silent
    assert (pc(evidence).item() > -1e-12) is silent


def _parts() -> dict[str, tuple[ct.Evidence, Tensor]]:
    """Return evidence of every kind on two queries over three variables of 4 values, and its factors written out."""
    generator = torch.Generator().manual_seed(0)
    v = torch.arange(4, dtype=DOUBLE)
    factors = torch.randn(2, 3, 4, generator=generator, dtype=DOUBLE)
    x = torch.tensor([[0, 1, 2], [3, 3, 0]])
    hard = torch.full((2, 3, 4), -INF, dtype=DOUBLE).scatter(2, x.unsqueeze(2), 0.0)
    mean, std = (
        torch.randn(2, 3, generator=generator, dtype=DOUBLE),
        torch.tensor([[1.0, 2, 3]], dtype=DOUBLE).expand(2, 3),
    )
    density = torch.distributions.Normal(mean.unsqueeze(2), std.unsqueeze(2)).log_prob(v)
    listed = torch.stack([x, (x + 1) % 4], 2)
    few = torch.full((2, 3, 4), -INF, dtype=DOUBLE).scatter(2, listed, factors[..., :2])
    rows = torch.tensor([[~2, 1, ~0], [3, ~0, ~1]])  # a value v, or ~j for row j
    by_row, by_list = (
        torch.where((rows < 0).unsqueeze(2), table[0][(~rows).clamp_min(0)], rows.unsqueeze(2).eq(v).log().double())
        for table in (factors, few)
    )
    lower = x.double() - 1
    between = torch.where((v > lower.unsqueeze(2)) & (v <= lower.unsqueeze(2) + 2), 0.0, -INF).double()
    return {
        "hard": (ct.Evidence.observe(x), hard),
        "real": (ct.Evidence.observe(x.double()), hard),
        "dense": (ct.Evidence.soft(factors), factors),
        "listed": (ct.Evidence.sparse(listed, factors[..., :2]), few),
        "rows": (ct.Evidence(Indexed(rows, Dense(factors[:1]))), by_row),
        "lists": (ct.Evidence(Indexed(rows, Listed(listed[:1], factors[:1, :, :2]))), by_list),
        "interval": (ct.Evidence.interval(lower, lower + 2), between),
        "normal": (ct.Evidence.gaussian(mean, std), density),
        "nothing": (ct.Evidence.nothing(2, 3), torch.zeros(2, 3, 4, dtype=DOUBLE)),
    }


@pytest.mark.parametrize("first", list(_parts()))
@pytest.mark.parametrize("second", list(_parts()))
def test_kinds_joined_twice_are_their_factors_joined(first: str, second: str) -> None:
    """Dense factors, single factors, code and log Z of ``where(a, one, where(b, other, one))`` with a part left out."""
    (one, f), (other, g) = _parts()[first], _parts()[second]
    a = torch.tensor([[True, False, False], [False, True, False]])
    b = torch.tensor([[False, True, False], [True, False, True]])
    c = torch.tensor([[False, False, True], [False, True, False]])
    joined = ct.Evidence.where(a, one, ct.Evidence.where(b, other, one)).without(c)
    a, b, c = (mask.unsqueeze(2) for mask in (a, b, c))
    expected = torch.where(c, 0.0, torch.where(a, f, torch.where(b, g, f)))
    torch.testing.assert_close(joined.dense(4, DOUBLE), expected)
    x = torch.tensor([[[0, 1, 2], [3, 0, 1]], [[1, 1, 3], [2, 3, 0]]])  # (S, B, D)
    torch.testing.assert_close(
        joined.factors.at(x, DOUBLE), expected.expand(2, -1, -1, -1).gather(3, x[..., None])[..., 0]
    )
    rebuilt = eval(repr(joined), {"ct": ct, "torch": torch})
    assert torch.equal(rebuilt.dense(4, DOUBLE), joined.dense(4, DOUBLE))
    pc = ct.compile(ct.structures.hmm(3, 2, 4), seed=0, dtype=DOUBLE)
    torch.testing.assert_close(pc(joined), pc(ct.Evidence.soft(expected)))
    assert joined.missing is None or bool((joined.missing <= (expected == 0).all(2)).all())


def test_evidence_does_not_change_with_the_mask_it_was_made_of() -> None:
    """A decoder that writes into its mask afterwards changes no evidence."""
    x, observed = torch.tensor([[1, 2]]), torch.tensor([[True, False]])
    hard = ct.Evidence.observe(x, observed)
    both = ct.Evidence.where(observed, ct.Evidence.observe(x), ct.Evidence.nothing(1, 2))
    before = [evidence.dense(3) for evidence in (hard, both)]
    observed.fill_(True)
    assert all(torch.equal(evidence.dense(3), dense) for evidence, dense in zip((hard, both), before, strict=True))


_NO_LISTS = torch.zeros(1, 0, 2)


@pytest.mark.parametrize("rows", [Dense(torch.zeros(1, 0, 4)), Listed(_NO_LISTS.long(), _NO_LISTS)])
def test_values_that_are_all_observed_need_no_rows(rows: Dense | Listed) -> None:
    pc, x = ct.compile(ct.structures.hmm(3, 2, 4), seed=0, dtype=DOUBLE), torch.tensor([[0, 1, 2], [3, 3, 0]])
    evidence = ct.Evidence(Indexed(x, rows))
    torch.testing.assert_close(pc(evidence), pc(x))
    torch.testing.assert_close(evidence.dense(4), ct.Evidence.observe(x).dense(4))
    torch.testing.assert_close(pc(evidence.without(x == 0)), pc(ct.Evidence.observe(x, x != 0)))


def test_rows_that_do_not_exist_are_refused() -> None:
    pc = ct.compile(ct.structures.hmm(3, 2, 4, homogeneous=False), seed=0)
    with pytest.raises(ct.ArgumentError, match="2 rows j, got -3"):
        pc(ct.Evidence(Indexed(torch.tensor([[~0, ~1, ~2]]), Dense(torch.randn(1, 2, 4)))))
