"""Laws of learning: expected flows are posterior counts, EM is the textbook's, every optimizer keeps a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits import learning, queries
from circuits.engine.compile import CompiledCircuit
from circuits.families import Bernoulli, Categorical
from circuits.learning.optimizers import EMName, OptimizerFactory
from circuits.symbolic import Input
from circuits.testing.conformance._cases import Case, assert_close, assert_em_climbs, law
from circuits.testing.conformance._configurations import configurations
from circuits.testing.conformance._structure_cases import StructureCases


class LearningLaws(StructureCases):
    """Flows, EM steps, and fits."""

    @law
    def test_expected_flows_are_posterior_counts(self, case: Case) -> None:
        """F = sum_b E[number of uses of the weight | e_b], over all latent configurations, where something is known."""
        flows, log_likelihood = learning.expected_flows(case.pc, case.evidence)
        assert_close(log_likelihood, queries.log_partition(case.pc, case.evidence))
        nothing = case.evidence.levelled(case.pc.num_categories)[0].says_nothing(case.pc.num_categories)
        expected = _posterior_counts(case.pc, case.factors, nothing)
        for name, flow in flows.items():
            assert_close(flow, expected[name])

    @law
    def test_top_down_flows_are_prior_counts(self, case: Case) -> None:
        """TD(n) w_nc is how often the circuit's own samples use a weight."""
        factors = torch.zeros(1, case.circuit.num_vars, case.num_values, dtype=torch.float64)
        expected = _posterior_counts(case.pc, factors, None)
        for name, flow in learning.top_down_flows(case.pc).items():
            assert_close(flow, expected[name])

    @law
    def test_samples_count_as_often_as_their_weights_say(self, case: Case) -> None:
        """The flows of a weighted batch are the weighted sum of the flows of its samples."""
        counts = torch.linspace(0.0, 2.0, case.evidence.batch_size, dtype=torch.float64)
        together, _ = learning.expected_flows(case.pc, case.evidence, counts)
        for name, flow in together.items():
            parts = [
                counts[b] * learning.expected_flows(case.pc, case.evidence.rows(slice(b, b + 1))).flows[name]
                for b in range(len(counts))
            ]
            assert_close(flow, torch.stack(parts).sum(0))

    @law
    def test_em_never_lowers_the_likelihood(self, case: Case) -> None:
        """Dempster, Laird and Rubin 1977; and zero weights stay zero."""
        pc = case.pc
        zeros = {name: weights.log == -torch.inf for name, weights in pc.weights().own.items()}
        assert_em_climbs(pc, case.evidence)
        for name, weights in pc.weights().own.items():
            assert bool((weights.log[zeros[name]] == -torch.inf).all())
        _assert_distributions(pc)

    @law
    def test_an_em_step_mixes_old_weights_with_posterior_shares(self, case: Case) -> None:
        """W' = (1 - s) w + s (F + a / |ch|) / (F_n + a), for sums and categorical inputs with flow; others keep w."""
        pc, step_size, pseudocount = case.pc, 0.3, 0.5
        flows, _ = learning.expected_flows(pc, case.evidence)
        old = {name: weights.log.exp() for name, weights in pc.weights().own.items()}
        learning.em_step(pc, flows, step_size=step_size, pseudocount=pseudocount)
        is_table = (Categorical, Bernoulli)
        others = {
            pc.bank_address(leaf)[0] for leaf in case.circuit.inputs if not isinstance(leaf.distribution, is_table)
        }
        for name, weights in pc.weights().own.items():
            if name in others:
                continue
            total = flows[name].sum(_axis(name), keepdim=True)
            is_possible = (old[name] > 0).double()
            prior = pseudocount * is_possible / is_possible.sum(_axis(name), keepdim=True)
            mixed = (1 - step_size) * old[name] + step_size * (flows[name] + prior) / (total + pseudocount)
            assert_close(weights.log.exp(), torch.where(total > 0, mixed, old[name]))

    @law
    def test_full_batch_em_keeps_a_distribution(self, case: Case) -> None:
        """All weights stay finite and normalised."""
        _fitted(case, "em")

    @law
    def test_minibatch_em_keeps_a_distribution(self, case: Case) -> None:
        """All weights stay finite and normalised."""
        _fitted(case, "minibatch_em")

    @law
    def test_anemone_keeps_a_distribution(self, case: Case) -> None:
        """All weights stay finite and normalised."""
        _fitted(case, "anemone")

    @law
    def test_adam_keeps_a_distribution(self, case: Case) -> None:
        """All weights stay finite and normalised."""
        _fitted(case, lambda parameters: torch.optim.Adam(parameters, lr=0.05))

    @law
    def test_the_same_seed_fits_the_same_weights(self, case: Case) -> None:
        """A fit is a function of its arguments."""
        first = {name: parameter.clone() for name, parameter in _fitted(case, "minibatch_em").items()}
        case.pc.randomize(seed=case.seed)
        for name, parameter in _fitted(case, "minibatch_em").items():
            assert torch.equal(parameter, first[name])


