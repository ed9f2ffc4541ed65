"""From PyJuice's view of a circuit to a compiled one: every table is read a part at a time into its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.families import Bernoulli
from circuits.interop._nodes import JuiceNode, Numbers
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Sum, inputs, parameter_owner, product, sum

_MAX_UNITS = 1 << 20
_MAX_DENSE = 1 << 28
_MAX_DRAWN = 1 << 24
_PART = 1 << 23
"""How many numbers of a table are read at a time."""


@dataclass(frozen=True, eq=False)
class _InMemory:
    """Parameters in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(self.tensor.shape)

    def part(self, start: int, stop: int) -> Tensor:
        """Return the numbers from ``start`` to ``stop`` of all of them, by rows."""
        return self.tensor.reshape(-1)[start:stop]


def build_circuit(
    nodes: Sequence[JuiceNode],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int | None,
    limit: int | None = None,
) -> CompiledCircuit:
    """Build and compile the circuit whose root is the last node, of nodes that stand after their children.

    With a ``limit`` to how many numbers all tables, edges and units may have together. Raises ArgumentError where edges
    or parameters do not fit, StructureError where the nodes are no smooth and decomposable circuit with one root unit.
    """
    builder = _Builder(nodes, seed, limit)
    for position in range(len(nodes)):
        builder.build(position)
    circuit = Circuit(builder.built[-1])
    pc = CompiledCircuit(circuit, dtype=dtype)
    for owner in dict.fromkeys(parameter_owner(node) for node in circuit.nodes if isinstance(node, ParametricNode)):
        if owner in builder.tables:
            _write_table(pc, owner, builder.tables[owner])
        else:
            pc.set_weights(owner, builder.weights[owner])
    return pc.to(device)


