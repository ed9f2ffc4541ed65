"""PyJuice's view of a circuit as plain data: what its nodes and its checkpoints both hold.

PyJuice keeps units in blocks of a power of two; a sum's edges connect whole blocks, a product's edges blocks or single
units. Products and sums alternate: a product multiplies inputs and sums, a sum mixes products and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.compile import CompiledCircuit, compile
from circuits.distributions import Bernoulli, Distribution
from circuits.errors import ArgumentError
from circuits.graph import Circuit, Input, Node, ParametricNode, Product, Sum, inputs, parameter_owner, product, sum

_MAX_UNITS = 1 << 20
_MAX_DENSE = 1 << 28
_MAX_DRAWN = 1 << 24


@dataclass(frozen=True, eq=False)
class JuiceNode:
    """One vector of units, ``num_blocks`` blocks of ``block_size`` units."""

    kind: Literal["input", "product", "sum"]
    num_blocks: int
    block_size: int
    children: tuple[int, ...] = ()
    """Positions of earlier nodes."""
    edges: Tensor | None = None
    """int64: products (blocks or units, children), which block or unit of each child; sums (2, edges), which block of
    the node and of its children taken together."""
    parameters: Tensor | None = None
    """Sums (edges, block size, child block size); inputs as PyJuice stores them, flat; None: not initialised."""
    var: int = 0
    distribution: Distribution | None = None
    source: int | None = None
    """Position of the node whose parameters this one uses."""

    @property
    def num_units(self) -> int:
        """K."""
        return self.num_blocks * self.block_size


def build_circuit(
    nodes: Sequence[JuiceNode], *, device: torch.device | str, dtype: torch.dtype, seed: int | None
) -> CompiledCircuit:
    """Build and compile the circuit whose root is the last node that is no one's source only.

    Raises:
        ArgumentError: edges or parameters do not fit.
        StructureError: the nodes are no smooth and decomposable circuit with one root unit.
    """
    builder = _Builder(nodes, seed)
    for position in range(len(nodes)):
        builder.build(position)
    circuit = Circuit(builder.built[-1])
    pc = compile(circuit, device=device, dtype=dtype, seed=0)
    for node in circuit.nodes:
        if isinstance(node, ParametricNode):
            pc.set_weights(node, builder.weights[parameter_owner(node)])
    return pc


class _Builder:
    def __init__(self, nodes: Sequence[JuiceNode], seed: int | None) -> None:
        self.nodes = nodes
        self.built: list[Node] = []
        self.weights: dict[ParametricNode, Tensor] = {}
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self._heirs: dict[int, list[ParametricNode]] = {}
        self._drawn: dict[int, Tensor] = {}
        self._selected: dict[tuple[Node, tuple[int, ...]], Node] = {}

    def build(self, position: int) -> None:
        node = self.nodes[position]
        if node.num_units > _MAX_UNITS:
            raise ArgumentError(f"num_blocks: a node of {node.num_units} units; the limit is {_MAX_UNITS}")
        children = [self.built[child] for child in node.children]
        if node.kind == "input":
            self.built.append(self._input(position, node))
        elif node.kind == "product":
            self.built.append(self._product(node, children))
        else:
            self.built.append(self._sum(position, node, children))

    def _input(self, position: int, node: JuiceNode) -> Input:
        assert node.distribution is not None
        weights = self._input_weights(position, node, node.distribution)
        heir = self._heir(position, weights)
        tied_to = heir if isinstance(heir, Input) and heir.distribution == node.distribution else None
        leaf = inputs(node.var, node.num_units, node.distribution, tied_to=tied_to)
        self._record(position, leaf, weights)
        return leaf

    def _input_weights(self, position: int, node: JuiceNode, distribution: Distribution) -> Tensor:
        num_categories = distribution.num_values
        count = node.num_units * (1 if isinstance(distribution, Bernoulli) else num_categories)
        stored = self._parameters(position, (count,))
        if isinstance(distribution, Bernoulli):
            weights = torch.stack([1 - stored, stored])
        else:
            weights = stored.reshape(node.num_units, num_categories).t()
        return _checked_weights(weights, 0, node)

    def _product(self, node: JuiceNode, children: Sequence[Node]) -> Node:
        assert node.edges is not None
        edges = node.edges
        if len(edges) == node.num_blocks and node.block_size > 1:
            edges = (edges.unsqueeze(1) * node.block_size + torch.arange(node.block_size).reshape(1, -1, 1)).flatten(
                0, 1
            )
        sizes = [child.num_units for child in children]
        limits = torch.tensor(sizes)
        if edges.shape != (node.num_units, len(children)) or bool(((edges < 0) | (edges >= limits)).any()):
            raise ArgumentError(
                f"edges: expected for {node.num_units} units which unit of {len(children)} children with {sizes} units "
                f"they multiply, got {tuple(edges.shape)} of values up to {int(edges.max()) if len(edges) else 0}"
            )
        everything = torch.arange(node.num_units)
        if node.num_units == int(limits.prod()) and len(children) > 1:
            combinations = torch.stack(torch.unravel_index(everything, sizes), 1)
            if torch.equal(edges, combinations) and max(sizes) > 1:
                return product(*children, mode="outer")
        selected = [self._select(child, edges[:, slot]) for slot, child in enumerate(children)]
        return selected[0] if len(selected) == 1 else product(*selected)

    def _select(self, node: Node, units: Tensor) -> Node:
        if torch.equal(units, torch.arange(node.num_units)):
            return node
        key = (node, tuple(units.tolist()))
        _check_dense(len(units), node.num_units)
        if key not in self._selected:
            weights = torch.nn.functional.one_hot(units, node.num_units).double()
            selection = sum(node, num_units=len(units))
            self.weights[selection] = weights
            self._selected[key] = selection
        return self._selected[key]

    def _sum(self, position: int, node: JuiceNode, children: Sequence[Node]) -> Sum:
        assert node.edges is not None
        sizes = {self.nodes[child].block_size for child in node.children}
        if len(sizes) != 1:
            raise ArgumentError(f"block_size: children of a sum need one block size, got {sorted(sizes)}")
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
        _check_dense(node.num_units, int(num_child_blocks) * child_block)
        stored = self._parameters(position, (edges.shape[1], node.block_size, child_block))
        blocks = torch.zeros(node.num_blocks, int(num_child_blocks), node.block_size, child_block, dtype=torch.float64)
        blocks.index_put_((edges[0], edges[1]), stored, accumulate=True)
        weights = _checked_weights(blocks.transpose(1, 2).flatten(2).flatten(0, 1), 1, node)
        heir = self._heir(position, weights)
        tied_to = heir if isinstance(heir, Sum) else None
        mixed = sum(*children, num_units=node.num_units, tied_to=tied_to)
        self._record(position, mixed, weights)
        return mixed

    def _source(self, position: int) -> int:
        seen = set()
        source = self.nodes[position].source
        while source is not None:
            if source in seen:
                raise ArgumentError("source: the tied nodes point to each other in a circle")
            seen.add(source)
            position, source = source, self.nodes[source].source
        return position

    def _parameters(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """Return the stored parameters of a node or of its source, or draw them where there are none."""
        source = self._source(position)
        stored = self.nodes[source].parameters
        if stored is None:
            if torch.Size(shape).numel() > _MAX_DRAWN:
                raise ArgumentError(f"parameters: none are given, and the limit to draw is {_MAX_DRAWN} of them")
            if source not in self._drawn:
                draw = torch.empty(shape, dtype=torch.float64).exponential_(generator=self.generator)
                self._drawn[source] = draw / draw.max()
            stored = self._drawn[source]
        if stored.numel() != torch.Size(shape).numel() or (len(shape) > 1 and tuple(stored.shape) != shape):
            raise ArgumentError(
                f"parameters: expected shape {shape} for {self.nodes[position].kind} node {position}, "
                f"got {tuple(stored.shape)}"
            )
        return stored.double().reshape(shape)

    def _heir(self, position: int, weights: Tensor) -> ParametricNode | None:
        for heir in self._heirs.get(self._source(position), []):
            if torch.equal(self.weights[heir], weights):
                return heir
        return None

    def _record(self, position: int, node: ParametricNode, weights: Tensor) -> None:
        if node.tied_to is None:
            self.weights[node] = weights
            self._heirs.setdefault(self._source(position), []).append(node)


def _check_dense(num_rows: int, num_columns: int) -> None:
    """Raise ArgumentError for weights that could fit a block-sparse file and not the dense tables of this library."""
    if num_rows * num_columns > _MAX_DENSE:
        raise ArgumentError(f"edges: weights {num_rows} x {num_columns} are too large, the limit is {_MAX_DENSE}")


def _checked_weights(weights: Tensor, axis: int, node: JuiceNode) -> Tensor:
    if not bool((weights >= 0).all() and (weights < torch.inf).all()) or not bool((weights.sum(axis) > 0).all()):
        raise ArgumentError(
            f"parameters: expected finite weights >= 0, and some weight for every unit, of a {node.kind} node of "
            f"{node.num_units} units; the least is {float(weights.min()):.6g}, the least sum "
            f"{float(weights.sum(axis).min()):.6g}"
        )
    return weights


def list_nodes(pc: CompiledCircuit, block_size: int | None) -> list[JuiceNode]:
    """Write a circuit as PyJuice's nodes, the root last; see ``to_pyjuice`` for the rules."""
    root = pc.circuit.root
    counts = [node.num_units for node in pc.circuit.nodes if node is not root]
    if block_size is None:
        block_size = 1
        while counts and all(count % (2 * block_size) == 0 for count in counts):
            block_size *= 2
    if not isinstance(block_size, int) or block_size < 1 or block_size & (block_size - 1):
        raise ArgumentError(f"block_size: expected a power of two, or None, got {block_size!r}")
    lister = _Lister(pc, block_size)
    for node in pc.circuit.nodes:
        lister.add(node)
    if not isinstance(root, Sum):
        lister.add_root(lister.position[root])
    return lister.nodes


