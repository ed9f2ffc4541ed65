"""The k most probable explanations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.engine import passes
from circuits.engine.compile import CompiledCircuit
from circuits.engine.conditioning import conditions_of
from circuits.engine.input_layers import InputLayer
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.engine.semirings import KBestSemiring
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import MAX_NUMBERS, checked_possible, dense_evidence, has_one_explanation


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


class _Choices(NamedTuple):
    """What was reached of one node vector in each column: unit and rank, (F, n); unit -1 where it was not reached."""

    unit: Tensor
    rank: Tensor


@own_precision
@torch.no_grad()
def k_best(
    pc: CompiledCircuit, k: int, evidence: Evidence | None = None, *, weights: passes.Banks | None = None
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
    banks = pc.weights() if weights is None else weights
    given, _ = dense_evidence(pc, evidence, banks)
    semiring = KBestSemiring(k)
    outputs = passes.upward(pc, semiring, passes.leaves(pc, semiring, given, banks), banks, keep=True)
    root = outputs[-1]
    assert root is not None
    log_score = root[0, 0]  # (B, k)
    checked_possible(log_score[:, 0])
    query, rank = (log_score > -torch.inf).nonzero(as_tuple=True)
    assignment = torch.full((len(log_score), k, pc.circuit.num_vars), -1, device=pc.device)
    assignment[query, rank] = _descend(pc, semiring, outputs, given, banks, query, rank)
    return (KBestAssignments if has_one_explanation(pc, given) else KBestExplanations)(assignment, log_score)


def _descend(
    pc: CompiledCircuit,
    semiring: KBestSemiring,
    outputs: list[Tensor | None],
    evidence: Evidence,
    banks: passes.Banks,
    query: Tensor,
    rank: Tensor,
) -> Tensor:
    """Return the assignment of the root's explanation ``rank`` (n,) of each ``query`` (n,): int64 (n, D).

    The ranking of a reached unit is recomputed by a stable sort, so different ranks always have different choices.
    """
    num_columns, latents = len(query), conditions_of(outputs).latents
    reached = []
    for num_nodes, _ in pc.layer_sizes:
        unreached = torch.full((num_nodes, num_columns), -1, device=query.device)
        reached.append(_Choices(unreached, torch.zeros_like(unreached)))
    root = _root_choice(pc, semiring, outputs, query, rank)
    reached[-1].unit.copy_(root.unit)
    reached[-1].rank.copy_(root.rank)
    for position in reversed(range(len(pc.input_layers), len(pc.layer_sizes))):
        layer = pc.inner_layers[position - len(pc.input_layers)]
        units, ranks = reached[position]
        all_nodes, all_columns = (units >= 0).nonzero(as_tuple=True)
        width = semiring.k * (len(semiring.left_ranks) if isinstance(layer, ProductLayer) else sum(layer.child_units))
        for part in _chunks(len(all_nodes), width):
            node, column = all_nodes[part], all_columns[part]
            unit, unit_rank = units[node, column], ranks[node, column]
            if isinstance(layer, ProductLayer):
                choices = _split_product(layer, semiring, outputs, node, unit, unit_rank, query[column])
            else:
                log_weights = banks[layer.parameter_rows.bank].log[layer.parameter_rows.index[node], unit]
                if position in banks.external:
                    log_weights = banks.external[position].replaced(log_weights, node, unit, query[column])
                if position in latents:
                    log_weights = latents[position].added(log_weights, node, query[column])
                choices = _choose_child(layer, semiring, outputs, log_weights, node, unit_rank, query[column])
            for slot, choice in enumerate(choices):
                layers, rows = layer.addresses[node, slot].unbind(-1)
                for child in layers.unique().tolist():
                    here = (layers == child) & (choice.unit >= 0)
                    reached[child].unit[rows[here], column[here]] = choice.unit[here]
                    reached[child].rank[rows[here], column[here]] = choice.rank[here]
    values = torch.zeros(num_columns, pc.circuit.num_vars, dtype=torch.int64, device=query.device)
    for position, (leaf, (units, ranks)) in enumerate(zip(pc.input_layers, reached, strict=False)):
        assert isinstance(leaf, InputLayer)
        all_nodes, all_columns = (units >= 0).nonzero(as_tuple=True)
        for part in _chunks(len(all_nodes), int(pc.num_categories.max())):
            node, column = all_nodes[part], all_columns[part]
            unit, of_query = units[node, column], query[column]
            scores = leaf.scores(evidence, banks[leaf.parameter_rows.bank], node, unit, of_query)
            if position in banks.external:
                external = banks.external[position]
                scores = external.scores(scores, evidence, leaf.variables, node, unit, of_query)
            values[column, leaf.variables[node]] = _ranked(scores, ranks[node, column])
    return values


def _root_choice(
    pc: CompiledCircuit, semiring: KBestSemiring, outputs: Sequence[Tensor | None], query: Tensor, rank: Tensor
) -> _Choices:
    """Return the root's unit and rank of each explanation, (n,); mixed classes are ranked together."""
    class_factors = conditions_of(outputs).class_factors
    if class_factors is None:
        return _Choices(torch.zeros_like(rank), rank)
    root = outputs[len(pc.layer_sizes) - 1]
    assert root is not None
    scores = (root[0] + class_factors.unsqueeze(2)).movedim(1, 0)[query]  # (n, R, k)
    best = _ranked(scores.flatten(1), rank)
    return _Choices(best // semiring.k, best % semiring.k)


def _choose_child(
    layer: SumLayer,
    semiring: KBestSemiring,
    outputs: Sequence[Tensor | None],
    log_weights: Tensor,  # shape: (n, I)
    node: Tensor,
    rank: Tensor,
    query: Tensor,
) -> list[_Choices]:
    """Return per child slot which unit and rank each of n reached sum units takes; unit -1 for the other slots."""
    children = [
        _child_scores(layer, slot, outputs, node, torch.arange(count, device=node.device).expand(len(node), -1), query)
        for slot, count in enumerate(layer.child_units)
    ]
    scores = torch.cat(children, 1) + log_weights.unsqueeze(2)  # (n, I, k)
    best = _ranked(scores.flatten(1), rank)
    unit, child_rank = best // semiring.k, best % semiring.k
    choices = []
    for count in layer.child_units:
        choices.append(_Choices(torch.where((unit >= 0) & (unit < count), unit, -1), child_rank))
        unit = unit - count
    return choices


def _split_product(
    layer: ProductLayer,
    semiring: KBestSemiring,
    outputs: Sequence[Tensor | None],
    node: Tensor,
    unit: Tensor,
    rank: Tensor,
    query: Tensor,
) -> list[_Choices]:
    """Return which unit and rank of every child each of n reached product units multiplies."""
    units = layer.child_choices(unit)
    factors = [
        _child_scores(layer, slot, outputs, node, chosen.unsqueeze(1), query).squeeze(1)
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
    return [_Choices(*choice) for choice in zip(units, [rank, *reversed(ranks)], strict=True)]


def _child_scores(
    layer: ProductLayer | SumLayer,
    slot: int,
    outputs: Sequence[Tensor | None],
    node: Tensor,  # shape: (n,)
    unit: Tensor,  # shape: (n, u)
    query: Tensor,  # shape: (n,)
) -> Tensor:  # shape: (n, u, k)
    """Return the ranked scores of some units of the child in one slot of n nodes."""
    layers, rows = layer.addresses[node, slot].unbind(-1)
    scores: Tensor | None = None
    for child in layers.unique().tolist():
        output = outputs[child]
        assert output is not None
        if scores is None:
            scores = output.new_empty(*unit.shape, output.shape[3])
        here = layers == child
        scores[here] = output[rows[here].unsqueeze(1), unit[here], query[here].unsqueeze(1)]
    assert scores is not None
    return scores


def _ranked(scores: Tensor, rank: Tensor) -> Tensor:
    """Return the index of the score of given rank in each row: (n, m) and (n,) to (n,); ties by index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, rank.unsqueeze(1)).squeeze(1)


def _chunks(length: int, width: int) -> list[slice]:
    step = max(1, MAX_NUMBERS // width)
    return [slice(start, start + step) for start in range(0, length, step)]
