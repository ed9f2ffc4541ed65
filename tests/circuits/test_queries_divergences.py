"""Inner products and divergences equal enumeration, on random pairs of compatible circuits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import RELATIVE, evidence_scores

import circuits as ct


def one_hot(count, value):
    return torch.eye(count).double()[:, [value]]


class Filler:
    """Fills one random partition tree with units, in different ways at every call."""

    def __init__(self, draw, num_vars, deterministic):
        self.draw, self.deterministic = draw, deterministic
        self.categories = [draw(st.integers(1, 3)) for _ in range(num_vars)]
        self.tree = self.partition(tuple(range(num_vars)))

    def partition(self, scope):
        if len(scope) == 1:
            return scope[0]
        order = self.draw(st.permutations(scope))
        cut = self.draw(st.integers(1, len(scope) - 1))
        return self.partition(tuple(order[:cut])), self.partition(tuple(order[cut:]))

    def first_variable(self, tree):
        return tree if isinstance(tree, int) else self.first_variable(tree[0])

    def fill(self, tree, num_units, fixed=None):
        """Build units over ``tree``; where deterministic, its first variable has the value ``fixed`` unless None."""
        if isinstance(tree, int):
            count = self.categories[tree]
            weights = None if fixed is None else one_hot(count, fixed).expand(-1, num_units)
            return ct.inputs(tree, num_units, ct.Categorical(count), weights=weights)
        if self.deterministic:
            count = self.categories[self.first_variable(tree)]
            branches = range(count) if fixed is None and self.draw(st.booleans()) else [fixed]
            units = [self.product(tree, num_units if b is None else 1, b) for b in branches]
            if len(units) == 1 and units[0].num_units == num_units:
                return units[0]
            return ct.sum(*units, num_units=num_units)
        parts = [self.product(tree, self.draw(st.integers(1, 3))) for _ in range(self.draw(st.integers(1, 2)))]
        return ct.sum(*parts, num_units=num_units)

    def product(self, tree, num_units, fixed=None):
        left, right = tree
        if not self.deterministic and self.draw(st.booleans()):
            counts = [self.draw(st.integers(1, 2)) for _ in range(2)]
            return ct.product(self.fill(left, counts[0]), self.fill(right, counts[1]), mode="outer")
        return ct.product(self.fill(left, num_units, fixed), self.fill(right, num_units))


@st.composite
def compatible_pairs(draw, p_is_deterministic=False, q_is_deterministic=False, max_vars=4):
    filler = Filler(draw, draw(st.integers(1, max_vars)), False)
    pcs = []
    for deterministic in (p_is_deterministic, q_is_deterministic):
        filler.deterministic = deterministic
        if draw(st.integers(0, 3)) == 3:
            circuit = ct.structures.mixture(len(filler.categories), filler.categories, 1 if deterministic else 2)
        else:
            circuit = ct.Circuit(filler.fill(filler.tree, 1))
        pcs.append(ct.compile(circuit, dtype=torch.float64, seed=draw(st.integers(0, 1000))))
    return *pcs, draw(ct.testing.evidence(pcs[0].circuit))


def log_posteriors(p, q, evidence):
    """Return log p(x | e), log q(x | e), each (B, A), or None where the evidence is impossible."""
    scores = evidence_scores(p.circuit, evidence)
    tables = [ct.testing.enumerate_joint(pc).flatten() + scores for pc in (p, q)]
    if any(bool((torch.logsumexp(table, 1) == -torch.inf).any()) for table in tables):
        return None
    return [torch.log_softmax(table, 1) for table in tables]


def expected_log(weights, log_values):
    """Return sum_x weights log_values, with 0 log 0 = 0."""
    return torch.where(weights > 0, weights * log_values.masked_fill(weights == 0, 0.0), 0.0).sum(1)


@given(compatible_pairs())
def test_inner_products_of_compatible_circuits(case):
    p, q, evidence = case
    assert ct.properties.compatible(p.circuit, q.circuit)
    tables = [ct.testing.enumerate_joint(pc).flatten() for pc in (p, q)]
    expected = torch.logsumexp(sum(tables) + evidence_scores(p.circuit, evidence), 1)
    torch.testing.assert_close(ct.queries.log_inner_product(p, q, evidence), expected, **RELATIVE)
    torch.testing.assert_close(ct.queries.log_inner_product(q, p, evidence), expected, **RELATIVE)
    logs = log_posteriors(p, q, evidence)
    if logs is None:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.cauchy_schwarz_divergence(p, q, evidence)
        return
    inner = [torch.logsumexp(a + b, 1) for a, b in ((logs[0], logs[1]), (logs[0], logs[0]), (logs[1], logs[1]))]
    divergence = ct.queries.cauchy_schwarz_divergence(p, q, evidence)
    torch.testing.assert_close(divergence, 0.5 * (inner[1] + inner[2]) - inner[0], rtol=1e-9, atol=1e-9)


@given(compatible_pairs(q_is_deterministic=True), st.sampled_from([2, 3]))
def test_cross_entropy_and_renyi_of_a_deterministic_second_circuit(case, alpha):
    p, q, evidence = case
    assert ct.properties.is_deterministic(q)
    logs = log_posteriors(p, q, evidence)
    if logs is None:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.cross_entropy(p, q, evidence)
        return
    torch.testing.assert_close(
        ct.queries.cross_entropy(p, q, evidence), -expected_log(logs[0].exp(), logs[1]), rtol=1e-9, atol=1e-9
    )
    terms = torch.where(logs[0] > -torch.inf, alpha * logs[0] + (1 - alpha) * logs[1], -torch.inf)
    expected = torch.logsumexp(terms, 1) / (alpha - 1)
    torch.testing.assert_close(ct.queries.renyi_divergence(p, q, alpha, evidence), expected, rtol=1e-9, atol=1e-9)


@given(compatible_pairs(p_is_deterministic=True, q_is_deterministic=True), st.sampled_from([0.5, 1.5, 2]))
def test_divergences_of_deterministic_circuits(case, alpha):
    p, q, evidence = case
    logs = log_posteriors(p, q, evidence)
    if logs is None:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.kl_divergence(p, q, evidence)
        return
    difference = (logs[0] - logs[1]).masked_fill(logs[0] == -torch.inf, 0.0)
    kl = ct.queries.kl_divergence(p, q, evidence)
    torch.testing.assert_close(kl, expected_log(logs[0].exp(), difference), rtol=1e-9, atol=1e-9)
    possible = (logs[0] > -torch.inf) & ((logs[1] > -torch.inf) | torch.tensor(alpha > 1))
    terms = torch.where(possible, alpha * logs[0] + (1 - alpha) * logs[1], -torch.inf)
    torch.testing.assert_close(
        ct.queries.renyi_divergence(p, q, alpha, evidence),
        torch.logsumexp(terms, 1) / (alpha - 1),
        rtol=1e-9,
        atol=1e-9,
    )


def test_divergences_are_infinite_outside_of_the_support():
    p = ct.compile(ct.structures.fully_factorized(2, 2), dtype=torch.float64, seed=0)
    leaves = [ct.inputs(0, 1, ct.Categorical(2), weights=one_hot(2, 0)), ct.inputs(1, 1, ct.Categorical(2))]
    q = ct.compile(ct.Circuit(ct.product(*leaves)), dtype=torch.float64, seed=1)
    for divergence in (ct.queries.cross_entropy, ct.queries.kl_divergence):
        assert divergence(p, q).item() == torch.inf
        assert divergence(q, p).isfinite()
    assert ct.queries.renyi_divergence(p, q, 2).item() == torch.inf
    assert ct.queries.renyi_divergence(p, q, 0.5).isfinite()


def chain_pair():
    p = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
    return p, ct.compile(ct.structures.hmm(4, 2, 3), dtype=torch.float64, seed=1)


def test_long_chains_and_different_numbers_of_units():
    p, q = (ct.compile(ct.structures.hmm(400, k, 3), dtype=torch.float64, seed=k) for k in (2, 3))
    inner = ct.queries.log_inner_product(p, q)
    assert inner.isfinite()
    assert inner < -370
    assert ct.queries.cauchy_schwarz_divergence(p, p).abs() < 1e-9


def test_gradients_of_inner_products():
    for query in (ct.queries.log_inner_product, ct.queries.cauchy_schwarz_divergence):
        p, q = chain_pair()
        banks = [*p.bank.values(), *q.bank.values()]
        grads = torch.autograd.grad(query(p, q).sum(), banks)
        with torch.no_grad():
            for bank, grad in zip(banks, grads, strict=True):
                old, step = bank[0, 0, 0].item(), 1e-6
                values = []
                for sign in (1, -1):
                    bank[0, 0, 0] = old + sign * step
                    values.append(query(p, q).item())
                bank[0, 0, 0] = old
                slope = (values[0] - values[1]) / (2 * step)
                torch.testing.assert_close(grad[0, 0, 0].item(), slope, rtol=1e-5, atol=1e-8)


def test_gradients_of_divergences(generator):
    p, q = (ct.compile(ct.structures.fully_factorized(2, 3), dtype=torch.float64, seed=s) for s in (0, 1))
    factors = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    for query in (
        ct.queries.kl_divergence,
        ct.queries.cross_entropy,
        lambda *a: ct.queries.renyi_divergence(*a[:2], 2, a[2]),
    ):
        assert torch.autograd.gradcheck(lambda f, query=query: query(p, q, ct.Evidence.soft(f)), factors, atol=1e-6)
        grads = torch.autograd.grad(query(p, q, ct.Evidence.soft(factors)).sum(), [*p.parameters(), *q.parameters()])
        assert all(grad.isfinite().all() for grad in grads)


def crossing(first, second):
    def block(variables):
        leaves = [ct.inputs(v, 1, ct.Bernoulli()) for v in variables]
        return ct.sum(ct.product(*leaves), num_units=1)

    return ct.Circuit(ct.product(block(first), block(second), name=f"{first}|{second}"))


def test_missing_properties_are_named_with_their_nodes():
    p, q = (ct.compile(c, seed=0) for c in (crossing((0, 1), (2, 3)), crossing((0, 2), (1, 3))))
    for query in (ct.queries.log_inner_product, ct.queries.cauchy_schwarz_divergence):
        with pytest.raises(ct.PropertyError, match=r"compatible.*\[0, 1\] \| \[2, 3\] and \[0, 2\] \| \[1, 3\]"):
            query(p, q)
    h, other = chain_pair()
    for query in (
        ct.queries.cross_entropy,
        ct.queries.kl_divergence,
        lambda a, b: ct.queries.renyi_divergence(a, b, 2),
    ):
        with pytest.raises(ct.PropertyError, match=r"deterministic circuit, .*Sum\(num_units=2, scope=\{3\}"):
            query(h if query is not ct.queries.kl_divergence else other, other)
    with pytest.raises(ct.PropertyError, match="categories"):
        ct.queries.log_inner_product(p, other)
    with pytest.raises(ct.ArgumentError, match="alpha: expected a positive number other than 1"):
        ct.queries.renyi_divergence(h, other, 1)
    with pytest.raises(ct.ArgumentError, match="q: expected the dtype"):
        ct.queries.log_inner_product(h, ct.compile(other.circuit, seed=0))


def test_float32_rounding_is_not_taken_for_mass_outside_of_the_support(generator):
    p, q = (ct.compile(ct.structures.fully_factorized(200, 5), seed=s) for s in (0, 1))
    evidence = ct.Evidence.soft(5 * torch.randn(8, 200, 5, generator=generator))
    single = ct.queries.kl_divergence(p, q, evidence)
    double = ct.queries.kl_divergence(p.double(), q.double(), evidence)
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode", ["outer", "elementwise"])
def test_finer_products_meet_coarser_ones(mode):
    leaves = [ct.inputs(v, 2, ct.Categorical(3)) for v in range(4)]
    flat = ct.Circuit(ct.sum(ct.product(*leaves, mode=mode), num_units=1))
    inner = ct.sum(ct.product(*(ct.inputs(v, 3, ct.Categorical(3)) for v in (3, 1, 2))), num_units=2)
    nested = ct.Circuit(ct.sum(ct.product(inner, ct.inputs(0, 2, ct.Categorical(3)), mode=mode), num_units=1))
    p, q = (ct.compile(circuit, dtype=torch.float64, seed=0) for circuit in (flat, nested))
    expected = torch.logsumexp((ct.testing.enumerate_joint(p) + ct.testing.enumerate_joint(q)).flatten(), 0)
    for first, second in ((p, q), (q, p)):
        torch.testing.assert_close(ct.queries.log_inner_product(first, second)[0], expected, **RELATIVE)