class _Lister:
    """Unit k of a node becomes unit k of its blocks; units that only fill the last block are copies of unit 0."""

    def __init__(self, pc: CompiledCircuit, block_size: int) -> None:
        self.pc = pc
        self.block_size = block_size
        self.nodes: list[JuiceNode] = []
        self.position: dict[Node, int] = {}
        self._wrapped: dict[int, int] = {}
        self._sources: dict[ParametricNode, list[int]] = {}

    def add(self, node: Node) -> None:
        if isinstance(node, Input):
            self.position[node] = self._add_input(node)
        elif isinstance(node, Product):
            self.position[node] = self._add_product(node)
        elif isinstance(node, Sum):
            self.position[node] = self._add_sum(node)

    def add_root(self, child: int) -> None:
        """Put a sum of one unit on top of unit 0 of a node that is no sum."""
        weights = torch.zeros(1, self.nodes[child].num_units)
        weights[0, 0] = 1.0
        self._append_sum(None, [child], weights, 1)

    def _append(self, node: JuiceNode) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _padded(self, num_units: int) -> Tensor:
        """Return the old unit of every new one."""
        num_blocks = -(-num_units // self.block_size)
        units = torch.arange(num_blocks * self.block_size)
        return units.masked_fill(units >= num_units, 0)

    def _add_input(self, node: Input) -> int:
        units = self._padded(node.num_units)
        weights = self.pc.log_weights(node).detach().cpu().exp().float()[:, units]
        parameters = weights[1] if isinstance(node.distribution, Bernoulli) else weights.t().flatten()
        num_blocks = len(units) // self.block_size
        source = self._source_of(node, lambda other: other.num_blocks == num_blocks)
        return self._append_parametric(
            node,
            JuiceNode(
                "input",
                num_blocks,
                self.block_size,
                parameters=None if source is not None else parameters.contiguous(),
                var=node.var,
                distribution=node.distribution,
                source=source,
            ),
        )

    def _add_product(self, node: Product) -> int:
        children = [self._wrap(self.position[child], "product") for child in node.children]
        units = self._padded(node.num_units)
        num_blocks = len(units) // self.block_size
        if node.mode == "elementwise":
            edges = torch.arange(num_blocks).unsqueeze(1).expand(-1, len(children)).contiguous()
        else:
            edges = torch.stack(torch.unravel_index(units, [child.num_units for child in node.children]), 1)
        return self._append(JuiceNode("product", num_blocks, self.block_size, tuple(children), edges))

    def _add_sum(self, node: Sum) -> int:
        children = [self._wrap(self.position[child], "sum") for child in node.children]
        is_root = node is self.pc.circuit.root
        rows = torch.arange(1) if is_root else self._padded(node.num_units)
        weights = self.pc.log_weights(node).detach().cpu().exp().float()[rows]
        parts = []
        for child, part in zip(children, weights.split([child.num_units for child in node.children], 1), strict=True):
            parts.append(torch.nn.functional.pad(part, (0, self.nodes[child].num_units - part.shape[1])))
        return self._append_sum(node, children, torch.cat(parts, 1), 1 if is_root else self.block_size)

    def _append_sum(self, node: Sum | None, children: list[int], weights: Tensor, block_size: int) -> int:
        blocks = weights.unflatten(1, (-1, self.block_size)).unflatten(0, (-1, block_size)).transpose(1, 2)
        edges = (blocks > 0).flatten(2).any(2).nonzero().t().contiguous()
        listed = JuiceNode(
            "sum", len(blocks), block_size, tuple(children), edges, blocks[edges[0], edges[1]].contiguous()
        )
        if node is None:
            return self._append(listed)
        source = self._source_of(node, lambda other: _are_equal_sums(other, listed))
        if source is not None:
            listed = JuiceNode("sum", len(blocks), block_size, tuple(children), edges, source=source)
        return self._append_parametric(node, listed)

    def _append_parametric(self, node: ParametricNode, listed: JuiceNode) -> int:
        position = self._append(listed)
        if listed.source is None:
            self._sources.setdefault(parameter_owner(node), []).append(position)
        return position

    def _source_of(self, node: ParametricNode, fits: Callable[[JuiceNode], bool]) -> int | None:
        for position in self._sources.get(parameter_owner(node), []):
            if fits(self.nodes[position]):
                return position
        return None

    def _wrap(self, position: int, parent: Literal["product", "sum"]) -> int:
        """Return a node of the other kind than ``parent`` with the units of the node at ``position``."""
        node = self.nodes[position]
        if node.kind != parent:
            return position
        if position not in self._wrapped:
            blocks = torch.arange(node.num_blocks)
            if parent == "sum":
                copy = JuiceNode("product", node.num_blocks, node.block_size, (position,), blocks.unsqueeze(1))
            else:
                eye = torch.eye(node.block_size).expand(node.num_blocks, -1, -1).contiguous()
                copy = JuiceNode("sum", node.num_blocks, node.block_size, (position,), blocks.expand(2, -1), eye)
            self._wrapped[position] = self._append(copy)
        return self._wrapped[position]


def _are_equal_sums(one: JuiceNode, other: JuiceNode) -> bool:
    assert one.edges is not None
    assert other.edges is not None
    assert one.parameters is not None
    assert other.parameters is not None
    return (
        one.block_size == other.block_size
        and torch.equal(one.edges, other.edges)
        and torch.equal(one.parameters, other.parameters)
    )
