"""Region graphs filled with units, and structures that are one region graph each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.families import Distribution
from circuits.region_graphs import RegionGraph
from circuits.structures.options import families_of
from circuits.symbolic import Circuit, Node, Product, Sum, inputs, product, sum
from circuits.symbolic.scopes import variables_of

SumProduct = Literal["cp", "cp_shared", "tucker"]
Distributions = int | Distribution | Sequence[int | Distribution] | Mapping[int, int | Distribution]

_MAX_OUTER_UNITS = 1 << 20


def from_region_graph(
    region_graph: RegionGraph,
    num_units: int,
    distribution: Distributions,
    *,
    num_input_units: int | None = None,
    sum_product: SumProduct = "cp",
    num_classes: int | None = None,
) -> Circuit:
    """Fill a region graph with units (Peharz et al. 2020; Mari, Vessio, Vergari 2023; Loconte et al. 2025).

    A leaf region is a vector of input units, over several variables their elementwise product. A region that is split
    is, by ``sum_product``:

    - "cp": every part is mixed by a dense sum of its own, the sums are multiplied elementwise, and where there are
      several partitions a dense mixing sum joins them. O(K^2) a part.
    - "cp_shared": "cp", and the dense sums over the j-th parts of all partitions whose regions lie at the same height
      (longest way down to a leaf) share their weights if these have the same shape. Mixing sums, the root and the
      inputs are not shared.
    - "tucker": the parts are multiplied in all combinations (mode "outer"), and one dense sum mixes the combinations of
      all partitions. O(K^3) for two parts.

    The root is a dense sum over its partitions.

    Args:
        region_graph: the regions and their partitions.
        num_units: K, units of every region that is split.
        distribution: an input family, or a number of categories; one for all variables, a sequence, or a mapping.
        num_input_units: units of leaf regions, K by default.
        sum_product: how parts are joined.
        num_classes: R, for a class-conditional model: the root has one unit per class.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: "tucker" would need a product of more than 2^20 units.
    """
    return _filled(region_graph, num_units, distribution, num_input_units, sum_product, num_classes)


def _filled(
    region_graph: RegionGraph,
    num_units: int,
    distribution: Distributions,
    num_input_units: int | None,
    sum_product: SumProduct,
    num_classes: int | None,
) -> Circuit:
    if not isinstance(region_graph, RegionGraph):
        raise ArgumentError(f"region_graph: expected a ct.RegionGraph, got {type(region_graph).__name__}")
    if sum_product not in get_args(SumProduct):
        raise ArgumentError(f"sum_product: expected 'cp', 'cp_shared' or 'tucker', got {sum_product!r}")
    checked_count("num_units", num_units)
    num_roots = 1 if num_classes is None else checked_count("num_classes", num_classes)
    num_input_units = num_units if num_input_units is None else checked_count("num_input_units", num_input_units)
    families = families_of("distribution", distribution, region_graph.num_vars)
    nodes: dict[int, Node] = {}
    heights: dict[int, int] = {}
    joins = _Joins(num_units, sum_product)
    for region in region_graph.parts_first:
        partitions = region_graph.partitions_of[region]
        if not partitions:
            variables = variables_of(region_graph.scope_bits[region])
            leaves = [inputs(var, num_input_units, families[var]) for var in variables]
            nodes[region] = leaves[0] if len(leaves) == 1 else product(*leaves)
            heights[region] = 0
            continue
        heights[region] = 1 + max(heights[part] for partition in partitions for part in partition.parts)
        products = [joins.product([nodes[part] for part in p.parts], heights[region]) for p in partitions]
        if region == region_graph.root:
            return Circuit(sum(*products, num_units=num_roots), num_classes=num_classes)
        needs_sum = sum_product == "tucker" or len(products) > 1
        nodes[region] = sum(*products, num_units=num_units) if needs_sum else products[0]
    return Circuit(sum(nodes[region_graph.root], num_units=num_roots), num_classes=num_classes)


def rat_spn(
    num_vars: int,
    depth: int,
    num_repetitions: int,
    num_units: int,
    distribution: Distributions,
    *,
    num_input_units: int | None = None,
    sum_product: SumProduct = "tucker",
    num_classes: int | None = None,
    seed: int | None = None,
) -> Circuit:
    """Build a random tensorized sum-product network (Peharz et al. 2020), with outer products as in the paper.

    See ``RegionGraph.random_binary_tree`` and :func:`from_region_graph` for the arguments.
    """
    graph = RegionGraph.random_binary_tree(num_vars, depth, num_repetitions, seed)
    return _filled(graph, num_units, distribution, num_input_units, sum_product, num_classes)


def poon_domingos(
    shape: Sequence[int],
    delta: int | Sequence[int],
    num_units: int,
    distribution: Distributions,
    *,
    max_depth: int | None = None,
    num_input_units: int | None = None,
    sum_product: SumProduct = "cp",
    num_classes: int | None = None,
) -> Circuit:
    """Build a circuit over all rectangles of an image (Poon and Domingos 2011).

    See ``RegionGraph.poon_domingos`` and :func:`from_region_graph` for the arguments.
    """
    graph = RegionGraph.poon_domingos(shape, delta, max_depth=max_depth)
    return _filled(graph, num_units, distribution, num_input_units, sum_product, num_classes)


def quad_tree(
    shape: Sequence[int],
    num_units: int,
    distribution: Distributions,
    *,
    num_splits: int = 2,
    num_input_units: int | None = None,
    sum_product: SumProduct = "cp",
    num_classes: int | None = None,
) -> Circuit:
    """Build a circuit over an image that merges 2 x 2 neighbours, bottom up (Mari, Vessio, Vergari 2023).

    See ``RegionGraph.quad_tree`` and :func:`from_region_graph` for the arguments.
    """
    graph = RegionGraph.quad_tree(shape, num_splits=num_splits)
    return _filled(graph, num_units, distribution, num_input_units, sum_product, num_classes)


def quad_graph(
    shape: Sequence[int],
    num_units: int,
    distribution: Distributions,
    *,
    num_input_units: int | None = None,
    sum_product: SumProduct = "cp",
    num_classes: int | None = None,
) -> Circuit:
    """Build the quad tree that splits every square both ways, by rows and by columns (Mari, Vessio, Vergari 2023).

    See ``RegionGraph.quad_graph`` and :func:`from_region_graph` for the arguments.
    """
    graph = RegionGraph.quad_graph(shape)
    return _filled(graph, num_units, distribution, num_input_units, sum_product, num_classes)


def linear_tree(
    num_vars: int,
    num_units: int,
    distribution: Distributions,
    *,
    order: Sequence[int] | None = None,
    num_repetitions: int = 1,
    num_input_units: int | None = None,
    sum_product: SumProduct = "cp",
    num_classes: int | None = None,
    seed: int | None = None,
) -> Circuit:
    """Build a chain that splits off one variable at a time, the autoregressive tail (Loconte et al. 2025).

    With "cp" this is a tensor train with non-negative cores; see ``RegionGraph.linear_tree`` and
    :func:`from_region_graph` for the arguments.
    """
    graph = RegionGraph.linear_tree(num_vars, order=order, num_repetitions=num_repetitions, seed=seed)
    return _filled(graph, num_units, distribution, num_input_units, sum_product, num_classes)


class _Joins:
    """Builds the products of partitions, and remembers the shared sums below them."""

    def __init__(self, num_units: int, sum_product: SumProduct) -> None:
        self._num_units = num_units
        self._sum_product = sum_product
        self._shared: dict[tuple[int, int, int], Sum] = {}

    def product(self, parts: Sequence[Node], height: int) -> Product:
        if self._sum_product == "tucker":
            _check_outer_units(parts)
            return product(*parts, mode="outer")
        return product(*(self._mixed(part, position, height) for position, part in enumerate(parts)))

    def _mixed(self, part: Node, position: int, height: int) -> Sum:
        if self._sum_product == "cp":
            return sum(part, num_units=self._num_units)
        key = height, position, part.num_units
        mixed = sum(part, num_units=self._num_units, tied_to=self._shared.get(key))
        self._shared.setdefault(key, mixed)
        return mixed


def _check_outer_units(parts: Sequence[Node]) -> None:
    total = math.prod(part.num_units for part in parts)
    if total > _MAX_OUTER_UNITS:
        raise StructureError(
            f"sum_product: 'tucker' would multiply {len(parts)} parts into {total} units, more than "
            f"{_MAX_OUTER_UNITS}; use 'cp', fewer units, or a region graph whose partitions have fewer parts"
        )
