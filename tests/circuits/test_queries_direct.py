"""Queries on circuits with Gaussian and Poisson variables equal sums and integrals over them."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct

CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def mixture(seed=0, zero=False):
    """Gaussian, Poisson, categorical: x0 | z, x1 | z, x2 | z, with units that share no parameters."""
    families = [ct.Gaussian(), ct.Poisson(), ct.Categorical(3)]
    leaves = [ct.inputs(var, 2, family) for var, family in enumerate(families)]
    components = ct.product(*leaves)
    other = ct.product(
        ct.sum(ct.inputs(0, 2, ct.Gaussian()), num_units=1), *(ct.inputs(v, 1, families[v]) for v in (1, 2))
    )
    weights = torch.tensor([[0.0, 0.7, 0.3]]) if zero else None
    return ct.compile(
        ct.Circuit(ct.sum(components, other, num_units=1, weights=weights)), dtype=torch.float64, seed=seed
    )


def grid():
    """Return all values that matter and the logarithm of their volume: the trapezoid rule is exact to 1e-12 here."""
    real = torch.linspace(-14, 14, 701, dtype=torch.float64)
    count = torch.arange(50, dtype=torch.float64)
    return torch.cartesian_prod(real, count, torch.arange(3).double()), math.log(0.04)


EVIDENCE = {
    "nothing": ct.Evidence.nothing(1, 3),
    "hard": ct.Evidence.observe(torch.tensor([[torch.nan, 2.0, 1.0]], dtype=torch.float64)),
    "count": ct.Evidence.observe(torch.tensor([[torch.nan, 4.0, torch.nan]], dtype=torch.float64)),
    "gaussian": ct.Evidence.where(
        torch.tensor([True, False, False]),
        ct.Evidence.gaussian(torch.full((1, 3), 0.75), torch.full((1, 3), 0.5)),
        ct.Evidence.soft(torch.tensor([[[0.0, 0, 0, 0], [0.2, 0.5, -torch.inf, 1.0], [0.0, -1.0, 0.3, 0.0]]])),
    ),
    "interval of counts": ct.Evidence.where(
        torch.tensor([False, True, True]),
        ct.Evidence.interval(torch.tensor([[0.0, 1.5, -0.5]]).double(), torch.tensor([[0.0, 6.0, 1.0]]).double()),
        ct.Evidence.nothing(1, 3),
    ),
}


def log_factors(name, x):
    """Return sum_i log e_i(x_i) by hand, (N,)."""
    real, count, category = x.t()
    out = torch.zeros(len(x), dtype=torch.float64)
    if name == "hard":
        out = torch.where((count == 2) & (category == 1), out, -torch.inf)
    elif name == "count":
        out = torch.where(count == 4, out, -torch.inf)
    elif name == "gaussian":
        out = torch.distributions.Normal(0.75, 0.5).log_prob(real)
        of_count = torch.tensor([0.2, 0.5, -torch.inf, 1.0])[count.long().clamp(max=3)].masked_fill(
            count > 3, -torch.inf
        )
        out = out + of_count + torch.tensor([0.0, -1.0, 0.3])[category.long()]
    elif name == "interval of counts":
        out = torch.where((count > 1.5) & (count <= 6) & (category <= 1), out, -torch.inf)
    return out


@pytest.mark.parametrize("name", EVIDENCE)
@pytest.mark.parametrize("seed", [0, 1])
def test_moments_are_integrals(name, seed):
    pc, evidence = mixture(seed, zero=seed == 1), EVIDENCE[name]
    x, log_volume = grid()
    with torch.no_grad():
        log_p = pc(x) + log_factors(name, x)
        log_z = torch.logsumexp(log_p, 0) + log_volume
        torch.testing.assert_close(pc.log_partition(evidence)[0].double(), log_z, rtol=1e-6, atol=1e-6)
        p = torch.softmax(log_p, 0)
    mean = p @ x
    centred = x - mean
    torch.testing.assert_close(ct.queries.mean(pc, evidence)[0], mean, **CLOSE)
    torch.testing.assert_close(ct.queries.variance(pc, evidence)[0], p @ centred**2, **CLOSE)
    torch.testing.assert_close(
        ct.queries.covariance(pc, evidence)[0], centred.t() @ (p.unsqueeze(1) * centred), **CLOSE
    )
    for order in (3, 4):
        torch.testing.assert_close(ct.queries.moments(pc, order, evidence)[0], p @ x**order, rtol=1e-7, atol=1e-7)
        central = ct.queries.moments(pc, order, evidence, about="mean")[0]
        torch.testing.assert_close(central, p @ centred**order, rtol=1e-7, atol=1e-7)


def test_hard_evidence_has_no_variance():
    x = torch.tensor([[1.3, 4.0, 2.0]], dtype=torch.float64)
    pc, evidence = mixture(), ct.Evidence.observe(x)
    torch.testing.assert_close(ct.queries.mean(pc, evidence), x, **CLOSE)
    torch.testing.assert_close(ct.queries.covariance(pc, evidence), torch.zeros(1, 3, 3, dtype=torch.float64), **CLOSE)


def test_truncated_normal_moments():
    pc = ct.compile(ct.Circuit(ct.inputs(0, 1, ct.Gaussian())), dtype=torch.float64, seed=0)
    pc.set_weights(pc.circuit.root, torch.tensor([[1.0], [2.0]]))
    lower, upper = torch.tensor([[0.5], [3.0], [-1.0]]).double(), torch.tensor([[2.5], [torch.inf], [0.0]]).double()
    evidence = ct.Evidence.interval(lower, upper)
    a, b = (lower - 1) / 2, (upper - 1) / 2
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    mass = normal.cdf(b) - normal.cdf(a)
    first, last = normal.log_prob(a).exp(), normal.log_prob(b).exp()
    shift = (first - last) / mass
    weighted = (a * first - torch.where(b < torch.inf, b, 0.0) * last) / mass
    torch.testing.assert_close(ct.queries.mean(pc, evidence), 1 + 2 * shift, **CLOSE)
    torch.testing.assert_close(ct.queries.variance(pc, evidence), 4 * (1 + weighted - shift**2), **CLOSE)
    torch.testing.assert_close(ct.queries.covariance(pc, evidence)[..., 0], 4 * (1 + weighted - shift**2), **CLOSE)


def test_a_large_mean_hides_no_variance_in_float32():
    pc = ct.compile(ct.Circuit(ct.sum(ct.inputs(0, 2, ct.Gaussian()), num_units=1)), seed=0)
    pc.set_weights(pc.circuit.inputs[0], torch.tensor([[20000.0, 20002.0], [1.0, 1.0]]))
    pc.set_weights(pc.circuit.root, torch.tensor([[0.5, 0.5]]))
    for found in (ct.queries.variance(pc), ct.queries.covariance(pc)[..., 0]):
        torch.testing.assert_close(found, torch.tensor([[2.0]]), rtol=1e-3, atol=1e-3)


def test_moments_have_gradients():
    leaves = ct.product(ct.inputs(0, 2, ct.Gaussian()), ct.inputs(1, 2, ct.Poisson()))
    pc = ct.compile(ct.Circuit(ct.sum(leaves, num_units=1)), dtype=torch.float64, seed=0)
    evidence = ct.Evidence.interval(torch.tensor([[-0.5, 1.5]]).double(), torch.tensor([[1.5, 4.0]]).double())
    names, tensors = zip(*pc.bank.items(), strict=True)

    for query in (ct.queries.mean, ct.queries.variance, ct.queries.covariance):

        def value(*banks, query=query):
            return torch.func.functional_call(
                _Query(pc, partial(query, differentiable=True)),
                {f"pc.bank.{n}": b for n, b in zip(names, banks, strict=True)},
                evidence,
            )

        banks = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(value, banks, atol=1e-6)
    with torch.no_grad():
        assert not ct.queries.mean(pc, evidence, differentiable=True).requires_grad
    with torch.inference_mode():
        assert ct.queries.covariance(pc, evidence).isfinite().all()


class _Query(torch.nn.Module):
    def __init__(self, pc, query):
        super().__init__()
        self.pc, self.query = pc, query

    def forward(self, evidence):
        return self.query(self.pc, evidence)


def test_impossible_evidence_is_an_error():
    pc = mixture()
    impossible = ct.Evidence.interval(torch.full((1, 3), 5.0), torch.full((1, 3), 4.0))
    for query in (ct.queries.mean, ct.queries.covariance):
        with pytest.raises(ct.ImpossibleEvidenceError):
            query(pc, impossible)


@pytest.mark.parametrize("name", [name for name in EVIDENCE if name != "gaussian"])
def test_log_cdf_is_an_integral(name):
    pc, evidence = mixture(), EVIDENCE[name]
    bounds = torch.tensor([[20.0, 3.0, 1.0], [20.0, 2.5, 5.0], [20.0, -1.0, 2.0]], dtype=torch.float64)
    x, _ = grid()
    with torch.no_grad():
        p = torch.softmax(pc(x) + log_factors(name, x), 0)
    expected = torch.stack([(p * (x <= bound).all(1)).sum() for bound in bounds])
    found = ct.queries.log_cdf(pc, bounds, evidence)
    torch.testing.assert_close(found.exp(), expected, **CLOSE)
    assert found[2] == -torch.inf
    if name == "nothing":
        torch.testing.assert_close(ct.queries.log_cdf(pc, bounds), found, **CLOSE)


def test_log_cdf_of_gaussians_with_evidence():
    pc = mixture()
    lower, upper = torch.full((1, 3), -1.0).double(), torch.full((1, 3), 2.0).double()
    within = ct.Evidence.interval(lower, upper)
    x = torch.tensor([[0.4, 1.0, 1.0]], dtype=torch.float64)
    expected = pc.log_partition(ct.Evidence.interval(lower, x)) - pc.log_partition(within)
    torch.testing.assert_close(ct.queries.log_cdf(pc, x, within), expected, **CLOSE)
    point = ct.Evidence.observe(torch.tensor([[0.3, torch.nan, torch.nan]], dtype=torch.float64))
    free = torch.tensor([[0.3, torch.inf, torch.inf], [0.2, torch.inf, torch.inf]], dtype=torch.float64)
    found = ct.queries.log_cdf(pc, free, point)
    torch.testing.assert_close(found, torch.tensor([0.0, -torch.inf]).double(), **CLOSE)
    with pytest.raises(ct.PropertyError, match="expected hard or interval evidence"):
        ct.queries.log_cdf(pc, x, EVIDENCE["gaussian"])
    with pytest.raises(ct.ArgumentError, match="NaN"):
        ct.queries.log_cdf(pc, x * torch.nan)


NEEDS_LISTS = {
    "pairwise_marginals": lambda pc: ct.queries.pairwise_marginals(pc),
    "mutual_information": lambda pc: ct.queries.mutual_information(pc),
    "marginals": lambda pc: ct.queries.marginals(pc, ct.Evidence.nothing(1, 3)),
    "k_best": lambda pc: ct.queries.k_best(pc, 2),
    "latent_entropy": lambda pc: ct.queries.latent_entropy(pc),
    "entropy": lambda pc: ct.queries.entropy(pc),
    "entropy_bounds": lambda pc: ct.queries.entropy_bounds(pc),
    "expectation": lambda pc: ct.queries.expectation(pc, torch.zeros(3, 3)),
    "log_inner_product": lambda pc: ct.queries.log_inner_product(pc, pc),
    "cauchy_schwarz_divergence": lambda pc: ct.queries.cauchy_schwarz_divergence(pc, pc),
    "cross_entropy": lambda pc: ct.queries.cross_entropy(pc, pc),
    "kl_divergence": lambda pc: ct.queries.kl_divergence(pc, pc),
    "renyi_divergence": lambda pc: ct.queries.renyi_divergence(pc, pc, 2.0),
    "sample_without_replacement": lambda pc: ct.queries.sample_without_replacement(pc, 2),
    "order_log_probability": lambda pc: ct.queries.order_log_probability(pc),
    "automaton_log_probability": lambda pc: ct.queries.automaton_log_probability(pc, _anything()),
}


def _anything():
    return ct.queries.Automaton(torch.zeros(1, 3, 1), torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("name", NEEDS_LISTS)
@pytest.mark.parametrize("families", [[ct.Gaussian()] * 3, [ct.Categorical(3), ct.Poisson(), ct.Categorical(3)]])
def test_queries_that_list_values_name_the_node(name, families):
    leaves = [ct.inputs(var, 1, family) for var, family in enumerate(families)]
    pc = ct.compile(ct.Circuit(ct.product(leaves[0], ct.product(*leaves[1:]))), seed=0)
    with pytest.raises(ct.PropertyError, match=r"finitely many values.*scope=\{[01]\}.*(Gaussian|Poisson)"):
        NEEDS_LISTS[name](pc)


@given(ct.testing.circuits(families="all", max_vars=4), st.integers(0, 100), st.data())
@settings(max_examples=40)
def test_moments_and_cdf_on_random_circuits(circuit, seed, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    evidence = data.draw(ct.testing.evidence(circuit))
    if bool((pc.log_partition(evidence) == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.mean(pc, evidence)
        return
    mean, variance = ct.queries.mean(pc, evidence), ct.queries.variance(pc, evidence)
    covariance = ct.queries.covariance(pc, evidence)
    torch.testing.assert_close(covariance, covariance.transpose(1, 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), variance, rtol=1e-6, atol=1e-6)
    assert (variance > -1e-9).all()
    distribution = ct.CircuitDistribution(pc, evidence)
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.variance, variance)
    all_values = torch.full((2, circuit.num_vars), 1 << 40)
    torch.testing.assert_close(ct.queries.log_cdf(pc, all_values, evidence).exp(), torch.ones(2).double(), **CLOSE)


@pytest.mark.parametrize("rate", [0.5, 5.0, 1000.0])
@pytest.mark.parametrize("bounds", [(199.0, 999.0), (100.0, 102.0), (90.0, 95.0), (-1.0, 3.0), (400.0, 500.0)])
def test_poisson_moments_far_in_the_tails(rate, bounds):
    """Also where the probability, or its square, underflows."""
    pc = ct.compile(ct.structures.fully_factorized(1, ct.Poisson()), dtype=torch.float64, seed=0)
    pc.set_weights(pc.circuit.inputs[0], torch.tensor([[rate]]))
    values = torch.arange(bounds[0] + 1, bounds[1] + 1, dtype=torch.float64)
    log_p = values * math.log(rate) - rate - torch.lgamma(values + 1)
    p = torch.softmax(log_p, 0)
    mean = p @ values
    evidence = ct.Evidence.interval(*(torch.tensor([[bound]], dtype=torch.float64) for bound in bounds))
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(pc.log_partition(evidence)[0], torch.logsumexp(log_p, 0), **close)
    torch.testing.assert_close(ct.queries.mean(pc, evidence)[0, 0], mean, **close)
    torch.testing.assert_close(ct.queries.variance(pc, evidence)[0, 0], p @ (values - mean) ** 2, **close)
    torch.testing.assert_close(ct.queries.covariance(pc, evidence)[0, 0, 0], p @ (values - mean) ** 2, **close)
