"""Latent variables: posteriors of which child a sum node uses, draws of them, and which class a query belongs to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, MaxSemiring
from circuits.arguments import check_integers, check_range, checked_count, checked_possible
from circuits.engine.adjoint import latent_gradients
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.queries.common import Rows, SumPlaces, detached, places_of_sums, query, require_finite_values
from circuits.queries.temperature import choosing_semiring
from circuits.randomness import Source
from circuits.symbolic import Sum
from circuits.weights.given import Reached


@query
@detached
def latent_marginals(
    pc: CompiledCircuit,
    evidence: Evidence,
    nodes: Sequence[Sum | str] | None = None,
    *,
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Mapping[Sum | str, Tensor]:
    """Return the posterior of latent variables: how probably each child unit of a sum node is used, given evidence.

    That is ``d log Z / d log f_i`` at f = 1, for a factor f_i on child unit i wherever the node uses it (Darwiche
    2003), all nodes in one pass. In an HMM, the posterior of node ``"transition3"`` is that of the state of step 4.

    Args:
        pc: the circuit.
        evidence: for B queries.
        nodes: sum nodes, or their names; None: all sum nodes.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.
        differentiable: whether the result is differentiable in evidence and weights, at more time and memory.

    Returns:
        By node, or name where that was given: (B, I). Rows sum to the probability that the node is used at all: 1 in
        chains and trees of latents, less where a sum above chooses among several nodes.

    Raises:
        ArgumentError: a node that is no sum node of the circuit.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    if not isinstance(nodes, Iterable | None) or isinstance(nodes, str):
        raise ArgumentError(f"nodes: expected sum nodes or their names in a list, got {type(nodes).__name__}")
    question, places = Question(pc, evidence, weights), places_of_sums(pc)
    keys: Sequence[Sum | str] = pc.circuit.sums if nodes is None else list(nodes)
    if differentiable or question.weights.given:
        targets = [pc.sum_node(key) for key in keys]
        parts = question.gradients(targets).split([node.parameter_shape[1] for node in targets], 1)
        return dict(zip(keys, parts, strict=True))
    if nodes is None:
        return Rows(_posteriors(question, places, places.layers.keys()), cast(Mapping[Any, Any], places.rows))
    rows = {key: places.rows[pc.sum_node(key)] for key in keys}
    return Rows(_posteriors(question, places, {table for table, _ in rows.values()}), rows)


@dataclass(frozen=True, eq=False)
class LatentChoice:
    """One configuration of the latents for each of n columns: which child every reached sum unit uses.

    Given the latents the variables are independent, each distributed as the input unit that was reached.

    Attributes:
        pc: the circuit.
        units: the unit that was reached of every node of each input layer, -1 where none was, a list of (F, n).
        query: which of the B queries each column belongs to, int64 (n,).
        weights: that the choice was made with.
    """

    pc: CompiledCircuit
    units: Sequence[Tensor]
    query: Tensor
    weights: CircuitWeights

    def log_weights(self, values: Tensor | None = None) -> Tensor:
        """Return ``log p(x_i = v | z)``, of all values or of some.

        Args:
            values: int64 (n, D, k), values of every variable; None: all, 0 .. C - 1.

        Returns:
            (n, D, C), -inf at values that a variable does not have, or (n, D, k).

        Raises:
            ArgumentError: ``values`` has a wrong shape, dtype or value.
        """
        pc, num_columns = self.pc, len(self.query)
        if values is None:
            shape: tuple[int, ...] = (num_columns, pc.circuit.num_vars, max(pc.circuit.num_categories))
        else:
            check_integers("values", values, f"int64 ({num_columns}, {pc.circuit.num_vars}, k)", dim=3)
            check_range(values, pc.num_categories.unsqueeze(-1), "values")
            shape = tuple(values.shape)
        result = torch.full(shape, -torch.inf, dtype=pc.dtype, device=pc.device)
        for position, (layer, reached) in enumerate(zip(pc.input_layers, self.units, strict=True)):
            node, column = (reached >= 0).nonzero(as_tuple=True)
            unit, variable = reached[node, column], layer.variables[node]
            bank = self.weights.own[layer.parameter_rows.bank].log  # (P, C, K)
            wanted = torch.arange(bank.shape[1], device=pc.device) if values is None else values[column, variable]
            wanted = wanted.expand(len(node), -1)
            rows = bank[layer.parameter_rows.index[node].unsqueeze(1), wanted, unit.unsqueeze(1)]
            if position in self.weights.given:
                given = self.weights.given[position]
                rows = given.replaced(rows, wanted, Reached(node, unit, self.query[column]))
            if values is None:
                result[column, variable, : rows.shape[1]] = rows
            else:
                result[column, variable] = rows
        return result


