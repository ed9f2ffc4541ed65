"""Input families equal scipy's, mixed circuits equal a node-by-node evaluation, and EM never lowers the likelihood."""

import dataclasses
import json
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_cases import CLOSE, drawn
from test_io import json_values, positions_in, rewrite

import circuits as ct
from circuits import families as distributions
from circuits import io, learning
from circuits.io.records import circuit_of, records_of

K = 3
FAMILIES = {
    "categorical": ct.Categorical(3),
    "bernoulli": ct.Bernoulli(),
    "binomial": ct.Binomial(5),
    "discretized logistic": ct.DiscretizedLogistic(7),
    "literal": ct.Literal(3, (0, 2, 2)),
    "embedding": ct.EmbeddingCategorical(6, 2),
    "poisson": ct.Poisson(),
    "gaussian": ct.Gaussian(),
}
DIRECT = ["poisson", "gaussian"]

pytestmark = pytest.mark.usefixtures("one_thread")


def single(family, *, seed=0, num_units=K, dtype=torch.float64, weights=None):
    """Compile a mixture over one variable."""
    leaf = ct.inputs(0, num_units, family, name="leaf", weights=weights)
    return ct.compile(ct.Circuit(ct.sum(leaf, num_units=1, name="root")), dtype=dtype, seed=seed)


def mixed(num_units=K, seed=0, dtype=torch.float64):
    """Compile a circuit of all families, in which two variables share parameters."""
    leaves = [ct.inputs(var, num_units, family) for var, family in enumerate(FAMILIES.values())]
    leaves.append(ct.inputs(len(leaves), num_units, ct.Gaussian(), tied_to=leaves[-1]))
    leaves.append(ct.inputs(len(leaves), num_units, ct.Gaussian(0.5)))
    half = len(leaves) // 2
    top = ct.product(*(ct.sum(ct.product(*part), num_units=2) for part in (leaves[:half], leaves[half:])))
    return ct.compile(ct.Circuit(ct.sum(top, num_units=1)), dtype=dtype, seed=seed)


@torch.no_grad()
def total_log_likelihood(pc, evidence):
    return float(pc.log_partition(evidence).sum())


def scipy_of(pc, unit):
    """Return the peer of one unit of the node "leaf"."""
    from scipy import stats

    node = pc.circuit.node("leaf")
    numbers = pc.parameters_of(node).detach()[:, unit].tolist()
    if isinstance(node.distribution, ct.Gaussian):
        return stats.norm(numbers[0], numbers[1])
    if isinstance(node.distribution, ct.Poisson):
        return stats.poisson(numbers[0])
    if isinstance(node.distribution, ct.Binomial):
        return stats.binom(node.distribution.num_trials, numbers[0])
    raise AssertionError(node)


# Single families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["poisson", "gaussian", "binomial"])
def test_densities_and_cumulative_probabilities_are_scipys(name):
    pc = single(FAMILIES[name])
    mixture_weights = pc.log_weights(pc.circuit.node("root")).exp()[0].detach().numpy()
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64)
    lower = torch.tensor([[-torch.inf], [-torch.inf], [0.5], [1.0]], dtype=torch.float64)
    upper = torch.tensor([[2.5], [0.0], [torch.inf], [4.0]], dtype=torch.float64)
    peers = [scipy_of(pc, unit) for unit in range(K)]
    density = sum(
        w * (p.pdf if name == "gaussian" else p.pmf)(x.numpy()) for w, p in zip(mixture_weights, peers, strict=True)
    )
    inside = sum(w * (p.cdf(upper.numpy()) - p.cdf(lower.numpy())) for w, p in zip(mixture_weights, peers, strict=True))
    torch.testing.assert_close(pc(x).exp(), torch.from_numpy(density)[:, 0], **CLOSE)
    found = pc.log_partition(ct.Evidence.interval(lower, upper)).exp()
    torch.testing.assert_close(found, torch.from_numpy(inside)[:, 0], **CLOSE)


