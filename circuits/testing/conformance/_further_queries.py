"""Laws of the further queries: pairs, expectations, entropies, several explanations, divergences.

A query that needs a structural property may refuse a circuit with a PropertyError; where it answers, it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuits import queries
from circuits.engine.compile import compile
from circuits.errors import PropertyError
from circuits.evidence import Evidence
from circuits.symbolic import Node, ParametricNode
from circuits.testing.conformance._cases import Case, assert_close, law
from circuits.testing.conformance._chi_square import assert_distributed
from circuits.testing.conformance._configurations import configurations
from circuits.testing.conformance._structure_cases import StructureCases, scores_of

_NUM_SAMPLES = 500
_NUM_BEST = 3


class FurtherQueryLaws(StructureCases):
    """Queries beyond likelihood, marginals, samples and MPE, against the table of all assignments."""

    @law
    def test_pairwise_marginals_are_enumerated_ones(self, case: Case) -> None:
        """P(x_i = u, x_j = v | e) for all i, j, u, v."""
        query = queries.pairwise_marginals
        evidence = self.possible(case, lambda given: query(case.pc, given))
        if evidence.batch_size:
            assert_close(query(case.pc, evidence), self._pairs(case, evidence))

    @law
    def test_mutual_information_is_that_of_the_enumerated_pairs(self, case: Case) -> None:
        """I(X_i; X_j | e) = sum p(u, v) log p(u, v) / (p(u) p(v)), with the entropies on the diagonal."""
        query = queries.mutual_information
        evidence = self.possible(case, lambda given: query(case.pc, given))
        if evidence.batch_size:
            pairs = self._pairs(case, evidence)
            independent = pairs.sum(4, keepdim=True) * pairs.sum(3, keepdim=True)
            expected = (torch.xlogy(pairs, pairs) - torch.xlogy(pairs, independent)).sum((3, 4))
            assert_close(query(case.pc, evidence), expected)

    @law
    def test_moments_are_enumerated_averages(self, case: Case) -> None:
        """E[x_i | e], Var[x_i | e], Cov[x_i, x_j | e]."""
        mean, variance, covariance = queries.mean, queries.variance, queries.covariance
        evidence = self.possible(case, lambda given: mean(case.pc, given))
        if evidence.batch_size:
            x, p = case.assignments.double(), self.posterior(case, evidence).exp().flatten(1)
            expected = p @ x
            centred = x - expected.unsqueeze(1)  # (B, N, D)
            products = torch.einsum("bn,bni,bnj->bij", p, centred, centred)
            assert_close(mean(case.pc, evidence), expected)
            assert_close(variance(case.pc, evidence), products.diagonal(dim1=1, dim2=2))
            assert_close(covariance(case.pc, evidence), products)

    @law
    def test_expectations_are_enumerated_averages(self, case: Case) -> None:
        """E[sum_i f_i(x_i) | e] and E[prod_i f_i(x_i) | e]."""
        query = queries.expectation
        evidence = self.possible(case, lambda given: query(case.pc, torch.zeros(_size(case)).double(), given))
        if evidence.batch_size:
            functions = torch.randn(_size(case), generator=case.generator, dtype=torch.float64)
            values = functions[torch.arange(case.circuit.num_vars), case.assignments]  # (N, D)
            p = self.posterior(case, evidence).exp().flatten(1)
            assert_close(query(case.pc, functions, evidence), p @ values.sum(1))
            assert_close(query(case.pc, functions, evidence, of="product"), p @ values.prod(1))

    @law
    def test_the_cumulative_distribution_is_the_sum_below(self, case: Case) -> None:
        """P(X <= x | e) = sum of p(y | e) over all y <= x."""
        query = queries.log_cdf
        evidence = self.possible(case)
        if evidence.batch_size:
            x = case.assignments
            chosen = x[torch.randint(len(x), (evidence.batch_size,), generator=case.generator)]
            is_below = (x <= chosen.unsqueeze(1)).all(2)
            log_p = self.posterior(case, evidence).flatten(1)
            expected = torch.logsumexp(log_p.masked_fill(~is_below, -torch.inf), 1)
            assert_close(query(case.pc, chosen, evidence).exp(), expected.exp())

    @law
    def test_the_latent_entropy_is_that_of_all_explanations(self, case: Case) -> None:
        """H(X, Z | e) = -sum p(x, z | e) log p(x, z | e)."""
        query = queries.latent_entropy
        evidence = self.possible(case, lambda given: query(case.pc, given))
        if evidence.batch_size:
            log_p = torch.log_softmax(_explanation_scores(case, evidence), 1)
            assert_close(query(case.pc, evidence), -torch.xlogy(log_p.exp(), log_p.exp()).sum(1))

    @law
    def test_the_entropy_lies_between_its_bounds(self, case: Case) -> None:
        """Lower <= H(X | e) <= upper; and where the entropy itself is offered, it is exact."""
        bounds, entropy = queries.entropy_bounds, queries.entropy
        evidence = self.possible(case, lambda given: bounds(case.pc, given))
        if evidence.batch_size:
            expected = _entropy(self.posterior(case, evidence).flatten(1))
            lower, upper = bounds(case.pc, evidence)
            assert bool((lower <= expected + 1e-9).all())
            assert bool((upper >= expected - 1e-9).all())
            _assert_where_possible(expected, entropy, case.pc, evidence)

    @law
    def test_the_best_explanations_come_first(self, case: Case) -> None:
        """The k best scores of all explanations, in order; the first is the MPE's."""
        query = queries.k_best
        evidence = self.possible(case, lambda given: query(case.pc, _NUM_BEST, given))
        if evidence.batch_size:
            scores = _explanation_scores(case, evidence)
            best = torch.cat([scores, scores.new_full((len(scores), _NUM_BEST), -torch.inf)], 1).topk(_NUM_BEST, 1)
            assignment, log_score = query(case.pc, _NUM_BEST, evidence)
            assert_close(log_score, best.values)
            assert_close(log_score[:, 0], queries.mpe(case.pc, evidence).log_score)
            assert bool(((assignment >= 0).all(2) == (log_score > -torch.inf)).all())

    @law
    def test_samples_without_replacement_are_distinct(self, case: Case) -> None:
        """As many draws as there are assignments are all possible ones; the first follows the posterior."""
        query = queries.sample_without_replacement
        evidence = self.possible(case, lambda given: query(case.pc, 1, given))
        if not evidence.batch_size:
            return
        log_p = self.posterior(case, evidence)
        x = case.assignments
        drawn = query(case.pc, len(x), evidence, case.generator)
        for position in range(evidence.batch_size):
            possible = x[log_p[position].flatten().exp() > 0]
            found = drawn.assignment[position][drawn.log_prob[position] > -torch.inf]
            assert len(found) == len(found.unique(dim=0))
            assert {tuple(row) for row in possible.tolist()} >= {tuple(row) for row in found.tolist()}
            expected = log_p[position][tuple(found.t())]
            assert_close(drawn.log_prob[position][: len(found)], expected)
            assert_close(expected.exp().sum(), torch.ones(()).double())

        def first(num_samples: int) -> Tensor:
            repeated = evidence.rows(torch.zeros(num_samples, dtype=torch.int64))
            found: Tensor = query(case.pc, 1, repeated, case.generator).assignment
            return found

        assert_distributed(first, log_p[:1], _NUM_SAMPLES)

    @law
    def test_inner_products_are_enumerated_sums(self, case: Case) -> None:
        """Log sum_x p(x) q(x) prod_i e_i(x_i), and the Cauchy-Schwarz divergence made of three of them."""
        inner, cauchy_schwarz = queries.log_inner_product, queries.cauchy_schwarz_divergence
        q = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        log_p, log_q = (self.log_joint(pc).flatten() for pc in (case.pc, q))
        scores = scores_of(case, case.factors)
        found = _where_possible(inner, case.pc, q, case.evidence)
        if found is not None:
            assert_close(found, torch.logsumexp(log_p + log_q + scores, 1))
        evidence = self.possible(case)
        if evidence.batch_size and found is not None:
            cross, own_p, own_q = (
                torch.logsumexp(one + other + 2 * scores_of(case, _dense(case, evidence)), 1)
                for one, other in ((log_p, log_q), (log_p, log_p), (log_q, log_q))
            )
            _assert_where_possible(0.5 * (own_p + own_q) - cross, cauchy_schwarz, case.pc, q, evidence)

    @law
    def test_divergences_are_enumerated_sums(self, case: Case) -> None:
        """Cross-entropy, Kullback-Leibler and Renyi divergence of two circuits with one structure."""
        evidence = self.possible(case)
        if not evidence.batch_size:
            return
        q = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        scores = scores_of(case, _dense(case, evidence))
        log_p, log_q = (torch.log_softmax(self.log_joint(pc).flatten() + scores, 1) for pc in (case.pc, q))
        p = log_p.exp()
        if bool((log_q[p > 0] == -torch.inf).any()):
            return
        surprise = -torch.where(p > 0, p * log_q, 0.0).sum(1)
        renyi = torch.logsumexp(torch.where(p > 0, 2 * log_p - log_q, -torch.inf), 1)
        _assert_where_possible(surprise, queries.cross_entropy, case.pc, q, evidence, within=1e-7)
        _assert_where_possible(surprise - _entropy(log_p), queries.kl_divergence, case.pc, q, evidence, within=1e-7)
        _assert_where_possible(renyi, queries.renyi_divergence, case.pc, q, 2.0, evidence, within=1e-7)

    @law
    def test_the_probability_of_an_order_is_the_sum_over_ordered_assignments(self, case: Case) -> None:
        """P(x_0 <= x_1 <= ... | e), and with < in place of <=."""
        query = queries.order_log_probability
        evidence = self.possible(case)
        if not evidence.batch_size:
            return
        steps = case.assignments.diff(dim=1)
        p = self.posterior(case, evidence).exp().flatten(1)
        for strict, is_ordered in ((False, (steps >= 0).all(1)), (True, (steps > 0).all(1))):
            found = _where_possible(query, case.pc, evidence, strict=strict)
            if found is not None:
                assert_close(found.exp(), (p * is_ordered).sum(1))

    @law
    def test_the_probability_of_acceptance_is_the_sum_over_accepted_assignments(self, case: Case) -> None:
        """P(x_0 + ... + x_D-1 is even | e), by the automaton of two states that adds up what it reads."""
        evidence = self.possible(case)
        if not evidence.batch_size:
            return
        transition = (torch.arange(2).unsqueeze(1) + torch.arange(case.num_values)) % 2
        parity = queries.Automaton.deterministic(transition, [0])
        found = _where_possible(queries.automaton_log_probability, case.pc, parity, evidence)
        if found is not None:
            is_even = case.assignments.sum(1) % 2 == 0
            p = self.posterior(case, evidence).exp().flatten(1)
            assert_close(found.exp(), (p * is_even).sum(1))

    def _pairs(self, case: Case, evidence: Evidence) -> Tensor:
        """Return the table of p(x_i = u, x_j = v | e), (B, D, D, C, C)."""
        is_value = torch.nn.functional.one_hot(case.assignments, case.num_values).double()  # (N, D, C)
        p = self.posterior(case, evidence).exp().flatten(1)
        return torch.einsum("bn,niu,njv->bijuv", p, is_value, is_value)