@query
@torch.no_grad()
def sample_latents(
    pc: CompiledCircuit,
    num_samples: int,
    evidence: Evidence | None = None,
    generator: Source = None,
    *,
    temperature: float = 1.0,
    weights: CircuitWeights | None = None,
) -> LatentChoice:
    """Draw the latents from their posterior ``p(z | e)``, or from its power 1 / tau, with the variables summed out.

    Args:
        pc: a circuit with finitely many values per variable.
        num_samples: S >= 1, draws per query.
        evidence: for B queries; None: no evidence, B = 1.
        generator: on the circuit's device; the same state gives the same draws on one machine. Or
            :class:`~circuits.randomness.RowGenerators`, one per query.
        temperature: tau >= 0: draw from ``p(z | e)^(1 / tau)``, normalised; 0 takes the best, see :func:`best_latents`.
            Latents of which nothing is known are not tempered.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        The draws as S * B columns, all queries of the first draw before those of the second.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
        PropertyError: a variable has infinitely many values.
    """
    checked_count("num_samples", num_samples)
    return _chosen(pc, choosing_semiring(temperature), num_samples, evidence, generator, weights)


@query
@torch.no_grad()
def best_latents(
    pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
) -> LatentChoice:
    """Return the most probable latents ``argmax_z p(z | e)``, with the variables summed out (the Viterbi path).

    It is for what comes after: what the variables are, given the latents. The states by name, the path of an HMM and
    the score are those of :func:`viterbi`; :func:`mpe` maximises over latents and values together.

    Args:
        pc: a circuit with finitely many values per variable.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        The best configuration of every query as B columns.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
        PropertyError: a variable has infinitely many values.
    """
    return _chosen(pc, MaxSemiring(), 1, evidence, None, weights)


def _posteriors(question: Question, places: SumPlaces, wanted: Collection[int]) -> dict[int, Tensor]:
    """Return what :meth:`Question.gradients` does of latents, detached, of whole tables: (n, B, I)."""
    question.require_one_root()
    pc, batch_size = question.pc, question.evidence.batch_size
    zero = torch.zeros((), dtype=pc.dtype, device=pc.device)
    none = {node: zero.expand(batch_size, node.parameter_shape[1]) for node in places.outside}
    asked = question.with_latents({node: log for node, log in none.items() if places.rows[node][0] in wanted})
    root, by_layer = latent_gradients(asked)
    checked_possible(asked.mixed(LogSemiring(), root.unsqueeze(0)))
    unused = {
        places.rows[node][0]: log.expand(pc.sum_layers[pc.address(node)[0]], -1, -1) for node, log in none.items()
    }
    return {name: places.table(by_layer, name).mT if name in by_layer else unused[name] for name in wanted}


def _chosen(
    pc: CompiledCircuit,
    semiring: ChoosingSemiring,
    num_samples: int,
    evidence: Evidence | None,
    generator: Source,
    weights: CircuitWeights | None,
) -> LatentChoice:
    require_finite_values(pc, "choosing latents")
    question = Question(pc, evidence, weights)
    if not isinstance(semiring, LogSemiring):
        question = question.silenced()
    summed_out = question.with_inputs(question.inputs(LogSemiring()))  # the values, whatever chooses the latents
    choice = summed_out.choose(semiring, num_samples, generator)
    return LatentChoice(pc, choice.units, choice.query, question.weights)


@query
def class_posterior(
    pc: CompiledCircuit, evidence: Evidence, log_prior: Tensor | None = None, *, weights: CircuitWeights | None = None
) -> Tensor:
    """Return ``p(class | e) = p(e | class) p(class) / p(e)`` of a circuit with ``num_classes``.

    Args:
        pc: the circuit, with R classes.
        evidence: for B queries, without a class.
        log_prior: log p(class), up to a constant, (R,) or (B, R); None: all classes are equally probable.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, R), rows sum to 1; differentiable.

    Raises:
        PropertyError: the circuit has no classes.
        ImpossibleEvidenceError: the evidence is impossible under every class of the prior.
    """
    if pc.circuit.num_classes is None:
        raise PropertyError(f"class_posterior: {pc.circuit} has one root unit; build it with num_classes=")
    if evidence.classes is not None:
        raise ArgumentError("evidence: it names the class already; leave that out, a prior goes into log_prior")
    joint = pc.log_partition(evidence, weights)
    if log_prior is not None:
        joint = joint + log_prior.to(joint)
    checked_possible(joint.detach().amax(1))
    return torch.softmax(joint, 1)
