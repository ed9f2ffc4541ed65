"""PyJuice's view of a circuit as plain data: what its nodes and its checkpoints both hold.

PyJuice keeps units in blocks of a power of two; a sum's edges connect whole blocks, a product's edges blocks or single
units. Products and sums alternate: a product multiplies inputs and sums, a sum mixes products and inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.families import Bernoulli, Distribution
from circuits.symbolic import Input, Node, ParametricNode, Product, Sum, parameter_owner
from circuits.transforms.rebuild import widened


class Numbers(Protocol):
    """Parameters that may still be in their file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""

    def part(self, start: int, stop: int) -> Tensor:
        """Return the numbers from ``start`` to ``stop`` of all of them, by rows."""


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
    parameters: Tensor | Numbers | None = None
    """Sums (edges, block size, child block size); inputs as PyJuice stores them, flat; None: not initialised."""
    zeros: Tensor | None = None
    """Of a sum's parameters, bool: those that are 0 whatever is stored."""
    var: int = 0
    distribution: Distribution | None = None
    source: int | None = None
    """Position of the node whose parameters this one uses."""

    @property
    def num_units(self) -> int:
        """K."""
        return self.num_blocks * self.block_size


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
        weights = widened(node, self.pc.log_weights(node).detach()).cpu().exp().float()[rows]
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
    assert isinstance(one.parameters, Tensor)
    assert isinstance(other.parameters, Tensor)
    return (
        one.block_size == other.block_size
        and torch.equal(one.edges, other.edges)
        and torch.equal(one.parameters, other.parameters)
    )
