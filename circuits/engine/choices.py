"""The downward choice: one child per reached sum unit, then one value per reached input unit.

In the log semiring it is an exact sample, in the max semiring the most probable explanation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring
from circuits.chains import LayerUnits, VectorSemiring
from circuits.engine.layers import ProductLayer, chunks
from circuits.randomness import DrawnNumbers, Source, numbers_at, source_at
from circuits.weights.given import Reached

if TYPE_CHECKING:
    from circuits.engine.question import Question


class Choice(NamedTuple):
    """One explanation per column: S copies of a batch of B queries, all of the first copy first."""

    units: list[Tensor]
    """The chosen unit of every node of each input layer, int64 (F, S * B) each; -1 where a node was not reached.

    Of vectors of E entries it is the number ``unit * E + entry``."""
    query: Tensor
    """The query of each column, int64 (S * B,)."""
    children: Mapping[int, Tensor] = {}
    """By layer, which of all their children's units sum nodes chose, int64 (F, S * B), -1 where one was not reached;
    what all sums of a chain chose, (T, S * B), by the layer of the first."""


class Climb(NamedTuple):
    """The values of a pass upward that choices go back down along."""

    values: dict[int, Tensor]
    """Of layers by position, (F, K, B, *E); of a chain, that of its first sum."""
    chains: dict[int, Tensor]
    """What all sums of a chain mix, (T, K, B), by the position of the first; see :meth:`Chain.climb`."""
    root: Tensor
    """(1, R, B, *E)."""


def climb(question: Question, semiring: ChoosingSemiring) -> Climb:
    """Evaluate all layers, chains as one recurrence each."""
    values: dict[int, Tensor] = dict(enumerate(question.inputs(semiring)))
    chains: dict[int, Tensor] = {}
    own, given, latents = question.weights.own, question.weights.given, question.latents
    for step in question.pc.schedule:
        if step.chain is not None and not isinstance(semiring, VectorSemiring):
            weights = own[step.chain.bank]
            found = step.chain.climb(semiring, values, weights, given, latents, question.silent)
            values[step.position], chains[step.position] = found
            continue
        for position, layer in step.layers:
            values[position] = question.layer_value(semiring, position, layer, values)
    return Climb(values, chains, values[len(question.pc.layer_sizes) - 1])


def choose(question: Question, semiring: ChoosingSemiring, found: Climb, num_samples: int, generator: Source) -> Choice:
    """Choose one child of every reached sum unit, from the root down; see :meth:`Question.choose`."""
    pc, weights = question.pc, question.weights
    root = found.root[0]  # (R, B, *E)
    query = torch.arange(root.shape[1], device=root.device).repeat(num_samples)
    units, top = LayerUnits(pc.layer_sizes, query), len(pc.layer_sizes) - 1
    numbers = numbers_at(generator, pc.sum_layers, num_samples)

    def source_of(position: int, node: Tensor, column: Tensor) -> Source:
        if position in numbers:
            return DrawnNumbers(column, first=numbers[position][node, column])
        return source_at(generator, position, node, column)

    if question.class_factors is None and root.dim() == 2:
        units[top].zero_()
    else:
        source = source_of(top + 1, torch.zeros_like(query), torch.arange(len(query), device=query.device))
        root = root if question.class_factors is None else semiring.times(root, semiring.lift(question.class_factors))
        units[top][0] = semiring.choose(root.transpose(0, 1).flatten(1)[query], source)
    vectors, size = (semiring, semiring.num_entries) if isinstance(semiring, VectorSemiring) else (None, 1)
    for step in reversed(pc.schedule):
        if step.chain is not None and step.position in found.chains:
            (column,) = (units[step.position][0] >= 0).nonzero(as_tuple=True)
            sources = functools.partial(source_of, node=torch.zeros_like(column), column=column)
            of_chain, states = (weights.own[step.chain.bank], weights.given), found.chains[step.position]
            chosen = step.chain.choose(semiring, *of_chain, states, units, column, query[column], sources)
            units[step.position] = chosen
            continue
        for position, layer in reversed(step.layers):
            node, column = (units[position] >= 0).nonzero(as_tuple=True)
            code = units[position][node, column]
            unit, entry = (code, None) if vectors is None else (code // size, code % size)
            reached = Reached(node, unit, query[column])
            if isinstance(layer, ProductLayer):
                choices = layer.child_choices(unit)
                del units[position]
                if vectors is not None and entry is not None:
                    values = zip(layer.factors(found.values), choices, strict=True)
                    factors = [value[node, at, reached.query] for value, at in values]
                    entries = vectors.split(layer.nodes, factors, node, entry, source_of(position, node, column))
                    choices = [at * size + own for at, own in zip(choices, entries, strict=True)]
                layer.reach(units, node, column, enumerate(choices))
            else:
                own, given = weights.own[layer.parameter_rows.bank], weights.given.get(position)
                gathered = layer.gather(found.values, semiring, question.latents.get(position))
                source = source_of(position, node, column)
                chosen = layer.choose(semiring, gathered, own, given, reached, entry, source)
                units[position][node, column] = chosen
                slot, unit = layer.child_choices(node, chosen)
                layer.reach(units, node, column, [(slot, unit if entry is None else unit * size + entry)])
    return Choice([units[position] for position in range(len(pc.input_layers))], query, units)


def values_of(question: Question, semiring: ChoosingSemiring, choice: Choice, generator: Source) -> Tensor:
    """Choose a value of every variable from the reached input units: (S * B, D), int64 if all families are discrete."""
    pc, evidence = question.pc, question.evidence
    dtype = torch.int64 if pc.circuit.is_discrete else pc.dtype
    values = torch.zeros(len(choice.query), pc.circuit.num_vars, dtype=dtype, device=choice.query.device)
    for position, (layer, reached) in enumerate(zip(pc.input_layers, choice.units, strict=True)):
        weights, given = question.weights.own[layer.parameter_rows.bank], question.weights.given.get(position)
        nodes, columns = (reached >= 0).nonzero(as_tuple=True)
        for part in chunks(len(nodes), weights.log.shape[1]):
            node, column = nodes[part], columns[part]
            units = Reached(node, reached[node, column], choice.query[column])
            source = source_at(generator, position, node, column)
            if given is None:
                chosen = layer.choose(semiring, evidence, weights, units, source)
            else:
                scores = layer.scores(evidence, weights, units)
                chosen = semiring.choose(given.scores(scores, evidence, layer.variables, units), source)
            values[column, layer.variables[node]] = chosen.to(dtype)
    return values