@torch.no_grad()
def _write_table(pc: CompiledCircuit, node: ParametricNode, stored: Numbers) -> None:
    """Set a categorical table from what is stored, unit by unit, a part at a time: nothing of its size is made."""
    bank, row = pc.bank_address(node)
    table = pc.bank[bank][row]  # (C, K)
    num_categories, num_units = table.shape
    step = max(1, _PART // num_categories)
    for start in range(0, num_units, step):
        stop = min(start + step, num_units)
        part = stored.part(start * num_categories, stop * num_categories).reshape(stop - start, num_categories)
        _check_weights(part, 1, "input", num_units)
        table[:, start:stop] = part.to(table.dtype).log().t()


class _Builder:
    def __init__(self, nodes: Sequence[JuiceNode], seed: int | None, limit: int | None) -> None:
        self.nodes = nodes
        self.built: list[Node] = []
        self.weights: dict[ParametricNode, Tensor] = {}
        self.tables: dict[ParametricNode, Numbers] = {}
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self._limit, self._count = limit, 0
        self._owners = _owners(nodes)
        self._heirs: dict[int, list[tuple[JuiceNode, ParametricNode]]] = {}
        self._drawn: dict[int, Tensor] = {}
        self._num_drawn = 0
        self._selected: dict[tuple[Node, tuple[int, ...]], Node] = {}

    def build(self, position: int) -> None:
        node = self.nodes[position]
        if node.num_units > _MAX_UNITS:
            raise ArgumentError(f"num_blocks: a node of {node.num_units} units; the limit is {_MAX_UNITS}")
        self._charge(node.num_units + (0 if node.edges is None else node.edges.numel()))
        children = [self.built[child] for child in node.children]
        if node.kind == "input":
            self.built.append(self._input(position, node))
        elif node.kind == "product":
            self.built.append(self._product(node, children))
        else:
            self.built.append(self._sum(position, node, children))

    def _charge(self, count: int) -> None:
        """Count numbers that memory and time are needed for; a file can name the same ones again and again."""
        self._count += count
        if self._limit is not None and self._count > self._limit:
            raise ArgumentError(f"nodes: more than {self._limit} numbers, which is more than the file can stand for")

    def _input(self, position: int, node: JuiceNode) -> Input:
        family = node.distribution
        assert family is not None
        for _, heir in self._heirs.get(self._owners[position], []):
            if isinstance(heir, Input) and heir.distribution == family and heir.num_units == node.num_units:
                return inputs(node.var, node.num_units, family, tied_to=heir)
        leaf = inputs(node.var, node.num_units, family)
        stored = self._parameters(
            position, (node.num_units * (1 if isinstance(family, Bernoulli) else family.num_values),)
        )
        self._charge(node.num_units * family.num_values)
        if isinstance(family, Bernoulli):
            successes = stored.part(0, node.num_units).double()
            table = torch.stack([1 - successes, successes])
            _check_weights(table, 0, "input", node.num_units)
            self.weights[leaf] = table
        else:
            self.tables[leaf] = stored
        self._heirs.setdefault(self._owners[position], []).append((node, leaf))
        return leaf

    def _product(self, node: JuiceNode, children: Sequence[Node]) -> Node:
        assert node.edges is not None
        edges = node.edges
        if edges.dim() == 2 and len(edges) == node.num_blocks and node.block_size > 1:
            edges = (edges.unsqueeze(1) * node.block_size + torch.arange(node.block_size).reshape(1, -1, 1)).flatten(
                0, 1
            )
        sizes = [child.num_units for child in children]
        limits = torch.tensor(sizes)
        if edges.shape != (node.num_units, len(children)) or bool(((edges < 0) | (edges >= limits)).any()):
            raise ArgumentError(
                f"edges: expected for {node.num_units} units which unit of {len(children)} children with {sizes} units "
                f"they multiply, got {tuple(edges.shape)} of values up to {int(edges.max()) if edges.numel() else 0}"
            )
        everything = torch.arange(node.num_units)
        if node.num_units == math.prod(sizes) and len(children) > 1:
            combinations = torch.stack(torch.unravel_index(everything, sizes), 1)
            if torch.equal(edges, combinations) and max(sizes) > 1:
                return product(*children, mode="outer")
        selected = [self._select(child, edges[:, slot]) for slot, child in enumerate(children)]
        return selected[0] if len(selected) == 1 else product(*selected)

    def _select(self, node: Node, units: Tensor) -> Node:
        if torch.equal(units, torch.arange(node.num_units)):
            return node
        key = (node, tuple(units.tolist()))
        if key not in self._selected:
            self._charge_dense(len(units), node.num_units)
            weights = torch.zeros(len(units), node.num_units)
            weights[torch.arange(len(units)), units] = 1.0
            selection = sum(node, num_units=len(units))
            self.weights[selection] = weights
            self._selected[key] = selection
        return self._selected[key]

    def _sum(self, position: int, node: JuiceNode, children: Sequence[Node]) -> Sum:
        assert node.edges is not None
        sizes = {self.nodes[child].block_size for child in node.children}
        if len(sizes) != 1:
            raise ArgumentError(f"block_size: expected one for all children of a sum, got {sorted(sizes)}")
        child_block = sizes.pop()
        num_child_blocks = torch.tensor([self.nodes[child].num_blocks for child in node.children]).sum().item()
        limits = torch.tensor([[node.num_blocks], [num_child_blocks]])
        edges = node.edges
        if edges.dim() != 2 or len(edges) != 2 or bool(((edges < 0) | (edges >= limits)).any()):
            raise ArgumentError(
                f"edges: expected (2, edges) of {node.num_blocks} blocks with {num_child_blocks} child blocks, got "
                f"shape {tuple(edges.shape)} and values up to {int(edges.max()) if edges.numel() else 0}"
            )
        if len(edges[0].unique()) != node.num_blocks:
            raise ArgumentError(f"edges: some of the {node.num_blocks} blocks of a sum have no edge")
        for other, heir in self._heirs.get(self._owners[position], []):
            if isinstance(heir, Sum) and _have_same_edges(node, other, children, heir):
                return sum(*children, num_units=node.num_units, tied_to=heir)
        self._charge_dense(node.num_units, int(num_child_blocks) * child_block)
        weights = self._dense_weights(position, node, int(num_child_blocks), child_block)
        for _, heir in self._heirs.get(self._owners[position], []):
            if isinstance(heir, Sum) and torch.equal(self.weights[heir], weights):
                return sum(*children, num_units=node.num_units, tied_to=heir)
        mixed = sum(*children, num_units=node.num_units)
        self.weights[mixed] = weights
        self._heirs.setdefault(self._owners[position], []).append((node, mixed))
        return mixed

    def _dense_weights(self, position: int, node: JuiceNode, num_child_blocks: int, child_block: int) -> Tensor:
        assert node.edges is not None
        shape = (node.edges.shape[1], node.block_size, child_block)
        stored = self._parameters(position, shape).part(0, math.prod(shape)).reshape(shape)
        zeros = self.nodes[self._owners[position]].zeros
        if zeros is not None:
            if zeros.shape != stored.shape:
                raise ArgumentError(f"zero_param_mask: expected shape {shape}, got {tuple(zeros.shape)}")
            stored = stored.masked_fill(zeros, 0)
        blocks = stored.new_zeros(node.num_blocks, num_child_blocks, node.block_size, child_block)
        blocks.index_put_((node.edges[0], node.edges[1]), stored, accumulate=True)
        weights = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
        _check_weights(weights, 1, "sum", node.num_units)
        return weights

    def _parameters(self, position: int, shape: tuple[int, ...]) -> Numbers:
        """Return the stored parameters of a node or of its source, or draw them where there are none."""
        source = self._owners[position]
        stored = self.nodes[source].parameters
        if stored is None:
            if source not in self._drawn:
                self._num_drawn += math.prod(shape)
                if self._num_drawn > _MAX_DRAWN:
                    raise ArgumentError(f"parameters: none are given, and the limit to draw is {_MAX_DRAWN} in all")
                draw = torch.empty(shape, dtype=torch.float64).exponential_(generator=self.generator)
                self._drawn[source] = draw / draw.max()
            stored = self._drawn[source]
        stored = _InMemory(stored) if isinstance(stored, Tensor) else stored
        if math.prod(stored.shape) != math.prod(shape) or (len(shape) > 1 and stored.shape != shape):
            raise ArgumentError(
                f"parameters: expected shape {shape} for {self.nodes[position].kind} node {position}, "
                f"got {stored.shape}"
            )
        return stored

    def _charge_dense(self, num_rows: int, num_columns: int) -> None:
        """Refuse weights that could fit a block-sparse file and not the dense tables of this library."""
        if num_rows * num_columns > _MAX_DENSE:
            raise ArgumentError(f"edges: weights {num_rows} x {num_columns} are too large, the limit is {_MAX_DENSE}")
        self._charge(num_rows * num_columns)


def _owners(nodes: Sequence[JuiceNode]) -> list[int]:
    """Follow every node's ``source`` to the node that has the parameters, each link once."""
    owners: dict[int, int] = {}
    for position in range(len(nodes)):
        path: dict[int, None] = {}
        at, source = position, nodes[position].source
        while at not in owners and source is not None:
            if at in path:
                raise ArgumentError("source: the tied nodes point to each other in a circle")
            path[at] = None
            at, source = source, nodes[source].source
        owner = owners.get(at, at)
        owners |= dict.fromkeys([*path, at], owner)
    return [owners[position] for position in range(len(nodes))]


def _have_same_edges(node: JuiceNode, other: JuiceNode, children: Sequence[Node], heir: Sum) -> bool:
    """Whether the weights of two sums with the same stored parameters are the same."""
    assert node.edges is not None
    assert other.edges is not None
    return (
        (node.num_blocks, node.block_size) == (other.num_blocks, other.block_size)
        and [child.num_units for child in children] == [child.num_units for child in heir.children]
        and torch.equal(node.edges, other.edges)
    )


def _check_weights(weights: Tensor, axis: int, kind: str, num_units: int) -> None:
    least, greatest = weights.aminmax()
    if not (least >= 0 and greatest < torch.inf) or not bool((weights.amax(axis) > 0).all()):
        raise ArgumentError(
            f"parameters: expected finite weights >= 0, and some weight for every unit, of a {kind} node of "
            f"{num_units} units; the least is {float(least):.6g}, the greatest {float(greatest):.6g}, the least of the "
            f"units' greatest {float(weights.amax(axis).min()):.6g}"
        )
