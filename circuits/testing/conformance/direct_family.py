"""The test case that whoever writes an input family of infinitely many values subclasses."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits import learning, queries
from circuits.engine.compile import compile
from circuits.evidence import Evidence
from circuits.families import Distribution
from circuits.symbolic import Circuit, inputs, product, sum
from circuits.testing import strategies
from circuits.testing.conformance._cases import (
    Case,
    ConformanceTestCase,
    assert_close,
    assert_code_rebuilds,
    assert_em_climbs,
    law,
    reloaded,
)

_NUM_SAMPLES = 1000
_GREATEST_DISTANCE = 3.2


class DirectFamilyTestCase(ConformanceTestCase):
    """Tests a family of infinitely many values, such as counts or real numbers, against its density on a grid.

    Subclass it and supply :meth:`distribution`; :meth:`log_prob` is the oracle, such as ``scipy.stats.poisson.logpmf``.
    Tested are small mixtures of products of such inputs: densities, normalisation, missing values, samples, the most
    probable explanation, gradients, learning, saving and loading, and numeric limits.
    """

    has_exact_m_step: ClassVar[bool] = True
    """Whether a step of EM finds the greatest likelihood of complete data at once."""

    def distribution(self, draw: st.DrawFn) -> Distribution:
        """Return a distribution of the family under test; its options come from ``draw(strategy)``."""
        raise NotImplementedError(
            f"{type(self).__name__}.distribution(self, draw): expected a method that returns an input family"
        )

    def log_prob(self, distribution: Distribution, parameters: Tensor, values: Tensor) -> Tensor | None:
        """Return the oracle's log-density of values, float64 (N,); None, the default: there is no oracle.

        Args:
            distribution: the distribution.
            parameters: of one unit, as the family defines them, (S,).
            values: float64 (N,).
        """
        return None

    def grid(self, distribution: Distribution) -> Tensor:
        """Return evenly spaced values, float64 (N,), that hold all mass but 1e-6 of initial parameters."""
        if distribution.is_discrete:
            return torch.arange(400, dtype=torch.float64)
        return torch.linspace(-40, 40, 16001, dtype=torch.float64)

    def cases(self) -> st.SearchStrategy[Case]:
        """Return the strategy of (circuit, seed, evidence): mixtures of inputs on one or two variables."""

        @st.composite
        def cases(draw: st.DrawFn) -> Case:
            num_units = draw(st.integers(1, 3), label="num_units")
            num_vars = draw(st.integers(1, 2), label="num_vars")
            leaves = [inputs(var, num_units, self.distribution(draw)) for var in range(num_vars)]
            circuit = Circuit(sum(product(*leaves), num_units=1))
            seed = draw(st.integers(0, 1000), label="seed")
            return Case(circuit, seed, draw(strategies.evidence(circuit)))

        return cases()

    @law
    def test_the_density_is_that_of_the_oracle(self, case: Case) -> None:
        """P(x) = sum_k w_k prod_i p(x_i) under the parameters of unit k."""
        x = queries.sample(case.pc, 20, generator=case.generator)
        terms = case.pc.log_weights(case.circuit.sums[0])[0].expand(len(x), -1).double()
        for leaf in case.circuit.inputs:
            parameters, values = case.pc.parameters_of(leaf).detach(), x[:, leaf.var].double()
            columns = []
            for unit in range(leaf.num_units):
                column = self.log_prob(leaf.distribution, parameters[:, unit], values)
                if column is None:
                    return
                columns.append(column)
            terms = terms + torch.stack(columns, 1)
        assert_close(queries.log_likelihood(case.pc, x), torch.logsumexp(terms, 1))

    @law
    def test_densities_integrate_to_one(self, case: Case) -> None:
        """Sum_v p(x_0 = v) = 1, or the integral; and missing values are integrated out."""
        total = self._masses(case)[1].sum()
        assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
        log_z = queries.log_partition(case.pc, case.nothing)
        assert_close(log_z, torch.zeros_like(log_z))

    @law
    def test_intervals_are_sums_of_the_density(self, case: Case) -> None:
        """P(a < x_0 <= b) is the sum over the values between, or the integral."""
        values, density = self._masses(case)
        lower = torch.full((1, case.circuit.num_vars), -torch.inf, dtype=torch.float64)
        upper = torch.full_like(lower, torch.inf)
        is_discrete = case.circuit.inputs[0].distribution.is_discrete
        cut = 3 if is_discrete else len(values) // 2
        upper[0, 0] = values[cut]
        expected = density[: cut + 1].sum() - (0.0 if is_discrete else density[cut] / 2)  # the trapezoidal rule
        found = queries.log_partition(case.pc, Evidence.interval(lower, upper)).exp()[0]
        assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @law
    def test_moments_are_averages_under_the_density(self, case: Case) -> None:
        """E[x_0] and Var[x_0] are sums over the values, or integrals."""
        values, p = self._masses(case)
        expected = (p * values).sum()
        assert_close(queries.mean(case.pc)[0, 0], expected, rtol=1e-4, atol=1e-4)
        assert_close(queries.variance(case.pc)[0, 0], (p * (values - expected) ** 2).sum(), rtol=1e-3, atol=1e-3)
        assert_close(queries.covariance(case.pc)[0, 0, 0], queries.variance(case.pc)[0, 0])

    @law
    def test_samples_follow_the_density(self, case: Case) -> None:
        """Kolmogorov's distance of x_0's samples from its cumulative distribution on the grid."""
        values, p = self._masses(case)
        x = queries.sample(case.pc, _NUM_SAMPLES, generator=case.generator)[:, 0].double()
        empirical = torch.searchsorted(x.sort().values, values, right=True) / len(x)
        distance = float((empirical - p.cumsum(0)).abs().max()) * math.sqrt(len(x))
        assert distance < _GREATEST_DISTANCE, f"samples are too far from their distribution: {distance:.3g}"

    @law
    def test_the_same_seed_draws_the_same_samples(self, case: Case) -> None:
        """Sampling is a function of the generator's state."""
        first, second = (queries.sample(case.pc, 20, generator=case.generator) for _ in range(2))
        assert torch.equal(first, second)

    @law
    def test_no_assignment_is_more_probable_than_the_mpe(self, case: Case) -> None:
        """Max_x max_z p(x, z) >= p(x) / K for the circuit's samples x, with K components."""
        x = queries.sample(case.pc, 50, generator=case.generator)
        score = queries.mpe(case.pc).log_score
        bound = queries.log_likelihood(case.pc, x).max() - math.log(case.circuit.inputs[0].num_units)
        assert bool(score[0] >= bound - 1e-9)

    @law
    def test_gradients_pass_gradcheck(self, case: Case) -> None:
        """The gradients of log Z in the parameters are its slopes, whatever the evidence."""
        pc = case.pc
        names = [name for name, _ in pc.named_parameters()]
        possible = pc(case.evidence) > -torch.inf
        evidence = case.evidence.rows(possible)

        def log_z(*parameters: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(pc, dict(zip(names, parameters, strict=True)), (evidence,))
            return found

        tensors = tuple(parameter.detach().clone().requires_grad_() for parameter in pc.parameters())
        torch.autograd.gradcheck(log_z, tensors, fast_mode=True, rtol=1e-4, atol=1e-5)

    @law
    def test_em_never_lowers_the_likelihood(self, case: Case) -> None:
        """Dempster, Laird and Rubin 1977, on samples of another circuit of the same structure."""
        pc = case.pc
        other = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        data = queries.sample(other, 8, generator=case.generator)
        assert_em_climbs(pc, data, num_steps=4, rounding=1e-8)

    @law
    def test_a_learning_step_on_complete_data_finds_the_best_fit(self, case: Case) -> None:
        """After one EM step of a single unit no other parameters fit better."""
        circuit = Circuit(sum(inputs(0, 1, case.circuit.inputs[0].distribution), num_units=1))
        pc = compile(circuit, dtype=torch.float64, seed=case.seed)
        data = queries.sample(pc, 8, generator=case.generator)
        before = pc(data).sum()
        learning.em_step(pc, learning.expected_flows(pc, data).flows)
        after = pc(data).sum()
        assert bool(after >= before - 1e-9)
        if self.has_exact_m_step:
            for seed in range(5):
                assert bool(after >= compile(circuit, dtype=torch.float64, seed=seed)(data).sum() - 1e-9)

    @law
    def test_every_optimizer_keeps_a_distribution(self, case: Case) -> None:
        """Full-batch and mini-batch EM and Anemone leave a finite, normalised circuit."""
        for optimizer in ("em", "minibatch_em", "anemone"):
            pc = compile(case.circuit, dtype=torch.float64, seed=case.seed)
            data = queries.sample(pc, 6, generator=case.generator)
            learning.fit(pc, data, optimizer=optimizer, num_epochs=2, batch_size=3, seed=0, progress=False)
            assert all(bool((parameter < torch.inf).all()) for parameter in pc.parameters())
            assert_close(pc(case.nothing), torch.zeros(1, dtype=torch.float64))

    @law
    def test_the_repr_is_the_code_that_builds_the_circuit(self, case: Case) -> None:
        """Executing it gives the same structure again, and the same circuit from the same seed."""
        assert_code_rebuilds(case)

    @law
    def test_saving_and_loading_keeps_every_bit(self, case: Case) -> None:
        """The loaded circuit has the same structure, parameters and answers."""
        loaded = reloaded(case.pc)
        assert repr(loaded.circuit) == repr(case.circuit)
        assert torch.equal(loaded(case.evidence), case.pc(case.evidence))

    @law
    def test_far_values_give_no_nan(self, case: Case) -> None:
        """At values of 1e4, far in the tails, log p and its gradients are numbers, in float32 too."""
        x = torch.full((1, case.circuit.num_vars), 1e4, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            pc = compile(case.circuit, dtype=dtype, seed=case.seed)
            log_p = pc(Evidence.observe(x.to(dtype)))
            assert not bool(log_p.isnan().any())
            gradients = torch.autograd.grad(log_p.sum(), list(pc.parameters()))
            assert not any(bool(gradient.isnan().any()) for gradient in gradients)

    def _masses(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return the grid's values v, (N,), and the mass of x_0 around each, its density times their distance."""
        values = self.grid(case.circuit.inputs[0].distribution)
        x = torch.zeros(len(values), case.circuit.num_vars, dtype=torch.float64)
        x[:, 0] = values
        observed = (torch.arange(case.circuit.num_vars) == 0).expand_as(x)
        with torch.no_grad():
            density = queries.log_partition(case.pc, Evidence.observe(x, observed)).exp()
        return values, density * (values[1] - values[0])