def test_the_discretized_logistic_is_scipys_rounded():
    from scipy import stats

    pc = single(ct.DiscretizedLogistic(7))
    table = pc.log_weights(pc.circuit.node("leaf")).exp()
    means, scales = pc.parameters_of(pc.circuit.node("leaf")).detach().numpy()
    for unit in range(K):
        cdf = stats.logistic(means[unit], scales[unit]).cdf([0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
        expected = torch.diff(torch.tensor([0.0, *cdf, 1.0], dtype=torch.float64))
        torch.testing.assert_close(table[:, unit], expected, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_that_are_set_are_those_that_are_read(name):
    pc, other = single(FAMILIES[name], seed=1), single(FAMILIES[name], seed=2)
    node, same = pc.circuit.node("leaf"), other.circuit.node("leaf")
    other.set_weights(same, pc.parameters_of(node).detach())
    torch.testing.assert_close(other.parameters_of(same), pc.parameters_of(node), **CLOSE)
    given = single(FAMILIES[name], seed=3, weights=pc.parameters_of(node).detach())
    torch.testing.assert_close(given.parameters_of(given.circuit.node("leaf")), pc.parameters_of(node), **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_seed_gives_one_circuit_in_every_dtype(name):
    pc, single_precision = (single(FAMILIES[name], seed=4, dtype=d) for d in (torch.float64, torch.float32))
    for bank in pc.bank:
        assert torch.equal(pc.bank[bank].float(), single_precision.bank[bank])
    assert not all(torch.equal(single(FAMILIES[name], seed=5).bank[b], pc.bank[b]) for b in pc.bank)


def test_intervals_far_in_the_tails_have_digits_and_gradients():
    from scipy import stats

    pc = single(ct.Gaussian(), num_units=1, weights=torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    lower = torch.tensor([[30.0], [-torch.inf], [-torch.inf], [2.0], [1.0]], dtype=torch.float64)
    upper = torch.tensor([[torch.inf], [-30.0], [torch.inf], [2.0 + 1e-9], [1.0]], dtype=torch.float64)
    log_z = pc.log_partition(ct.Evidence.interval(lower, upper))
    tail = stats.norm.logcdf(-30.0)
    expected = torch.tensor([tail, tail, 0.0, stats.norm.logpdf(2.0) + math.log(1e-9), -torch.inf])
    torch.testing.assert_close(log_z.float(), expected.float(), rtol=1e-6, atol=1e-9)
    log_z[:4].sum().backward()
    far = ct.queries.sample(pc, 200, ct.Evidence.interval(lower[1:2] - 0, upper[1:2] - 20)).flatten()
    assert bool(((far <= -50) & (far > -50.3)).all())
    assert all(bool(p.grad.isfinite().all()) for p in pc.bank.values())
    counts = single(ct.Poisson(), num_units=1, weights=torch.tensor([[3.0]], dtype=torch.float64))
    lower = torch.tensor([[50.0], [-torch.inf], [-torch.inf], [4.2]], dtype=torch.float64)
    upper = torch.tensor([[torch.inf], [-1.0], [torch.inf], [4.9]], dtype=torch.float64)
    found = counts.log_partition(ct.Evidence.interval(lower, upper))
    expected = torch.tensor([stats.poisson(3.0).logsf(50), -torch.inf, 0.0, -torch.inf], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found[[0, 2]].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in counts.bank.values())


@pytest.mark.parametrize("name", DIRECT)
def test_gradients_of_log_z_are_numeric_ones_under_every_kind_of_evidence(name):
    pc = single(FAMILIES[name], num_units=2)
    one = torch.ones(1, 1, dtype=torch.float64)
    kinds = [ct.Evidence.observe(2 * one), ct.Evidence.interval(0.5 * one, 3.2 * one)]
    kinds.append(ct.Evidence.interval(-torch.inf * one, 3.2 * one))
    kinds.append(ct.Evidence.sparse(torch.tensor([[[1, 3]]]), torch.tensor([[[0.5, -1.0]]], dtype=torch.float64)))
    if name == "gaussian":
        kinds.append(ct.Evidence.gaussian(0.3 * one, 0.7 * one))
    else:
        kinds.append(ct.Evidence.soft(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 1, 6)))
    bank = next(b for b in pc.bank if b.startswith("input"))

    for evidence in kinds:

        def log_z(raw, evidence=evidence):
            state = {f"bank.{bank}": raw}
            return torch.func.functional_call(pc, state, (evidence,))

        assert torch.autograd.gradcheck(log_z, pc.bank[bank].detach().clone().requires_grad_())


def test_normal_noise_is_integrated_exactly():
    pc = single(ct.Gaussian())
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    measured, noise = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)
    noise_density = torch.distributions.Normal(measured[0, 0], noise[0, 0]).log_prob(grid)
    expected = torch.trapezoid((pc(grid[:, None]) + noise_density).exp(), grid).log()
    evidence = ct.Evidence.gaussian(measured, noise)
    torch.testing.assert_close(pc.log_partition(evidence)[0], expected, **CLOSE)
    samples = ct.queries.sample(pc, 20_000, evidence, generator=torch.Generator().manual_seed(0)).flatten()
    posterior = (pc(grid[:, None]) + noise_density - expected).exp().detach()
    mean = torch.trapezoid(posterior * grid, grid)
    std = torch.trapezoid(posterior * (grid - mean) ** 2, grid).sqrt()
    assert abs(float(samples.mean() - mean)) < 4 * float(std) / 20_000**0.5
    assert abs(float(samples.std() / std) - 1) < 0.03
    finite = single(ct.Binomial(5))
    v = torch.arange(6, dtype=torch.float64)
    factors = torch.distributions.Normal(measured[0, 0], noise[0, 0]).log_prob(v)
    expected = torch.logsumexp(finite(v[:, None]) + factors, 0)
    torch.testing.assert_close(finite.log_partition(evidence)[0], expected, **CLOSE)


# Mixed circuits -----------------------------------------------------------------------------------------------------


@given(ct.testing.circuits(families="all", max_vars=5), st.integers(0, 100), st.data())
def test_mixed_circuits_equal_the_slow_evaluation(circuit, seed, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    x = drawn(pc, 4, seed).double()
    torch.testing.assert_close(pc(x), ct.testing.evaluate_slowly(pc, x), **CLOSE)
    observed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.numel(), max_size=x.numel()))).reshape(x.shape)
    with_nan = x.masked_fill(~observed, torch.nan)
    expected = ct.testing.evaluate_slowly(pc, with_nan)
    torch.testing.assert_close(pc(with_nan), expected, **CLOSE)
    torch.testing.assert_close(ct.queries.log_marginal(pc, x, observed), expected, **CLOSE)
    if circuit.is_discrete:
        torch.testing.assert_close(pc(x.long()), pc(x), **CLOSE)


@given(ct.testing.circuits(families="all", max_vars=4), st.integers(0, 100), st.data())
def test_gradients_of_mixed_circuits_are_finite(circuit, seed, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    log_z = pc.log_partition(data.draw(ct.testing.evidence(circuit)))
    assert not log_z.isnan().any()
    possible = log_z[log_z > -torch.inf]
    if len(possible) and possible.requires_grad:
        possible.sum().backward()
        assert not any(p.grad.isnan().any() for p in pc.bank.values() if p.grad is not None)


def test_two_variables_integrate_to_one_and_to_their_marginals():
    leaves = [ct.inputs(0, 2, ct.Gaussian()), ct.inputs(1, 2, ct.Poisson())]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves, mode="outer"), num_units=1)), dtype=torch.float64, seed=3)
    grid, counts = torch.linspace(-10, 10, 4001, dtype=torch.float64), torch.arange(60, dtype=torch.float64)
    density = pc(torch.cartesian_prod(grid, counts)).exp().reshape(len(grid), len(counts))
    torch.testing.assert_close(torch.trapezoid(density.sum(1), grid), torch.ones((), dtype=torch.float64), **CLOSE)
    at = torch.tensor([[torch.nan, 2.0], [grid[1500], torch.nan]], dtype=torch.float64)
    expected = torch.stack([torch.trapezoid(density[:, 2], grid), density[1500].sum()])
    torch.testing.assert_close(pc(at).exp(), expected, **CLOSE)
    lower = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    upper = torch.tensor([[1.5, 3.0]], dtype=torch.float64)
    inside = (grid >= -1) & (grid <= 1.5)
    expected = torch.trapezoid(density[inside][:, 1:4].sum(1), grid[inside])
    found = pc.log_partition(ct.Evidence.interval(lower, upper)).exp()[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_kinds_of_evidence_join_by_variable():
    pc = mixed()
    num_vars = pc.circuit.num_vars
    x = drawn(pc, 4)
    factors = torch.randn(4, num_vars, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    is_soft = torch.arange(num_vars) < 3
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    hard, soft = ct.Evidence.observe(x, observed), ct.Evidence.soft(factors)
    found = pc.log_partition(ct.Evidence.where(is_soft, soft, hard))
    terms = []
    for values in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(6)):
        at = x.masked_fill(~observed, torch.nan)
        at[:, :3] = values.double()
        terms.append(pc(at) + factors[:, torch.arange(3), values].sum(1))
    torch.testing.assert_close(found, torch.logsumexp(torch.stack(terms), 0), **CLOSE)
    flipped = ct.Evidence.where(~is_soft, hard, soft)
    torch.testing.assert_close(pc.log_partition(flipped), found, **CLOSE)
    per_query = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    far = ct.Evidence.interval(x.clamp(max=0) - torch.inf, x)
    joined = pc.log_partition(ct.Evidence.where(per_query, hard, far))
    for query in range(4):
        alone = ct.Evidence.where(per_query[query], hard.rows([query]), far.rows([query]))
        torch.testing.assert_close(pc.log_partition(alone)[0], joined[query], **CLOSE)
    assert torch.equal(
        ct.Evidence.where(is_soft, soft, soft).dense(7, torch.float64),
        ct.Evidence.soft(factors).dense(7, torch.float64),
    )


def test_posteriors_of_finite_variables_are_those_of_enumeration_given_the_others():
    pc = single(ct.Binomial(4))
    evidence = ct.Evidence.interval(torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    joint = ct.testing.enumerate_joint(pc)
    expected = ct.testing.enumerated_marginals(joint, evidence)
    torch.testing.assert_close(ct.queries.marginals(pc, evidence), expected, **CLOSE)
    assert expected[0, 0, 0] == expected[0, 0, 4] == 0


# Samples and explanations -------------------------------------------------------------------------------------------


def test_samples_have_the_dtype_of_their_values():
    assert drawn(mixed(dtype=torch.float32), 2).dtype == torch.float32
    assert drawn(single(ct.Poisson()), 2).dtype == torch.int64
    assert ct.queries.mpe(mixed()).assignment.dtype == torch.float64
    assert ct.queries.mpe(single(ct.Poisson())).assignment.dtype == torch.int64


@pytest.mark.parametrize("bounds", [(-torch.inf, torch.inf), (0.4, 2.5), (1.0, torch.inf), (-torch.inf, 1.2)])
@pytest.mark.parametrize("name", DIRECT)
def test_samples_follow_the_cumulative_probabilities(name, bounds):
    pc = single(FAMILIES[name])
    lower, upper = (torch.full((1, 1), bound, dtype=torch.float64) for bound in bounds)
    evidence = ct.Evidence.interval(lower, upper)
    samples = ct.queries.sample(pc, 20_000, evidence, generator=torch.Generator().manual_seed(0)).flatten()
    assert bool(((samples > lower) & (samples <= upper)).all())
    for at in (0.7, 1.0, 2.0, 3.0):
        top = torch.full_like(upper, min(at, bounds[1]))
        if float(top) <= float(lower):
            continue
        expected = (pc.log_partition(ct.Evidence.interval(lower, top)) - pc.log_partition(evidence)).exp()
        assert abs(float((samples <= at).double().mean()) - float(expected.detach())) < 0.015


def test_samples_of_a_mixed_circuit_respect_evidence_and_have_the_right_moments():
    pc = mixed()
    x = drawn(pc, 2)
    observed = torch.arange(x.shape[1]) % 2 == 0
    samples = ct.queries.sample(pc, 5, ct.Evidence.observe(x, observed.expand_as(x)))
    assert torch.equal(samples[:, :, observed], x[:, observed].expand(5, -1, -1))
    assert not torch.isnan(samples).any()
    many = drawn(pc, 20_000)
    statistics = learning.top_down_flows(pc)
    bank = next(b for b, family in pc.families.items() if family == ct.Poisson())
    expected = statistics[bank][0, 1].sum()
    assert abs(float(many[:, 6].mean() - expected)) < 4 * float(many[:, 6].std()) / 20_000**0.5


@given(ct.testing.circuits(families="all", max_vars=4), st.integers(0, 100), st.data())
def test_no_sample_beats_the_most_probable_explanation(circuit, seed, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    evidence = data.draw(ct.testing.evidence(circuit))
    if evidence.log_factors is not None or bool((pc.log_partition(evidence) == -torch.inf).any()):
        return  # soft evidence is a matter of enumeration
    assignment, log_score = ct.queries.mpe(pc, evidence)
    # the score of an assignment is that of hard evidence on it; within (open) bounds it is a supremum
    at_best = ct.queries.mpe(pc, ct.Evidence.observe(assignment)).log_score
    torch.testing.assert_close(at_best, log_score, rtol=1e-7, atol=1e-7)
    for sample in ct.queries.sample(pc, 5, evidence, generator=torch.Generator().manual_seed(seed)):
        assert bool((ct.queries.mpe(pc, ct.Evidence.observe(sample)).log_score <= log_score + 1e-7).all())


def test_marginals_need_finitely_many_values():
    with pytest.raises(ct.PropertyError, match=r"finitely many values, got Input.*scope=\{6\}.* Poisson"):
        ct.queries.marginals(mixed(), ct.Evidence.nothing(1, 10))


# Learning -----------------------------------------------------------------------------------------------------------


@given(ct.testing.circuits(families="all", max_vars=4), st.integers(0, 100), st.data())
def test_full_em_never_lowers_the_likelihood(circuit, seed, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    x = drawn(ct.compile(circuit, dtype=torch.float64, seed=seed + 1), 30, seed).double()
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    is_bounded = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1)) < data.draw(
        st.sampled_from([0.0, 0.3]), label="censored"
    )
    hard = ct.Evidence.observe(x, observed)
    evidence = ct.Evidence.where(is_bounded, ct.Evidence.interval(x - 1, x + 1), hard)
    log_z = pc.log_partition(evidence)
    evidence = evidence.rows(log_z > -torch.inf)
    if not evidence.batch_size:
        return
    before = total_log_likelihood(pc, evidence)
    for _ in range(4):
        learning.em_step(pc, learning.expected_flows(pc, evidence).flows)
        after = total_log_likelihood(pc, evidence)
        assert after >= before - 1e-7 * (1 + abs(before))
        before = after


@pytest.mark.parametrize("name", DIRECT)
def test_expected_statistics_are_those_of_the_posterior_whatever_the_evidence(name):
    pc = single(FAMILIES[name], num_units=1)
    bank = next(iter(pc.families))
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64) if name == "gaussian" else torch.arange(80).double()
    log_p = pc(grid[:, None]).detach()
    lower, upper = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[2.5]], dtype=torch.float64)
    kinds = [(ct.Evidence.interval(lower, upper), torch.where((grid > 0.4) & (grid <= 2.5), 0.0, -torch.inf))]
    if name == "gaussian":
        noise = torch.distributions.Normal(lower[0, 0], upper[0, 0])
        kinds.append((ct.Evidence.gaussian(lower, upper), noise.log_prob(grid)))
    else:
        factors = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        padded = torch.cat([factors, torch.full((75,), -torch.inf, dtype=torch.float64)])
        kinds.append((ct.Evidence.soft(factors.reshape(1, 1, 5)), padded))
    for evidence, factor in kinds:
        weights = torch.softmax(log_p + factor, 0)
        flows = learning.expected_flows(pc, evidence).flows[bank][0, :, 0]
        expected = torch.stack([(weights * grid**power).sum() for power in range(len(flows))])
        torch.testing.assert_close(flows, expected, rtol=2e-4 if name == "gaussian" else 1e-9, atol=0)


