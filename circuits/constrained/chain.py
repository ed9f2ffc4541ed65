"""The product of a chain circuit with a finite automaton, upward in a semiring and downward by choices.

A unit over the variables from some point on becomes a vector over the automaton's states: its value where the automaton
is in that state before it reads them. Sums mix such vectors as they mix numbers. A product of a leaf and what follows
adds up, over the arcs out of a state, the leaf restricted to the arc's label times what follows in the arc's target
(the intersection of an automaton with a hidden Markov model; Vidal et al. 2005, Zhang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import ChoosingSemiring, MaxSemiring, Semiring
from circuits.constrained.arcs import Arcs
from circuits.engine.question import Question
from circuits.queries.alignment import Part
from circuits.queries.structural import front_to_back, rank_of_scopes
from circuits.queries.temperature import TemperedSemiring
from circuits.randomness import Source, source_at
from circuits.symbolic import Input, Node, Product, Sum
from circuits.weights.given import Reached


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain circuit, the arcs in its reading direction, and what the pass over both is given.

    Attributes:
        question: about a chain circuit: its weights, and evidence on latents and the class.
        order: its variables in the order in which its products split them off.
        arcs: of the automaton that reads them in this order.
        log_start: (B, S), of the state before the first variable of ``order``.
        log_accept: (B, S), of the state after the last.
    """

    question: Question
    order: Sequence[int]
    arcs: Arcs
    log_start: Tensor
    log_accept: Tensor


@dataclass(frozen=True, eq=False)
class Values:
    """What an upward pass computed, in the semiring that it ran in."""

    semiring: ChoosingSemiring
    leaves: dict[Node, Tensor] = field(default_factory=dict)
    """Nodes of one variable, by label: (K, B, M)."""
    states: dict[Node, Tensor] = field(default_factory=dict)
    """Nodes of all variables from some point on, by the state before these are read: (K, B, S)."""
    after: dict[Node, list[Tensor]] = field(default_factory=dict)
    """By product: what follows each of its leaves, in reading order, (K or 1, B, S) each."""
    root_scores: Tensor | None = None
    """Of the root's units and the automaton's states before everything, (B, R * S)."""


class Vectors(Semiring):
    """Sums of vectors: another semiring on every entry of the last dimension."""

    def __init__(self, entries: ChoosingSemiring) -> None:
        self.entries = entries
        self.is_linear = entries.is_linear

    def lift(self, log_values: Tensor) -> Tensor:
        """Return vectors of one entry."""
        return log_values.unsqueeze(-1)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply entry by entry."""
        return left + right

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Mix entry by entry."""
        out = self.entries.contract(log_weights, x.flatten(2), weights=weights)
        return out.unflatten(2, x.shape[2:])


def upward(chain: Chain, semiring: ChoosingSemiring, layers: Sequence[Tensor]) -> tuple[Tensor, Values]:
    """Return the log-value of every query, (B,), and the values of all nodes.

    Args:
        chain: what to evaluate.
        semiring: log-sum-exp or maximum as plus.
        layers: of every input layer the log-values of its units by label, (F, K, B, M).
    """
    values, rank = Values(semiring), rank_of_scopes(chain.order)
    vectors = Vectors(semiring)
    for node in chain.question.pc.circuit.nodes:
        if isinstance(node, Input):
            layer, row = chain.question.pc.address(node)
            values.leaves[node] = layers[layer][row]
        elif isinstance(node, Sum):
            table = values.leaves if node.scope_bits in rank else values.states
            children = torch.cat([table[child] for child in node.children]).unsqueeze(0)
            table[node] = _mixed(chain, vectors, node, children)[0]
        elif node.scope_bits in rank:
            values.leaves[node] = values.leaves[node.children[0]]
        else:
            assert isinstance(node, Product)
            values.states[node] = _product(chain, values, node, front_to_back(node, rank))
    root = chain.question.pc.circuit.root
    if root in values.states:
        top = values.states[root]
    else:  # a single variable
        top = _read(chain, semiring, values.leaves[root], chain.log_accept.unsqueeze(0))
    top = top + chain.log_start  # (R, B, S)
    if chain.question.class_factors is not None:
        top = top + chain.question.class_factors.unsqueeze(-1)
    scores = top.transpose(0, 1).flatten(1)
    return _plus(semiring, scores), replace(values, root_scores=scores)