def _where_possible(query: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor | None:
    """Return the query's answer; None where it refuses a circuit that lacks a structural property."""
    try:
        return query(*args, **options)
    except PropertyError:
        return None


def _assert_where_possible(expected: Tensor, query: Callable[..., Tensor], *args: Any, within: float = 1e-9) -> None:
    found = _where_possible(query, *args)
    if found is not None:
        assert_close(found, expected, rtol=within, atol=within)


def _size(case: Case) -> tuple[int, int]:
    return case.circuit.num_vars, case.num_values


def _dense(case: Case, evidence: Evidence) -> Tensor:
    return evidence.dense(case.num_values, torch.float64)


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum(1)


def _explanation_scores(case: Case, evidence: Evidence) -> Tensor:
    """Return ``log p(x, z) prod_i e_i(x_i)`` of every configuration z and assignment x that it allows, (B, Z * N)."""
    scores = scores_of(case, _dense(case, evidence))
    x = case.assignments
    parametric: list[ParametricNode] = [*case.circuit.sums, *case.circuit.inputs]
    log_weights: dict[Node, Tensor] = {node: case.pc.log_weights(node).detach() for node in parametric}
    explanations = []
    for edges, leaves in configurations(case.circuit):
        total = torch.zeros(len(x), dtype=torch.float64)
        for node, unit, index in edges:
            total = total + log_weights[node][unit, index]
        for leaf, unit in leaves:
            total = total + log_weights[leaf][x[:, leaf.var], unit]
        explanations.append(total)
    return (torch.stack(explanations) + scores.unsqueeze(1)).flatten(1)
