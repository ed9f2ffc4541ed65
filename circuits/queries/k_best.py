"""The k most probable explanations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.arguments import checked_count, checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.layers import ProductLayer, SumLayer, chunks
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.evidence import Evidence
from circuits.queries.common import MAX_NUMBERS, dense_evidence, has_one_explanation, query
from circuits.weights.given import Reached


class KBestExplanations(NamedTuple):
    """The k best *joint* configurations of latents (sum choices) and leaves, all distinct, best first.

    Distinct explanations may share an assignment and differ in their latents only. In a deterministic circuit they
    cannot; then the query returns :class:`KBestAssignments`.
    """

    assignment: Tensor
    """int64 (B, k, D); -1 where a query has fewer than k explanations of positive probability."""
    log_score: Tensor
    """(B, k): log of p(x, z | circuit) prod_i e_i(x_i), descending; -inf where there is no explanation."""


class KBestAssignments(KBestExplanations):
    """The k most probable assignments: :class:`KBestExplanations` of a deterministic circuit, all different."""


class KBestSemiring(Semiring):
    """The ``k`` largest log-scores, in descending order along one trailing dimension, -inf where there are fewer.

    Of every unit the k best explanations, in order (Huang and Chiang 2005, "Better k-best Parsing").
    """

    def __init__(self, k: int) -> None:
        self.k = k
        # The (i+1)(j+1) pairs of ranks up to (i, j) are all at least as good, so only pairs with few of them qualify.
        self.left_ranks = torch.tensor([i for i in range(k) for j in range(k // (i + 1))])
        self.right_ranks = torch.tensor([j for i in range(k) for j in range(k // (i + 1))])

    def lift(self, log_values: Tensor) -> Tensor:
        """Read each log-value as the score of one explanation."""
        return torch.nn.functional.pad(log_values.unsqueeze(-1), (0, self.k - 1), value=-torch.inf)

    def candidates(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the scores of the pairs that may be among the k best, (..., n) in the order of the rank lists."""
        return left[..., self.left_ranks.to(left.device)] + right[..., self.right_ranks.to(left.device)]

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the k best sums of a left and a right score."""
        return self.candidates(left, right).topk(self.k, -1).values

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the k best of all weighted children's scores, in chunks of output units that bound the memory."""
        chunk = max(1, MAX_NUMBERS // max(1, x.numel()))
        pieces = []
        for part in log_weights.split(chunk, 1):
            scores = (part[..., None, None] + x.unsqueeze(1)).movedim(2, 3).flatten(3)  # (F, O, B, I * k)
            pieces.append(scores.topk(self.k, -1).values)
        return torch.cat(pieces, 1)


class _Choices(NamedTuple):
    """What was reached of one node vector in each column: unit and rank, (F, n); unit -1 where it was not reached."""

    unit: Tensor
    rank: Tensor


_Choice = tuple[int | Tensor, _Choices]
"""Of which child, the same for all of n nodes or one each, and what of it."""


@query
@torch.no_grad()
def k_best(
    pc: CompiledCircuit, k: int, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
) -> KBestExplanations:
    """Return the k best explanations: the k-best semiring upward, then every rank's choices downward.

    An explanation is one choice of a child for every reached sum unit and one value for every reached input unit.
    Needs a smooth and decomposable circuit, which all circuits here are; time and memory are those of :func:`mpe`, k
    times (Huang and Chiang 2005, algorithm 1, with candidate pairs of ranks only).

    Args:
        pc: the circuit.
        k: how many, >= 1.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        ``(assignment, log_score)``: int64 (B, k, D) and (B, k), best first. Explanations are distinct, but may share an
        assignment unless the type is :class:`KBestAssignments` (deterministic circuits).

    Raises:
        ArgumentError: ``k`` is not a positive integer.
        ImpossibleEvidenceError: no explanation is possible for some query.
    """
    checked_count("k", k)
    question, semiring = Question(pc, dense_evidence(pc, evidence, weights), weights), KBestSemiring(k)
    values = question.upward(semiring)
    log_score = question.mixed(semiring, values[-1])  # (B, k)
    checked_possible(log_score[:, 0])
    query, rank = (log_score > -torch.inf).nonzero(as_tuple=True)
    assignment = torch.full((len(log_score), k, pc.circuit.num_vars), -1, device=pc.device)
    assignment[query, rank] = _descend(question, semiring, values, query, rank)
    is_one = has_one_explanation(pc, question.evidence)
    return (KBestAssignments if is_one else KBestExplanations)(assignment, log_score)


def _descend(
    question: Question, semiring: KBestSemiring, values: Sequence[Tensor], query: Tensor, rank: Tensor
) -> Tensor:
    """Return the assignment of the root's explanation ``rank`` (n,) of each ``query`` (n,): int64 (n, D).

    The ranking of a reached unit is recomputed by a stable sort, so different ranks always have different choices.
    """
    pc, num_inputs = question.pc, len(question.pc.input_layers)
    reached = []
    for num_nodes, _ in pc.layer_sizes:
        unreached = torch.full((num_nodes, len(query)), -1, device=query.device)
        reached.append(_Choices(unreached, torch.zeros_like(unreached)))
    root = _root_choice(question, semiring, values[-1], query, rank)
    reached[-1].unit.copy_(root.unit)
    reached[-1].rank.copy_(root.rank)
    for position in reversed(range(num_inputs, len(pc.layer_sizes))):
        layer = pc.inner_layers[position - num_inputs]
        units, ranks = reached[position]
        nodes, columns = (units >= 0).nonzero(as_tuple=True)
        width = semiring.k * (len(semiring.left_ranks) if isinstance(layer, ProductLayer) else sum(layer.child_units))
        for part in chunks(len(nodes), width):
            node, column = nodes[part], columns[part]
            at = Reached(node, units[node, column], query[column])
            if isinstance(layer, ProductLayer):
                choices: list[_Choice] = _split_product(layer, semiring, values, at, ranks[node, column])
            else:
                log_weights = _log_weights(question, position, layer, at)
                choices = [_choose_child(layer, semiring, values, log_weights, at, ranks[node, column])]
            for slot, choice in choices:
                for which, numbers in enumerate(choice):
                    layer.reach([below[which] for below in reached], node, column, [(slot, numbers)])
    return _values(question, reached[:num_inputs], query)


def _log_weights(question: Question, position: int, layer: SumLayer, at: Reached) -> Tensor:
    """Return the log-weights of n reached sum units, times the factors on their children, (n, I)."""
    own, given = question.weights.own[layer.parameter_rows.bank], question.weights.given.get(position)
    log_weights = own.log[layer.parameter_rows.index[at.node], at.unit]
    if given is not None:
        log_weights = given.replaced(log_weights, at)
    latents = question.latents.get(position)
    return log_weights if latents is None else latents.added(log_weights, at.node, at.query)


def _values(question: Question, reached: Sequence[_Choices], query: Tensor) -> Tensor:
    """Return the values of given ranks of the input units that were reached: int64 (n, D)."""
    pc, evidence = question.pc, question.evidence
    values = torch.zeros(len(query), pc.circuit.num_vars, dtype=torch.int64, device=query.device)
    for position, (layer, (units, ranks)) in enumerate(zip(pc.input_layers, reached, strict=True)):
        nodes, columns = (units >= 0).nonzero(as_tuple=True)
        for part in chunks(len(nodes), max(pc.circuit.num_categories)):
            node, column = nodes[part], columns[part]
            at = Reached(node, units[node, column], query[column])
            scores = layer.scores(evidence, question.weights.own[layer.parameter_rows.bank], at)
            if position in question.weights.given:
                scores = question.weights.given[position].scores(scores, evidence, layer.variables, at)
            values[column, layer.variables[node]] = _ranked(scores, ranks[node, column])
    return values


def _root_choice(question: Question, semiring: KBestSemiring, root: Tensor, query: Tensor, rank: Tensor) -> _Choices:
    """Return the root's unit and rank of each explanation, (n,); mixed classes are ranked together."""
    if question.class_factors is None:
        return _Choices(torch.zeros_like(rank), rank)
    scores = (root[0] + question.class_factors.unsqueeze(2)).movedim(1, 0)[query]  # (n, R, k)
    best = _ranked(scores.flatten(1), rank)
    return _Choices(best // semiring.k, best % semiring.k)


def _choose_child(
    layer: SumLayer,
    semiring: KBestSemiring,
    values: Sequence[Tensor],
    log_weights: Tensor,  # shape: (n, I)
    at: Reached,
    rank: Tensor,
) -> _Choice:
    """Return which child, and which unit and rank of it, each of n reached sum units takes."""
    node, _, query = at
    slot, unit = layer.child_choices(node.unsqueeze(1), torch.arange(log_weights.shape[1], device=node.device))
    shape = log_weights.shape
    scores = _child_scores(layer, slot.expand(shape), values, node, unit.expand(shape), query)
    scores += log_weights.unsqueeze(2)  # (n, I, k)
    best = _ranked(scores.flatten(1), rank)
    slot, unit = layer.child_choices(node, best // semiring.k)
    return slot, _Choices(unit, best % semiring.k)


def _split_product(
    layer: ProductLayer, semiring: KBestSemiring, values: Sequence[Tensor], at: Reached, rank: Tensor
) -> list[_Choice]:
    """Return which unit and rank of every child each of n reached product units multiplies."""
    node, unit, query = at
    units = layer.child_choices(unit)
    factors = [
        _child_scores(layer, slot, values, node, chosen.unsqueeze(1), query).squeeze(1)
        for slot, chosen in enumerate(units)
    ]
    partial = factors[:1]
    for factor in factors[1:]:
        partial.append(semiring.times(partial[-1], factor))
    ranks = []
    for before, factor in zip(reversed(partial[:-1]), reversed(factors[1:]), strict=True):
        pair = _ranked(semiring.candidates(before, factor), rank)
        ranks.append(semiring.right_ranks.to(pair.device)[pair])
        rank = semiring.left_ranks.to(pair.device)[pair]
    return list(enumerate(map(_Choices, units, [rank, *reversed(ranks)])))


def _child_scores(
    layer: ProductLayer | SumLayer,
    slot: int | Tensor,  # shape: (n, u)
    values: Sequence[Tensor],
    node: Tensor,  # shape: (n,)
    unit: Tensor,  # shape: (n, u)
    query: Tensor,  # shape: (n,)
) -> Tensor:  # shape: (n, u, k)
    """Return the ranked scores of some units of the child in one slot of n nodes, or in a slot for every unit."""
    layers, nodes = layer.addresses[node.unsqueeze(1), slot].unbind(-1)
    query = query.unsqueeze(1).expand_as(unit)
    scores = values[0].new_empty(*unit.shape, values[0].shape[3])
    for child in layers.unique().tolist():
        here = layers == child
        scores[here] = values[child][nodes[here], unit[here], query[here]]
    return scores


def _ranked(scores: Tensor, rank: Tensor) -> Tensor:
    """Return the index of the score of given rank in each row: (n, m) and (n,) to (n,); ties by index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, rank.unsqueeze(1)).squeeze(1)
