"""The downward choice: one child per reached sum unit, then one value per reached input unit.

In the log semiring it is an exact sample, in the max semiring the most probable explanation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.engine.conditioning import conditions_of
from circuits.engine.input_layers import InputLayer
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.engine.passes import Banks
from circuits.engine.semirings import ChoosingSemiring
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.randomness import DrawnNumbers, RowGenerators, Source

if TYPE_CHECKING:
    from circuits.engine.compile import CompiledCircuit

_CHUNK = 1 << 24


@own_precision
def downward_choice(
    pc: CompiledCircuit,
    semiring: ChoosingSemiring,
    outputs: Sequence[Tensor | None],
    banks: Banks,
    num_samples: int,
    generator: Source,
) -> tuple[list[Tensor], Tensor]:
    """Choose one child of every reached sum unit, from the root down, for ``num_samples`` copies of the batch.

    Args:
        pc: the compiled circuit.
        semiring: whose ``choose`` is used: a draw (log) or the best (max).
        outputs: of :func:`~circuits.engine.passes.upward` with ``keep=True`` in that semiring.
        banks: the weights that ``outputs`` were computed with.
        num_samples: S, how many choices per query.
        generator: for draws.

    Returns:
        The chosen unit of every node of each input layer, -1 where a node was not reached, a list of (F, S * B), and
        the query of each column, (S * B,).
    """
    num_layers, class_factors = len(pc.layer_sizes), conditions_of(outputs).class_factors
    root = outputs[num_layers - 1]
    assert root is not None
    batch_size = root.shape[2]
    query = torch.arange(batch_size, device=root.device).repeat(num_samples)
    units = [torch.full((size[0], len(query)), -1, device=root.device) for size in pc.layer_sizes]
    if class_factors is None:
        units[-1].zero_()
    else:
        everywhere = torch.arange(len(query), device=query.device)
        source = source_at(generator, num_layers, torch.zeros_like(query), everywhere)
        units[-1][0] = semiring.choose((root[0] + class_factors).t()[query], source)
    numbers = _numbers_of(pc, generator, num_samples)
    for position in reversed(range(len(pc.input_layers), num_layers)):
        layer = pc.inner_layers[position - len(pc.input_layers)]
        node, column = (units[position] >= 0).nonzero(as_tuple=True)
        unit = units[position][node, column]
        if isinstance(layer, ProductLayer):
            choices = layer.child_choices(unit)
        else:
            if position in numbers:
                source = DrawnNumbers(column, first=numbers[position][node, column])
            else:
                source = source_at(generator, position, node, column)
            choices = _choose_children(layer, semiring, outputs, banks, node, unit, query[column], source)
        for slot, choice in enumerate(choices):
            _mark(units, layer, slot, node, column, choice)
        units[position] = units[position].new_empty(0)
    return units[: len(pc.input_layers)], query


def _choose_children(
    layer: SumLayer,
    semiring: ChoosingSemiring,
    outputs: Sequence[Tensor | None],
    banks: Banks,
    node: Tensor,
    unit: Tensor,
    query: Tensor,
    generator: Source,
) -> list[Tensor]:
    """Choose a child unit for n reached sum units; per child slot the chosen unit, -1 where another slot was chosen."""
    children = layer.gather(outputs)
    log_weights = banks[layer.parameter_rows.bank].log
    external = banks.external.get(layer.position)
    chosen = torch.empty_like(unit)
    for part in _chunks(len(node), children.shape[1]):
        n, u, q = node[part], unit[part], query[part]
        scores = log_weights[layer.parameter_rows.index[n], u]
        if external is not None:
            scores = external.replaced(scores, n, u, q)
        chosen[part] = semiring.choose(scores.add_(children[n, :, q]), _part(generator, part))
    choices = []
    for num_units in layer.child_units:
        choices.append(torch.where((chosen >= 0) & (chosen < num_units), chosen, -1))
        chosen = chosen - num_units
    return choices


def _numbers_of(pc: CompiledCircuit, generator: Source, num_samples: int) -> dict[int, Tensor]:
    """Return the numbers that choose for the units of every sum layer, (F, S * B), drawn at once unless too many."""
    sizes = {layer.position: layer.num_nodes for layer in pc.inner_layers if isinstance(layer, SumLayer)}
    num_nodes = sum(sizes.values())
    if not isinstance(generator, RowGenerators) or num_nodes * num_samples * len(generator.seeds) > _CHUNK // 16:
        return {}
    device = generator.seeds.device
    places = [(position << 24) + torch.arange(size, device=device) for position, size in sizes.items()]
    sample = torch.arange(num_samples, device=device).repeat_interleave(len(generator.seeds))
    seeds = RowGenerators(generator.seeds.repeat(num_samples))
    numbers = seeds.first_at(torch.cat(places).unsqueeze(1) + (sample << 48))
    return dict(zip(sizes, numbers.split(list(sizes.values())), strict=True))


def source_at(generator: Source, position: int, node: Tensor, column: Tensor) -> Source:
    """Return what draws for n units of a layer, given by node and column: for generators by row, one for each unit."""
    if not isinstance(generator, RowGenerators):
        return generator
    batch_size = len(generator.seeds)
    # one number for sample, layer and node: none of them comes near its bound
    return generator.rows(column % batch_size).at((column // batch_size << 48) + (position << 24) + node)


def _part(generator: Source, part: slice) -> Source:
    return generator.rows(part) if isinstance(generator, RowGenerators) else generator


def _mark(
    units: list[Tensor], layer: ProductLayer | SumLayer, slot: int, node: Tensor, column: Tensor, choice: Tensor
) -> None:
    """Record which unit of a child was reached from n nodes, in their columns; -1: it was not."""
    if isinstance(layer, SumLayer) and len(layer.child_units) > 1:
        reached = choice >= 0
        node, column, choice = node[reached], column[reached], choice[reached]
    layers, rows = layer.addresses[node, slot].unbind(-1)
    only = layer.child_layers[slot]
    if only is not None:
        units[only][rows, column] = choice
        return
    for position in layers.unique().tolist():
        here = layers == position
        units[position][rows[here], column[here]] = choice[here]


def _chunks(length: int, width: int) -> Iterator[slice]:
    """Cut ``length`` rows of ``width`` numbers into slices of bounded size."""
    step = max(1, _CHUNK // width)
    for start in range(0, length, step):
        yield slice(start, start + step)


@own_precision
def draw_values(
    pc: CompiledCircuit,
    semiring: ChoosingSemiring,
    evidence: Evidence,
    banks: Banks,
    units: Sequence[Tensor],
    query: Tensor,
    generator: Source,
) -> Tensor:
    """Choose a value of every variable from the reached input units: (S * B, D), int64 if all families are discrete."""
    dtype = torch.int64 if pc.circuit.is_discrete else pc.dtype
    values = torch.zeros(len(query), pc.circuit.num_vars, dtype=dtype, device=query.device)
    for position, (layer, reached) in enumerate(zip(pc.input_layers, units, strict=True)):
        assert isinstance(layer, InputLayer)
        external = banks.external.get(position)
        node, column = (reached >= 0).nonzero(as_tuple=True)
        for part in _chunks(len(node), banks[layer.parameter_rows.bank].log.shape[1]):
            n, c = node[part], column[part]
            weights, unit, of_query = banks[layer.parameter_rows.bank], reached[n, c], query[c]
            source = source_at(generator, position, n, c)
            if external is None:
                chosen = layer.choose(semiring, evidence, weights, n, unit, of_query, source)
            else:
                scores = layer.scores(evidence, weights, n, unit, of_query)
                scores = external.scores(scores, evidence, layer.variables, n, unit, of_query)
                chosen = semiring.choose(scores, source)
            values[c, layer.variables[n]] = chosen.to(dtype)
    return values