def _mixed(chain: Chain, vectors: Vectors, node: Sum, children: Tensor) -> Tensor:
    """Return the mixtures of a sum node, (1, K, B, *), of its children (1, I, B, *)."""
    layer, row = chain.question.pc.address(node)
    latents = chain.question.latents.get(layer)
    if latents is not None:
        slots = (latents.rows == row).nonzero().flatten()
        if len(slots):
            own = replace(latents, rows=torch.zeros_like(slots), log=latents.log[slots])
            children = own.applied(vectors, children)
    external = chain.question.weights.given.get(layer)
    given = None if external is None else external.of_node(row)
    if given is not None:
        return given.contract(vectors, children)
    bank, bank_row = chain.question.pc.bank_address(node)
    rows = slice(bank_row, bank_row + 1)
    weights = chain.question.weights.own[bank]
    return vectors.contract(weights.log[rows], children, weights=weights.linear[rows])


def _product(chain: Chain, values: Values, node: Product, parts: Sequence[Node]) -> Tensor:
    """Read the leaves of a product, from the last, before what follows them."""
    units = _units_of(chain, node)
    following = chain.log_accept.unsqueeze(0)
    after: list[Tensor] = []
    for child in reversed(parts):
        table = values.states if child in values.states else values.leaves
        own = table[child] if units[child] is None else table[child][units[child]]
        if child in values.states:
            following = own
        else:
            after.insert(0, following)
            following = _read(chain, values.semiring, own, following)
    values.after[node] = after
    return following


def _units_of(chain: Chain, node: Product) -> dict[Node, Tensor | None]:
    """Return which unit of each child every unit of a product takes, (K,); None: unit k takes k."""
    factors = Part(node).factors
    return {part.node: None if units is None else units.to(chain.question.pc.device) for part, units in factors}


def _read(chain: Chain, semiring: ChoosingSemiring, leaf: Tensor, following: Tensor) -> Tensor:
    """Add up, over the arcs out of every state, leaf (K, B, M) times what follows, (K or 1, B, S): (K, B, S)."""
    arcs = chain.arcs
    terms = leaf[..., arcs.label] + following[..., arcs.target]  # (K, B, E)
    index = arcs.source.expand_as(terms)
    empty = terms.new_full((*terms.shape[:-1], arcs.num_states), -torch.inf)
    peak = empty.scatter_reduce(2, index, terms.detach(), "amax")
    if isinstance(semiring, MaxSemiring):
        return peak
    peak, tau = peak.masked_fill(peak == -torch.inf, 0.0), temperature_of(semiring)
    total = torch.zeros_like(empty).scatter_add(2, index, ((terms - peak[..., arcs.source]) / tau).exp())
    possible = total > 0
    return torch.where(possible, torch.where(possible, total, 1.0).log() * tau + peak, -torch.inf)


def _plus(semiring: ChoosingSemiring, scores: Tensor) -> Tensor:
    """Add up along the last dimension."""
    if isinstance(semiring, MaxSemiring):
        return scores.amax(-1)
    tau = temperature_of(semiring)
    return logspace.log_sum(scores / tau) * tau


def temperature_of(semiring: ChoosingSemiring) -> float:
    """Return tau of a semiring whose plus is ``tau log sum exp(. / tau)``."""
    return semiring.temperature if isinstance(semiring, TemperedSemiring) else 1.0


class Choices(NamedTuple):
    """One explanation per column: S copies of the batch of B."""

    units: list[Tensor]
    """The chosen unit of every node of each input layer, -1 where a node was not reached: int64 (F, S * B) each."""
    labels: Tensor
    """With which label the automaton reads every variable, int64 (S * B, D)."""
    query: Tensor
    """The query of every column, int64 (S * B,)."""


