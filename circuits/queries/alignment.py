"""Walking several circuits at once: which tuples of nodes meet in ``sum_x prod_j p_j(x)``, and in what order.

Sums distribute; products over the same scope are matched child by child where their partitions of the scope agree, or
where those of one are finer: then several children together meet one. So a fully factorized circuit aligns with every
other one (Vergari, Choi, Liu, Teso, Van den Broeck 2021, "A Compositional Atlas of Tractable Circuit Operations").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.errors import PropertyError
from circuits.symbolic import Input, Node, Product, Sum


class Part(NamedTuple):
    """A node, or a product node of which only some children are looked at; its units are those of the node."""

    node: Node
    positions: tuple[int, ...] | None = None

    @property
    def factors(self) -> list[tuple[Part, Tensor | None]]:
        """The parts that multiply, each with which of its units every unit takes, (K,); None: unit k takes k."""
        node = self.node
        if not isinstance(node, Product):
            return [(self, None)]
        maps: Sequence[Tensor | None] = [None] * len(node.children)
        if node.mode == "outer":
            maps = torch.unravel_index(torch.arange(node.num_units), [child.num_units for child in node.children])
        positions = range(len(node.children)) if self.positions is None else self.positions
        return [(Part(node.children[i]), maps[i]) for i in positions]


Meeting = tuple[Part, ...]
"""Parts over one scope, one of each circuit."""


class SumStep(NamedTuple):
    """The part on ``axis`` is a sum: its children take its place, one after the other."""

    axis: int
    children: list[Meeting]


class ProductStep(NamedTuple):
    """Independent meetings that multiply, each with the unit maps of its parts."""

    children: list[Meeting]
    maps: list[list[Tensor | None]]


class LeafStep(NamedTuple):
    """All parts are input nodes of one variable."""

    children: tuple[Meeting, ...] = ()


Step = SumStep | ProductStep | LeafStep


def align(roots: Iterable[Meeting], known: Collection[Meeting] = ()) -> dict[Meeting, Step]:
    """Return every meeting below the given ones with its step, children first, but for those already ``known``.

    Raises PropertyError if two products decompose a scope in ways that do not fit together.
    """
    steps: dict[Meeting, Step] = {}
    opened: dict[Meeting, Step] = {}
    stack = list(roots)
    while stack:
        meeting = stack[-1]
        if meeting in steps or meeting in known:
            stack.pop()
            continue
        if meeting in opened:
            steps[meeting] = opened.pop(meeting)
            stack.pop()
            continue
        opened[meeting] = _step_of(meeting)
        stack.extend(child for child in opened[meeting].children if child not in steps)
    return steps


def can_align(p: Node, q: Node) -> bool:
    """Return whether two nodes decompose the same scopes alike."""
    try:
        align([(Part(p), Part(q))])
    except PropertyError:
        return False
    return True


def _step_of(meeting: Meeting) -> Step:
    for axis, part in enumerate(meeting):
        if isinstance(part.node, Sum):
            children = [(*meeting[:axis], Part(child), *meeting[axis + 1 :]) for child in part.node.children]
            return SumStep(axis, children)
    if all(isinstance(part.node, Input) for part in meeting):
        return LeafStep()
    factors = [part.factors for part in meeting]
    groups = _overlapping([[factor.node.scope_bits for factor, _ in own] for own in factors])
    children, maps = [], []
    for group in groups:
        parts, part_maps = [], []
        for part, own, members in zip(meeting, factors, group, strict=True):
            alone = own[members[0]] if len(members) == 1 else None
            positions = range(len(part.node.children)) if part.positions is None else part.positions
            parts.append(alone[0] if alone else Part(part.node, tuple(positions[i] for i in members)))
            part_maps.append(alone[1] if alone else None)
        children.append(tuple(parts))
        maps.append(part_maps)
    if len(groups) == 1 and all(
        len(members) > 1 or isinstance(part.node, Input) for part, members in zip(meeting, groups[0], strict=True)
    ):
        first, second = [part.node for part in meeting if isinstance(part.node, Product)][:2]
        raise PropertyError(
            f"not compatible: {first} and {second} decompose a scope in ways that cross each other, "
            f"{_partition_text(first)} and {_partition_text(second)}; expected products over the same variables to "
            "split them in the same way (compatible circuits; within one circuit: structured decomposable)"
        )
    return ProductStep(children, maps)


def _overlapping(scopes: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Group the scopes (bit sets) of all axes by overlap: per group and axis the positions that belong to it."""
    groups: list[tuple[int, list[list[int]]]] = []
    for axis, own in enumerate(scopes):
        for position, bits in enumerate(own):
            joined: list[list[int]] = [[] for _ in scopes]
            joined[axis].append(position)
            kept = []
            for other_bits, members in groups:
                if other_bits & bits:
                    bits |= other_bits
                    joined = [sorted(a + b) for a, b in zip(joined, members, strict=True)]
                else:
                    kept.append((other_bits, members))
            groups = [*kept, (bits, joined)]
    return [members for _, members in groups]


def _partition_text(node: Node) -> str:
    return " | ".join(str(sorted(child.scope)) for child in node.children)
