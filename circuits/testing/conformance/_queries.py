"""Laws of the basic queries: each equals its definition, evaluated on the table of all assignments."""

from __future__ import annotations

import torch

from circuits import queries
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import Case, assert_close, law
from circuits.testing.conformance._chi_square import assert_distributed
from circuits.testing.conformance._structure_cases import StructureCases, scores_of
from circuits.testing.oracle import enumerated_log_partition, enumerated_marginals

_NUM_SAMPLES = 1000


class QueryLaws(StructureCases):
    """Likelihood, marginals, conditionals, samples, and the most probable explanation."""

    @law
    def test_the_structure_is_smooth_and_decomposable(self, case: Case) -> None:
        """Which is what makes every other law possible."""
        assert case.circuit.is_smooth
        assert case.circuit.is_decomposable

    @law
    def test_probabilities_sum_to_one(self, case: Case) -> None:
        """Sum_x p(x) = 1, by adding up and as the partition function of no evidence."""
        total = case.pc(case.assignments).exp().sum()
        assert_close(total, torch.ones_like(total))
        log_z = queries.log_partition(case.pc, case.nothing)
        assert_close(log_z, torch.zeros_like(log_z))

    @law
    def test_the_likelihood_is_the_joint(self, case: Case) -> None:
        """Log p(x) is the oracle's, for all x."""
        assert_close(queries.log_likelihood(case.pc, case.assignments), self.log_joint(case.pc).flatten())

    @law
    def test_the_partition_function_is_the_sum_over_all_assignments(self, case: Case) -> None:
        """Log Z(e) = log sum_x p(x) prod_i e_i(x_i)."""
        expected = enumerated_log_partition(self.log_joint(case.pc), case.evidence)
        assert_close(queries.log_partition(case.pc, case.evidence), expected)

    @law
    def test_the_marginal_sums_out_what_is_not_observed(self, case: Case) -> None:
        """P(x_O) = sum_rest p(x_O, rest)."""
        x = case.assignments
        observed = _some(case).expand_as(x)
        expected = enumerated_log_partition(self.log_joint(case.pc), Evidence.observe(x, observed))
        assert_close(queries.log_marginal(case.pc, x, observed), expected)

    @law
    def test_the_conditional_is_the_joint_over_the_marginal(self, case: Case) -> None:
        """P(rest | x_O) = p(x) / p(x_O)."""
        joint = self.log_joint(case.pc)
        x, observed = case.assignments, _some(case).expand_as(case.assignments)
        log_marginal = enumerated_log_partition(joint, Evidence.observe(x, observed))
        possible = log_marginal > -torch.inf
        found = queries.log_conditional(case.pc, x[possible], observed[possible])
        assert_close(found, (joint.flatten() - log_marginal)[possible])

    @law
    def test_posterior_marginals_are_enumerated_ones(self, case: Case) -> None:
        """P(x_i = v | e) for every i and v; each row sums to 1."""
        evidence = self.possible(case, lambda given: queries.marginals(case.pc, given))
        found = queries.marginals(case.pc, evidence)
        assert_close(found, enumerated_marginals(self.log_joint(case.pc), evidence))
        assert_close(found.sum(2), torch.ones_like(found[..., 0]))

    @law
    def test_the_marginal_and_the_partition_function_agree(self, case: Case) -> None:
        """P(x_i = v | e) = Z(e and x_i = v) / Z(e), by two different passes."""
        evidence = self.possible(case)
        factors = evidence.dense(case.num_values, torch.float64)
        log_z = queries.log_partition(case.pc, evidence)
        found = queries.marginals(case.pc, evidence)
        for value in range(case.circuit.num_categories[0]):
            fixed = factors.clone()
            fixed[:, 0, torch.arange(case.num_values) != value] = -torch.inf
            share = (queries.log_partition(case.pc, Evidence.soft(fixed)) - log_z).exp()
            assert_close(found[:, 0, value], share)

    @law
    def test_samples_follow_the_posterior(self, case: Case) -> None:
        """X ~ p(x | e), by a chi-square test against the enumerated posterior."""
        evidence = self.possible(case, lambda given: queries.sample(case.pc, 1, given))
        if evidence.batch_size:
            posterior = self.posterior(case, evidence)

            def draw(num_samples: int) -> torch.Tensor:
                return queries.sample(case.pc, num_samples, evidence, case.generator)

            assert_distributed(draw, posterior, _NUM_SAMPLES)

    @law
    def test_samples_follow_the_joint(self, case: Case) -> None:
        """X ~ p(x), by a chi-square test against the joint."""

        def draw(num_samples: int) -> torch.Tensor:
            return queries.sample(case.pc, num_samples, generator=case.generator).unsqueeze(1)

        assert_distributed(draw, self.log_joint(case.pc).unsqueeze(0), _NUM_SAMPLES)

    @law
    def test_the_same_seed_draws_the_same_samples(self, case: Case) -> None:
        """Sampling is a function of the generator's state."""
        first, second = (queries.sample(case.pc, 20, generator=case.generator) for _ in range(2))
        assert torch.equal(first, second)

    @law
    def test_the_mpe_is_the_best_explanation(self, case: Case) -> None:
        """Max_x max_z p(x, z) prod_i e_i(x_i): the score is the maximum and the assignment attains it."""
        evidence = self.possible(case, lambda given: queries.mpe(case.pc, given))
        factors = evidence.dense(case.num_values, torch.float64)
        scores = self.log_best_explanation(case.pc).flatten() + scores_of(case, factors)
        assignment, log_score = queries.mpe(case.pc, evidence)
        if evidence.batch_size:
            assert_close(log_score, scores.amax(1))
            attained = scores[(assignment.unsqueeze(1) == case.assignments).all(2)]
            assert_close(attained, log_score)

    @law
    def test_a_batch_is_its_queries_one_by_one(self, case: Case) -> None:
        """No query of a batch depends on another, and a batch of one works."""
        evidence = self.possible(case)
        singles = [evidence.rows(slice(b, b + 1)) for b in range(evidence.batch_size)]
        for query in (queries.log_partition, queries.marginals, lambda pc, given: queries.mpe(pc, given).log_score):
            together = query(case.pc, evidence)
            for position, single in enumerate(singles):
                assert_close(query(case.pc, single), together[position : position + 1])

    @law
    def test_all_forms_of_evidence_say_the_same(self, case: Case) -> None:
        """Hard, missing and listed evidence is soft evidence, in value and in the gradient of the weights."""
        dense = Evidence.soft(case.factors)
        parameters = list(case.pc.parameters())
        found = []
        for evidence in (case.evidence, dense):
            log_z = case.pc(evidence)
            gradients = torch.autograd.grad(log_z[log_z > -torch.inf].sum(), parameters)
            found.append([log_z, *gradients])
        for one, other in zip(*found, strict=True):
            assert_close(one, other)


def _some(case: Case) -> torch.Tensor:
    """Choose which variables are observed, bool (1, D), as a function of the seed."""
    return torch.rand(1, case.circuit.num_vars, generator=case.generator) < 0.5