def _fitted(case: Case, optimizer: EMName | OptimizerFactory) -> dict[str, Tensor]:
    """Fit the circuit to samples of its own, check that it is a distribution still, and return its parameters."""
    pc = case.pc
    data = queries.sample(pc, 5, generator=case.generator)
    result = learning.fit(pc, data, optimizer=optimizer, num_epochs=2, batch_size=3, seed=case.seed, progress=False)
    assert torch.tensor(result.train_log_likelihood).isfinite().all()
    _assert_distributions(pc)
    log_z = queries.log_partition(pc, case.nothing)
    assert_close(log_z, torch.zeros_like(log_z))
    return {name: parameter.detach() for name, parameter in pc.bank.items()}


def _assert_distributions(pc: CompiledCircuit) -> None:
    with torch.no_grad():
        for name, weights in pc.weights().own.items():
            assert not bool(weights.log.isnan().any())
            total = weights.log.exp().sum(_axis(name))
            assert_close(total, torch.ones_like(total))


def _axis(bank: str) -> int:
    """Return the axis along which the weights of a bank sum to 1."""
    return -1 if bank.startswith("sum") else -2


def _posterior_counts(pc: CompiledCircuit, factors: Tensor, nothing: Tensor | None) -> dict[str, Tensor]:
    """Return the expected number of uses of every weight, per bank, by enumeration; impossible queries count zero.

    Nodes on whose variables nothing is known, bool (B, D), are not counted: they are the constant 1.
    """
    with torch.no_grad():
        weights = {name: weights.log.exp() for name, weights in pc.weights().own.items()}
    counts = {name: torch.zeros_like(table) for name, table in weights.items()}
    everything = configurations(pc.circuit)
    for query in range(len(factors)):
        known = [nothing is None or not bool(nothing[query, var]) for var in range(pc.circuit.num_vars)]
        shares = {leaf: _shares(pc, leaf, factors[query], known[leaf.var]) for leaf in pc.circuit.inputs}
        products = []
        for edges, leaves in everything:
            factors_of = [pc.log_weights(node)[unit, index].detach().exp() for node, unit, index in edges]
            factors_of += [shares[leaf][:, unit].sum() for leaf, unit in leaves]
            products.append(torch.stack(factors_of).prod())
        posterior = torch.stack(products)
        if not bool(posterior.sum() > 0):
            continue
        for probability, (edges, leaves) in zip(posterior / posterior.sum(), everything, strict=True):
            if probability == 0:
                continue
            for node, unit, index in edges:
                if any(known[var] for var in node.scope):
                    bank, row = pc.bank_address(node)
                    counts[bank][row, unit, index] += probability
            for leaf, unit in leaves:
                if known[leaf.var]:
                    bank, row = pc.bank_address(leaf)
                    counts[bank][row, :, unit] += probability * shares[leaf][:, unit] / shares[leaf][:, unit].sum()
    return counts


def _shares(pc: CompiledCircuit, leaf: Input, factors: Tensor, is_known: bool) -> Tensor:
    """Return e(v) w(v) of every value and unit, (C, K); of a missing variable the weights alone."""
    weights = pc.log_weights(leaf).detach().exp()
    return weights * factors[leaf.var, : len(weights)].exp().unsqueeze(1) if is_known else weights
