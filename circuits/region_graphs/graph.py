"""The region graph itself: validated, immutable, saved as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from circuits.errors import ArgumentError, StructureError
from circuits.region_graphs import chow_liu, poon_domingos, quad, records, trees
from circuits.region_graphs.builder import Builder, Partition, bits_of
from circuits.symbolic.scopes import format_scope, variables_of

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class RegionGraph:
    """Regions (sets of variables) and partitions of them, from one root down to regions that are not split further.

    Region graphs are the skeletons of circuits (Dennis and Ventura 2012): :func:`circuits.structures.from_region_graph`
    fills them with units. Build one with the class methods below; two regions may have the same variables.

    Args:
        scope_bits: the variables of every region as a bit set: bit v is set when variable v belongs to it.
        partitions: which region is split into which others; a region may be split in several ways, or not at all.
        shape: the shape of the grid that the variables 0 .. D - 1 form in row-major order, for pictures; or None.

    Raises:
        StructureError: parts that overlap or do not cover their region, a region that nothing reaches, no single root,
            or a root that does not have the variables 0 .. D - 1.
    """

    scope_bits: tuple[int, ...]
    partitions: tuple[Partition, ...]
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope_bits", tuple(self.scope_bits))
        object.__setattr__(self, "partitions", tuple(Partition(p, tuple(parts)) for p, parts in self.partitions))
        for region, scope in enumerate(self.scope_bits):
            if scope <= 0:
                raise StructureError(f"region {region}: expected variables, got none")
        for partition in self.partitions:
            self._check_partition(partition)
        if self.root_scope != (1 << self.num_vars) - 1:
            raise StructureError(
                f"root: expected all variables from 0 to {self.num_vars - 1}, got {format_scope(self.root_scope)}"
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            self._check_shape()

    @property
    def num_regions(self) -> int:
        """How many regions there are."""
        return len(self.scope_bits)

    @property
    def num_vars(self) -> int:
        """D, the number of variables."""
        return self.root_scope.bit_length()

    @property
    def root_scope(self) -> int:
        """The scope of the root as a bit set."""
        return self.scope_bits[self.root]

    @cached_property
    def root(self) -> int:
        """The position of the region that is part of no other."""
        parts = {part for partition in self.partitions for part in partition.parts}
        roots = [region for region in range(self.num_regions) if region not in parts]
        if len(roots) != 1:
            raise StructureError(
                f"no single root: {len(roots)} of {self.num_regions} regions are part of no other"
                + "".join(f", {format_scope(self.scope_bits[region])}" for region in roots[:3])
            )
        return roots[0]

    @cached_property
    def partitions_of(self) -> tuple[tuple[Partition, ...], ...]:
        """The partitions of every region; none for a leaf."""
        found: list[list[Partition]] = [[] for _ in self.scope_bits]
        for partition in self.partitions:
            found[partition.region].append(partition)
        return tuple(tuple(partitions) for partitions in found)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The regions that are not split."""
        return tuple(region for region, partitions in enumerate(self.partitions_of) if not partitions)

    @cached_property
    def parts_first(self) -> tuple[int, ...]:
        """All regions, each after the parts of all its partitions."""
        return tuple(sorted(range(self.num_regions), key=lambda region: self.scope_bits[region].bit_count()))

    @cached_property
    def is_structured_decomposable(self) -> bool:
        """Whether regions with the same variables are always split in the same way.

        Circuits over such a graph can be multiplied with themselves and with each other (Pipatsrisawat and Darwiche
        2008).
        """
        ways: dict[int, frozenset[int]] = {}
        for partition in self.partitions:
            way = frozenset(self.scope_bits[part] for part in partition.parts)
            if ways.setdefault(self.scope_bits[partition.region], way) != way:
                return False
        return True

    def scope(self, region: int) -> frozenset[int]:
        """Return the variables of a region."""
        return frozenset(variables_of(self.scope_bits[region]))

    @classmethod
    def from_edges(
        cls, partitions: Iterable[tuple[Iterable[int], Sequence[Iterable[int]]]], *, shape: Sequence[int] | None = None
    ) -> RegionGraph:
        """Build a region graph of your own from its partitions, each a region and its parts, given as sets.

        Regions with the same variables are one region here.

        Args:
            partitions: for instance ``[({0, 1, 2}, [{0}, {1, 2}]), ({1, 2}, [{1}, {2}])]``.
            shape: of the grid that the variables form, for pictures.

        Raises:
            StructureError: the partitions are not a region graph, see the class.
        """
        builder = Builder(merge=True)
        for region, parts in partitions:
            builder.partition(builder.region(bits_of(region)), [builder.region(bits_of(part)) for part in parts])
        return cls._built(builder, shape)

    @classmethod
    def from_tree(cls, edges: Iterable[tuple[int, int]], *, root: int | None = None) -> RegionGraph:
        """Build the region graph of a tree over the variables: each is split from the subtrees below it.

        Args:
            edges: D - 1 pairs of variables, in any order and direction.
            root: the variable at the top; None: the tree's centre, so that the depth is least.

        Raises:
            StructureError: the edges are not a tree over the variables 0 .. D - 1.
        """
        return cls._built(trees.from_tree(list(edges), root))

    @classmethod
    def from_networkx(cls, graph: networkx.DiGraph, *, shape: Sequence[int] | None = None) -> RegionGraph:
        """Build a region graph from a directed graph: regions have an attribute ``scope``, partitions have none.

        Args:
            graph: edges go from each region to its partitions, and from each partition to its parts.
            shape: of the grid that the variables form, for pictures.

        Raises:
            StructureError: the graph is not a region graph, see the class.
        """
        builder = Builder()
        regions = {
            node: builder.region(bits_of(scope))
            for node, scope in graph.nodes(data="scope", default=None)
            if scope is not None
        }
        for node in graph.nodes:
            if node in regions:
                continue
            above, below = list(graph.predecessors(node)), list(graph.successors(node))
            if len(above) != 1 or any(neighbour not in regions for neighbour in above + below):
                raise StructureError(
                    f"graph: expected one region above the partition {node!r} and regions below it; regions are the "
                    "nodes with an attribute scope"
                )
            builder.partition(regions[above[0]], [regions[part] for part in below])
        return cls._built(builder, shape)

    @classmethod
    def fully_factorized(cls, num_vars: int, *, num_repetitions: int = 1) -> RegionGraph:
        """Build a root that is split into single variables at once.

        Args:
            num_vars: D >= 1.
            num_repetitions: how many times, each with leaves of its own.
        """
        return cls._built(trees.fully_factorized(num_vars, num_repetitions))

    @classmethod
    def linear_tree(
        cls, num_vars: int, *, order: Sequence[int] | None = None, num_repetitions: int = 1, seed: int | None = None
    ) -> RegionGraph:
        """Build a chain that splits off one variable at a time, the autoregressive tail (Loconte et al. 2025).

        Args:
            num_vars: D >= 1.
            order: the variables as they are split off; by default 0, 1, ..., D - 1.
            num_repetitions: how many chains; all but the first are in random orders.
            seed: of the random orders.
        """
        return cls._built(trees.linear_tree(num_vars, order, num_repetitions, seed))

    @classmethod
    def random_binary_tree(
        cls, num_vars: int, depth: int | None = None, num_repetitions: int = 1, seed: int | None = None
    ) -> RegionGraph:
        """Build random binary trees below one root, the region graph of RAT-SPNs (Peharz et al. 2020).

        Args:
            num_vars: D >= 1.
            depth: how often regions are split into two random halves; None: down to single variables.
            num_repetitions: the number of trees, each with regions of its own below the root.
            seed: of the random halves.
        """
        return cls._built(trees.random_binary_tree(num_vars, depth, num_repetitions, seed))

    @classmethod
    def poon_domingos(
        cls, shape: Sequence[int], delta: int | Sequence[int] = 1, *, max_depth: int | None = None
    ) -> RegionGraph:
        """Build all rectangles that guillotine cuts at multiples of ``delta`` make (Poon and Domingos 2011).

        Args:
            shape: (height, width), or (channels, height, width) of which the channels are never cut; any number of
                axes when ``delta`` has one entry per axis.
            delta: the distance between cuts, >= 1. When several are given, coarse first, a rectangle is cut at the
                first that cuts it.
            max_depth: how many cuts lie between the root and a leaf at most.
        """
        return cls._built(poon_domingos.poon_domingos(shape, delta, max_depth), shape)

    @classmethod
    def quad_tree(cls, shape: Sequence[int], *, num_splits: int = 2) -> RegionGraph:
        """Build a tree that merges 2 x 2 neighbours, bottom up (Mari, Vessio, Vergari 2023).

        Args:
            shape: (height, width), or (channels, height, width) with leaves of all channels of one pixel.
            num_splits: 2: a square is split into rows and those into cells; 4: into four cells at once.
        """
        return cls._built(quad.quad_tree(shape, num_splits), shape)

    @classmethod
    def quad_graph(cls, shape: Sequence[int]) -> RegionGraph:
        """Build the :meth:`quad_tree` of a shape that splits every square both ways, into rows and into columns."""
        return cls._built(quad.quad_graph(shape), shape)

    @classmethod
    def chow_liu_tree(
        cls,
        data: Tensor,
        *,
        num_categories: int | Sequence[int] | None = None,
        root: int | None = None,
        pseudocount: float = 0.01,
        weights: Tensor | None = None,
        observed: Tensor | None = None,
        num_bins: int | None = None,
    ) -> RegionGraph:
        """Build the region graph of the tree with the most mutual information in data (Chow and Liu 1968).

        Args:
            data: integers (N, D), or floating point with NaN for missing values; this and the other arguments are
                those of :func:`~circuits.structures.empirical_mutual_information`.
            root: the variable at the top; None: the tree's centre.
        """
        edges = chow_liu.chow_liu_tree(
            data,
            num_categories=num_categories,
            pseudocount=pseudocount,
            weights=weights,
            observed=observed,
            num_bins=num_bins,
        )
        return cls.from_tree(edges, root=root)

    def to_networkx(self) -> networkx.DiGraph:
        """Return a frozen networkx graph: nodes ``("region", i)`` with their ``scope``, and ``("partition", j)``."""
        import networkx

        graph = networkx.DiGraph()
        for region in range(self.num_regions):
            graph.add_node(("region", region), scope=self.scope(region))
        for position, partition in enumerate(self.partitions):
            graph.add_edge(("region", partition.region), ("partition", position))
            graph.add_edges_from((("partition", position), ("region", part)) for part in partition.parts)
        return networkx.freeze(graph)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the region graph as a JSON file; whoever reads it meanwhile sees the old one or the new one."""
        records.write(path, [sorted(self.scope(i)) for i in range(self.num_regions)], self.partitions, self.shape)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegionGraph:
        """Read a region graph that :meth:`save` wrote.

        Raises CheckpointError if the file is missing, corrupt, hostile, or of a newer format version.
        """
        return records.read(path, cls)

    def __repr__(self) -> str:
        return f"RegionGraph({self.num_vars} variables, {self.num_regions} regions, {len(self.partitions)} partitions)"

    @classmethod
    def _built(cls, builder: Builder, shape: Sequence[int] | None = None) -> RegionGraph:
        return cls(tuple(builder.scopes), tuple(builder.partitions), None if shape is None else tuple(shape))

    def _check_partition(self, partition: Partition) -> None:
        known = range(self.num_regions)
        for region in (partition.region, *partition.parts):
            if region not in known:
                raise StructureError(f"unknown region {region!r}: the regions are 0 to {self.num_regions - 1}")
        scope = self.scope_bits[partition.region]
        if len(partition.parts) < 2:
            raise StructureError(
                f"partition of {format_scope(scope)}: expected at least 2 parts, got {len(partition.parts)}"
            )
        covered = 0
        for part in partition.parts:
            shared = covered & self.scope_bits[part]
            if shared:
                raise StructureError(
                    f"partition of {format_scope(scope)}: expected disjoint parts, got {format_scope(shared)} in "
                    "several"
                )
            covered |= self.scope_bits[part]
        if covered != scope:
            raise StructureError(
                f"partition of {format_scope(scope)}: expected the same variables in its parts, got "
                f"{format_scope(covered)}"
            )

    def _check_shape(self) -> None:
        assert self.shape is not None
        if any(type(length) is not int or length < 1 for length in self.shape):
            raise ArgumentError(f"shape: expected integers >= 1, got {self.shape!r}")
        total = math.prod(self.shape)
        if total != self.num_vars:
            raise ArgumentError(
                f"shape: expected {self.num_vars} cells, one per variable, got {self.shape} with {total}"
            )


__all__ = ["Partition", "RegionGraph"]