def test_one_em_step_of_a_gaussian_mixture_is_the_textbooks():
    pc = single(ct.Gaussian(), seed=3)
    x = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    pc.set_weights(pc.circuit.node("leaf"), torch.tensor([[998.0, 1000.0, 1004.0], [1.0, 2.0, 1.5]]))
    mean, std = pc.parameters_of(pc.circuit.node("leaf")).detach()
    prior = pc.log_weights(pc.circuit.node("root")).detach()[0]
    share = torch.softmax(prior + torch.distributions.Normal(mean, std).log_prob(x), 1)
    learning.em_step(pc, learning.expected_flows(pc, x).flows)
    new_mean = (share * x).sum(0) / share.sum(0)
    new_std = ((share * (x - new_mean) ** 2).sum(0) / share.sum(0)).sqrt()
    found = pc.parameters_of(pc.circuit.node("leaf")).detach()
    torch.testing.assert_close(found, torch.stack([new_mean, new_std]), rtol=1e-7, atol=0)
    torch.testing.assert_close(pc.log_weights(pc.circuit.node("root")).exp()[0], share.mean(0), **CLOSE)


def test_em_of_a_gaussian_mixture_is_scikit_learns():
    mixture = pytest.importorskip("sklearn.mixture")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, dtype=torch.float64, generator=generator)
    x[:90] += torch.tensor([3.0, -2.0])
    pc = ct.compile(ct.structures.mixture(2, ct.Gaussian(1e-6), K), dtype=torch.float64, seed=2)
    mean, std = torch.stack([pc.parameters_of(node).detach() for node in pc.circuit.inputs], -1)  # (K, D) each
    peer = mixture.GaussianMixture(
        K,
        covariance_type="diag",
        reg_covar=0.0,
        max_iter=7,
        tol=0.0,
        means_init=mean,
        precisions_init=std**-2,
        weights_init=pc.log_weights(pc.circuit.root).detach().exp()[0],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        peer.fit(x.numpy())
    for _ in range(7):
        learning.em_step(pc, learning.expected_flows(pc, x).flows)
    torch.testing.assert_close(pc(x), torch.from_numpy(peer.score_samples(x.numpy())), rtol=1e-7, atol=1e-7)


def test_variances_far_from_zero_survive_single_precision():
    pc = single(ct.Gaussian(), num_units=1, dtype=torch.float32, weights=torch.tensor([[5000.0], [2.0]]))
    x = 5000 + torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    learning.em_step(pc, learning.expected_flows(pc, x).flows)
    found = pc.parameters_of(pc.circuit.node("leaf")).detach()[:, 0].double()
    expected = torch.stack([x.double().mean(), x.double().std(correction=0)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_constant_data_stop_at_the_least_standard_deviation():
    pc = single(ct.Gaussian(0.01), num_units=1)
    x = torch.full((20, 1), 2.5, dtype=torch.float64)
    for _ in range(3):
        learning.em_step(pc, learning.expected_flows(pc, x).flows)
    found = pc.parameters_of(pc.circuit.node("leaf")).detach()[:, 0]
    torch.testing.assert_close(found, torch.tensor([2.5, 0.01], dtype=torch.float64), rtol=1e-5, atol=0)
    learning.em_step(pc, learning.expected_flows(pc, x).flows, pseudocount=20.0)
    std = pc.parameters_of(pc.circuit.node("leaf")).detach()[1, 0]
    assert float(std) == pytest.approx(0.01, rel=1e-4)  # pseudo-observations have the spread of the data


@pytest.mark.parametrize("step_size", [0.3, 1.0])
@pytest.mark.parametrize("name", ["binomial", "poisson", "gaussian"])
def test_small_steps_interpolate_mean_parameters(name, step_size):
    pc = single(FAMILIES[name], num_units=1)
    node = pc.circuit.node("leaf")
    before = pc.parameters_of(node).detach()[:, 0]
    x = drawn(single(FAMILIES[name], num_units=1, seed=5), 40).double()

    def mean_parameters(parameters):
        if name == "binomial":
            return 5 * parameters
        if name == "poisson":
            return parameters
        return torch.stack([parameters[0], parameters[0] ** 2 + parameters[1] ** 2])

    learning.em_step(pc, learning.expected_flows(pc, x).flows, step_size=step_size)
    data = torch.cat([(x**power).mean(0) for power in range(1, 1 + len(before))])
    expected = (1 - step_size) * mean_parameters(before) + step_size * data
    torch.testing.assert_close(mean_parameters(pc.parameters_of(node).detach()[:, 0]), expected, **CLOSE)


@pytest.mark.parametrize("name", ["discretized logistic", "embedding"])
def test_fits_without_closed_form_come_close_to_the_best(name):
    truth = single(FAMILIES[name], num_units=1, seed=5)
    table = truth.log_weights(truth.circuit.node("leaf")).detach()[:, 0]
    pc = single(FAMILIES[name], num_units=1, seed=6)
    flows = {bank: torch.ones(shape, dtype=torch.float64) for bank, shape in learning.em.flow_shapes(pc).items()}
    flows[next(iter(pc.families))] = 1000 * table.exp().reshape(1, -1, 1)
    for _ in range(10):
        learning.em_step(pc, flows)
    found = pc.log_weights(pc.circuit.node("leaf")).detach()[:, 0]
    assert float((table.exp() * (table - found)).sum()) < 1e-3


OPTIMIZERS = {
    "em": "em",
    "minibatch_em": "minibatch_em",
    "anemone": "anemone",
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_mixed_tables_with_missing_values(optimizer, tmp_path):
    families = [*FAMILIES.values(), ct.Gaussian(0.5)]
    circuit = ct.structures.mixture(len(families), families, num_components=K)
    truth = ct.compile(circuit, seed=7)
    x = drawn(truth, 200)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = torch.nan
    pc = ct.compile(circuit, seed=1)
    options = {"optimizer": OPTIMIZERS[optimizer], "batch_size": 50, "progress": False}
    path = tmp_path / "run.safetensors"
    learning.fit(pc, x, num_epochs=3, checkpoint_path=path, **options)
    resumed = ct.compile(circuit, seed=1)
    learning.fit(resumed, x, num_epochs=8, checkpoint_path=path, **options)
    result = learning.fit(pc := ct.compile(circuit, seed=1), x, num_epochs=8, **options)
    assert all(torch.equal(pc.bank[name], resumed.bank[name]) for name in pc.bank)
    assert result.train_log_likelihood[-1] > float(truth(x).detach().mean()) - 0.6
    assert result.train_log_likelihood[-1] > result.train_log_likelihood[0] + 1


def test_units_that_start_at_the_scale_of_the_data_are_all_used():
    truth = ct.compile(ct.structures.mixture(3, [ct.Gaussian(), ct.Poisson(), 3], 2), dtype=torch.float64, seed=0)
    leaves = truth.circuit.inputs
    truth.set_weights(leaves[0], torch.tensor([[900.0, 1100.0], [20.0, 30.0]]))
    truth.set_weights(leaves[1], torch.tensor([[300.0, 50.0]]))
    x = drawn(truth, 300)
    x[::7, 0] = torch.nan
    found = []
    for is_initialized in (False, True):
        pc = ct.compile(truth.circuit, dtype=torch.float64, seed=1)
        if is_initialized:
            learning.initialize_inputs(pc, x, samples_per_unit=2)
        learning.fit(pc, x, num_epochs=30, pseudocount=0.0, progress=False)
        found.append(total_log_likelihood(pc, ct.Evidence.observe(x)) / len(x))
    best = total_log_likelihood(truth, ct.Evidence.observe(x)) / len(x)
    assert found[0] < best - 1
    assert found[1] > best - 0.01
    with pytest.raises(ct.ArgumentError, match="samples_per_unit"):
        learning.initialize_inputs(pc, x, samples_per_unit=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_that_start_at_quantiles_share_out_the_values(dtype):
    circuit = ct.structures.mixture(2, [ct.Gaussian(), 8], 4)
    pc = ct.compile(circuit, dtype=dtype, seed=0)
    x = torch.stack([torch.linspace(0, 4, 400, dtype=torch.float64), torch.arange(400).double() % 8], 1)
    learning.initialize_inputs(pc, x, by="quantiles", pseudocount=0.0)
    gaussian, categorical = (pc.parameters_of(node).double() for node in circuit.inputs)
    expected = torch.zeros(8, 4, dtype=torch.float64)
    expected[torch.arange(8), torch.arange(8) // 2] = 0.5
    torch.testing.assert_close(gaussian[0], x[:, 0].view(4, 100).mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(categorical, expected, atol=1e-6, rtol=0)
    learning.initialize_inputs(pc, x, by="quantiles", bandwidth=0.5, pseudocount=0.0)
    distance = (torch.arange(8).unsqueeze(1) - torch.arange(8)).abs().double()
    spread = (-distance / 0.5).exp()
    torch.testing.assert_close(
        pc.parameters_of(circuit.inputs[1]).double(), spread / spread.sum(0) @ expected, atol=1e-6, rtol=0
    )


def test_quantiles_are_those_of_the_values_that_are_known():
    circuit = ct.structures.mixture(2, [ct.Gaussian(), 4], 2)
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = torch.stack([torch.linspace(0, 2, 200).double(), torch.full((200,), 3.0).double()], 1)
    x[:100, 0] = torch.nan
    x[:, 1] = torch.nan
    before = pc.parameters_of(circuit.inputs[1]).clone()
    learning.initialize_inputs(pc, x, by="quantiles", pseudocount=0.0)
    means = pc.parameters_of(circuit.inputs[0])[0]
    torch.testing.assert_close(means, torch.tensor([1.25, 1.75]).double(), atol=1e-2, rtol=0)
    assert torch.equal(pc.parameters_of(circuit.inputs[1]), before)
    for name, value in [("by", "rank"), ("bandwidth", -1.0)]:
        with pytest.raises(ct.ArgumentError, match=name):
            learning.initialize_inputs(pc, x, **{name: value})


@given(ct.testing.circuits(families="all", max_vars=3), st.integers(0, 100), st.sampled_from(["random", "quantiles"]))
def test_initialized_circuits_are_circuits(circuit, seed, by):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    x = drawn(pc, 20, seed)
    sums = {name: pc.bank[name].detach().clone() for name in pc.sum_banks}
    learning.initialize_inputs(pc, x, by=by, bandwidth=0.5, seed=seed)
    assert bool((pc(x) > -torch.inf).all())
    assert all(torch.equal(pc.bank[name], sums[name]) for name in sums)
    torch.testing.assert_close(pc.log_partition(ct.Evidence.nothing(1, circuit.num_vars)).exp(), torch.ones(1).double())


def test_pixels_in_bytes_are_data():
    pc = ct.compile(ct.structures.fully_factorized(2, ct.DiscretizedLogistic(256)), seed=0)
    x = torch.tensor([[0, 255], [128, 130]], dtype=torch.uint8)
    result = learning.fit(pc, x, num_epochs=3, progress=False).train_log_likelihood
    assert list(result) == sorted(result)
    with pytest.raises(ct.ArgumentError, match="expected values from 0 to 299 of variable 1, got 300 in sample 0"):
        learning.fit(
            ct.compile(ct.structures.fully_factorized(2, ct.DiscretizedLogistic(300))),
            torch.tensor([[0, 300]]),
            progress=False,
        )


def test_top_down_flows_are_the_mean_statistics_of_reached_units():
    pc = single(ct.Gaussian())
    share = pc.log_weights(pc.circuit.node("root")).detach().exp()[0]
    mean, std = pc.parameters_of(pc.circuit.node("leaf")).detach()
    expected = share * torch.stack([torch.ones_like(mean), mean, mean**2 + std**2])
    flows = learning.top_down_flows(pc)
    torch.testing.assert_close(flows[next(iter(pc.families))][0], expected, **CLOSE)
    torch.testing.assert_close(flows["sum_1x3"][0, 0], share, **CLOSE)


# Structures and files -----------------------------------------------------------------------------------------------


def test_one_seed_of_families_per_bank_and_ties_within_it():
    pc = mixed()
    gaussians = [name for name, family in pc.families.items() if isinstance(family, ct.Gaussian)]
    assert [(name, len(pc.bank[name]), pc.families[name].min_std) for name in gaussians] == [
        ("input_gaussian_2x3", 1, 1e-3),
        ("input_gaussian_2x3_2", 1, 0.5),
    ]
    assert pc.circuit.num_categories == (3, 2, 6, 7, 3, 6, 0, 0, 0, 0)


@given(ct.testing.circuits(families="all"), st.integers(0, 100))
def test_the_code_and_the_file_of_a_circuit_rebuild_it(circuit, seed):
    scope = {}
    exec(repr(circuit), scope)
    assert repr(scope["circuit"]) == repr(circuit)
    rebuilt = circuit_of(json.loads(json.dumps(records_of(circuit))), circuit.num_vars)
    assert repr(rebuilt) == repr(circuit)
    pc = ct.compile(circuit, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        ct.save(pc, folder)
        loaded = ct.load(folder)
    x = drawn(pc, 3)
    assert torch.equal(loaded(x), pc(x))


@given(st.data())
def test_any_change_of_a_saved_mixed_circuit_is_refused_or_is_a_circuit(data):
    def change(structure):
        *path, last = data.draw(st.sampled_from(list(positions_in(structure["nodes"]))[1:]), label="where")
        container = structure["nodes"]
        for key in path:
            container = container[key]
        container[last] = data.draw(json_values | st.sampled_from(list(distributions.FAMILIES)), label="value")

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "pc"
        ct.save(mixed(), folder)
        rewrite(folder, change)
        try:
            loaded = io.load(folder)
        except ct.CheckpointError:
            return
    assert not torch.isnan(loaded.log_partition(ct.Evidence.nothing(1, loaded.circuit.num_vars))).any()


def test_tables_that_no_file_bounds_are_refused(tmp_path):
    ct.save(single(ct.Binomial(3)), tmp_path / "pc")
    rewrite(tmp_path / "pc", lambda structure: structure["nodes"][0].update(num_trials=1 << 30))
    with pytest.raises(ct.CheckpointError, match=r"expected at most .* numbers that are derived from it"):
        ct.load(tmp_path / "pc")


def test_raw_parameters_that_are_not_finite_are_not_saved(tmp_path):
    pc = mixed()
    with torch.no_grad():
        pc.bank["input_gaussian_2x3"][0, 1, 0] = torch.nan
    with pytest.raises(ct.ArgumentError, match="input_gaussian_2x3 has NaN"):
        ct.save(pc, tmp_path / "pc")


def test_a_new_family_is_one_class():
    @dataclasses.dataclass(frozen=True)
    class Geometric(distributions.Finite):
        """A geometric distribution, cut off after C values."""

        family = "test_geometric"
        num_categories: int

        @property
        def num_values(self):
            return self.num_categories

        def parameter_shape(self, num_units):
            return 1, num_units

        def initial(self, shape, generator):
            return torch.empty(tuple(shape)).normal_(generator=generator)

        def read(self, raw):
            v = torch.arange(self.num_categories, dtype=raw.dtype, device=raw.device).reshape(-1, 1)
            return torch.log_softmax(v * torch.nn.functional.logsigmoid(raw), -2)

        def parameters(self, raw):
            return torch.sigmoid(raw)

        def raw(self, parameters):
            return torch.logit(parameters)

        def fit(self, raw, log_target, mass):
            return distributions.base.ascend(
                lambda raw: (log_target.exp() * self.read(raw)).sum(-2, keepdim=True), raw, num_steps=10
            )

    try:
        circuit = ct.structures.mixture(2, [Geometric(4), 3], 2)
        pc = ct.compile(circuit, dtype=torch.float64, seed=0)
        x = drawn(ct.compile(circuit, seed=1), 50)
        result = learning.fit(pc, x, num_epochs=5, pseudocount=0.0, progress=False).train_log_likelihood
        assert list(result) == sorted(result)
        joint = ct.testing.enumerate_joint(pc)
        torch.testing.assert_close(pc(x), joint[x[:, 0], x[:, 1]], **CLOSE)
        assert repr(circuit_of(records_of(circuit), 2)) == repr(circuit)
    finally:
        del distributions.FAMILIES["test_geometric"]


WRONG = {
    "no trials": (lambda: ct.Binomial(0), "num_trials: expected an integer >= 1"),
    "no rank": (lambda: ct.EmbeddingCategorical(3, 0), "rank"),
    "no categories": (lambda: ct.DiscretizedLogistic(True), "num_categories"),
    "literal beyond": (lambda: ct.Literal(3, (3,)), "values: expected values from 0 to 2, got 3"),
    "literal of nothing": (lambda: ct.Literal(3, ()), "values"),
    "literal units": (lambda: ct.inputs(0, 3, ct.Literal(3, (1,))), "num_units: expected 1, one per value"),
    "no variance": (lambda: ct.Gaussian(0.0), "min_std"),
    "negative std": (lambda: ct.inputs(0, 1, ct.Gaussian(), weights=torch.tensor([[0.0], [-1.0]])), "weights: .* >="),
    "negative rate": (lambda: ct.inputs(0, 1, ct.Poisson(), weights=torch.tensor([[-1.0]])), "rates > 0"),
    "improbable": (lambda: ct.inputs(0, 1, ct.Binomial(2), weights=torch.tensor([[1.5]])), "from 0 to 1"),
    "fraction of a count": (lambda: single(ct.Poisson())(torch.tensor([[0.5]])), "whole numbers >= 0 .* got 0.5"),
    "negative count": (lambda: single(ct.Poisson())(torch.tensor([[-1]])), "whole numbers"),
    "infinite": (lambda: single(ct.Gaussian())(torch.tensor([[torch.inf]])), "finite numbers"),
    "fraction of a category": (lambda: single(ct.Binomial(2))(torch.tensor([[0.5]])), "from 0 to 2, got 0.5"),
    "factors on reals": (
        lambda: single(ct.Gaussian()).log_partition(ct.Evidence.soft(torch.zeros(1, 1, 3))),
        "log_factors: .* Evidence.gaussian",
    ),
    "noise on counts": (
        lambda: single(ct.Poisson()).log_partition(ct.Evidence.gaussian(torch.ones(1, 1), torch.ones(1, 1))),
        "no closed form",
    ),
    "no noise": (lambda: ct.Evidence.gaussian(torch.ones(1, 1), torch.zeros(1, 1)), "std > 0"),
    "bounds that are NaN": (lambda: ct.Evidence.interval(torch.full((1, 1), torch.nan), torch.ones(1, 1)), "NaN"),
    "integer bounds": (lambda: ct.Evidence.interval(torch.ones(1, 1).long(), torch.ones(1, 1)), "lower"),
    "other shapes": (lambda: ct.Evidence.interval(torch.ones(1, 1), torch.ones(1, 2)), "upper"),
    "other batches": (
        lambda: ct.Evidence.where(torch.ones(2) > 0, ct.Evidence.nothing(1, 2), ct.Evidence.nothing(2, 2)),
        "other: expected",
    ),
    "condition": (
        lambda: ct.Evidence.where(torch.ones(3) > 0, ct.Evidence.nothing(1, 2), ct.Evidence.nothing(1, 2)),
        "condition",
    ),
    "table of a density": (
        lambda: single(ct.Gaussian()).log_weights(single(ct.Gaussian()).circuit.node("leaf")),
        "node",
    ),
    "enumeration": (lambda: ct.testing.enumerate_joint(single(ct.Poisson())), "evaluate_slowly"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(ct.ArgumentError, match=message):
        call()


def test_one_variable_has_one_kind_of_values():
    def disagreeing(one, other):
        return lambda: ct.Circuit(ct.sum(ct.inputs(0, 1, one), ct.inputs(0, 1, other), num_units=1))

    for one, other in ((ct.Poisson(), ct.Gaussian()), (ct.Poisson(), ct.Categorical(3))):
        with pytest.raises(ct.StructureError, match="variable 0: expected one"):
            disagreeing(one, other)()
    assert disagreeing(ct.Binomial(2), ct.Categorical(3))().num_categories == (3,)


def test_a_compiled_forward_of_a_mixed_circuit_is_the_same():
    pc = mixed()
    x = drawn(pc, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(pc, backend="eager", fullgraph=True)(x), pc(x), **CLOSE)