@dataclass(frozen=True, eq=False)
class _Reached:
    """Which unit of every node was reached in every column, -1: none; and in which state, or by which label."""

    unit: dict[Node, Tensor] = field(default_factory=dict)
    mark: dict[Node, Tensor] = field(default_factory=dict)

    def columns(self, node: Node) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns that reach a node, with their unit and mark, (n,) each."""
        if node not in self.unit:
            none = torch.zeros(0, dtype=torch.int64, device=next(iter(self.unit.values())).device)
            return none, none, none
        column = (self.unit[node] >= 0).nonzero().flatten()
        return column, self.unit[node][column], self.mark[node][column]

    def add(self, node: Node, column: Tensor, unit: Tensor, mark: Tensor, num_columns: int) -> None:
        for table, value in ((self.unit, unit), (self.mark, mark)):
            if node not in table:
                table[node] = torch.full((num_columns,), -1, dtype=torch.int64, device=value.device)
            table[node][column] = value


@torch.no_grad()
def downward(chain: Chain, values: Values, num_samples: int, generator: Source) -> Choices:
    """Choose child units and arcs from the root down, for ``num_samples`` copies of the batch."""
    pc, semiring = chain.question.pc, values.semiring
    rank = rank_of_scopes(chain.order)
    scores = values.root_scores
    assert scores is not None
    query = torch.arange(len(scores), device=scores.device).repeat(num_samples)
    num_columns = len(query)
    everywhere = torch.arange(num_columns, device=query.device)
    place = len(pc.layer_sizes)
    first = semiring.choose(scores[query], source_at(generator, place, everywhere * 0, everywhere))
    reached, root = _Reached(), pc.circuit.root
    states = first % chain.arcs.num_states
    labels = torch.zeros(num_columns, pc.circuit.num_vars, dtype=torch.int64, device=query.device)
    if root in values.leaves:
        follows = chain.log_accept.unsqueeze(0)
        unit = first // chain.arcs.num_states
        source = source_at(generator, place, everywhere * 0 + 1, everywhere)
        arc = _choose_arc(chain, values, (values.leaves[root], unit), (follows, unit * 0), states, query, source)
        states = chain.arcs.label[arc]
    reached.add(root, everywhere, first // chain.arcs.num_states, states, num_columns)
    for node in reversed(pc.circuit.nodes):
        column, unit, mark = reached.columns(node)
        if not len(column):
            continue
        if isinstance(node, Input):
            labels[column, node.var] = mark
        elif isinstance(node, Sum):
            _choose_child(chain, values, reached, node, query, generator)
        elif node.scope_bits in rank:
            reached.add(node.children[0], column, unit, mark, num_columns)
        else:
            assert isinstance(node, Product)
            _choose_arcs(chain, values, reached, node, query, generator)
    units = [torch.full((size[0], num_columns), -1, device=query.device) for size in pc.layer_sizes]
    for node in pc.circuit.inputs:
        layer, row = pc.address(node)
        if node in reached.unit:
            units[layer][row] = reached.unit[node]
    return Choices(units[: len(pc.input_layers)], labels, query)


def _choose_child(
    chain: Chain,
    values: Values,
    reached: _Reached,
    node: Sum,
    query: Tensor,
    generator: Source,
) -> None:
    column, unit, mark = reached.columns(node)
    of_query = query[column]
    table = values.states if node in values.states else values.leaves
    layer, row = chain.question.pc.address(node)
    rows = torch.full_like(unit, row)
    scores = chain.question.pc.log_weights(node, chain.question.weights)[unit].clone()  # (n, I)
    external = chain.question.weights.given.get(layer)
    if external is not None:
        scores = external.replaced(scores, Reached(rows, unit, of_query))
    latents = chain.question.latents.get(layer)
    if latents is not None:
        scores = latents.added(scores, rows, of_query)
    scores = scores + torch.cat([table[child][:, of_query, mark] for child in node.children]).t()
    chosen = values.semiring.choose(scores, source_at(generator, layer, rows, column))
    for child in node.children:
        is_here = (chosen >= 0) & (chosen < child.num_units)
        reached.add(child, column[is_here], chosen[is_here], mark[is_here], len(query))
        chosen = chosen - child.num_units


def _choose_arcs(
    chain: Chain,
    values: Values,
    reached: _Reached,
    node: Product,
    query: Tensor,
    generator: Source,
) -> None:
    column, unit, state = reached.columns(node)
    units = _units_of(chain, node)
    after = iter(values.after[node])
    for child in front_to_back(node, rank_of_scopes(chain.order)):
        taken = units[child]
        own = unit if taken is None else taken[unit]
        if child in values.states:
            reached.add(child, column, own, state, len(query))
            continue
        follows = next(after)
        rest = (follows, unit if len(follows) > 1 else torch.zeros_like(unit))
        layer, row = chain.question.pc.address(child)
        source = source_at(generator, layer, torch.full_like(column, row), column)
        arc = _choose_arc(chain, values, (values.leaves[child], own), rest, state, query[column], source)
        reached.add(child, column, own, chain.arcs.label[arc], len(query))
        state = chain.arcs.target[arc]


def _choose_arc(
    chain: Chain,
    values: Values,
    leaf: tuple[Tensor, Tensor],
    follows: tuple[Tensor, Tensor],
    state: Tensor,
    query: Tensor,
    generator: Source,
) -> Tensor:
    """Choose an arc out of each of n states, (n,): leaf and what follows are values and the unit that is looked at."""
    arcs = chain.arcs
    scores = leaf[0][leaf[1], query][:, arcs.label] + follows[0][follows[1], query][:, arcs.target]
    scores = scores.masked_fill(arcs.source != state.unsqueeze(1), -torch.inf)
    return values.semiring.choose(scores, generator)
