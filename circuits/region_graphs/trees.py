"""Region graphs that are trees below their root: factorized, linear, random binary, and of a tree over variables."""

from __future__ import annotations

import random
from collections.abc import Sequence

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.region_graphs.builder import Builder, bits_of
from circuits.region_graphs.rooted import rooted_tree


def fully_factorized(num_vars: int, num_repetitions: int) -> Builder:
    """Split the root into single variables."""
    builder, root = _rooted(num_vars, num_repetitions)
    for _ in range(num_repetitions if num_vars > 1 else 0):
        builder.partition(root, [builder.region(1 << var) for var in range(num_vars)])
    return builder


def linear_tree(num_vars: int, order: Sequence[int] | None, num_repetitions: int, seed: int | None) -> Builder:
    """Split off one variable at a time."""
    builder, root = _rooted(num_vars, num_repetitions)
    given = list(range(num_vars)) if order is None else list(order)
    if sorted(given) != list(range(num_vars)):
        raise ArgumentError(f"order: expected every variable from 0 to {num_vars - 1} once, got {order!r}")
    shuffle = random.Random(seed).shuffle
    for repetition in range(num_repetitions):
        if repetition > 0:
            shuffle(given)
        region = root
        for var in given[:-1]:
            rest = builder.region(builder.scopes[region] & ~(1 << var))
            builder.partition(region, [builder.region(1 << var), rest])
            region = rest
    return builder


def random_binary_tree(num_vars: int, depth: int | None, num_repetitions: int, seed: int | None) -> Builder:
    """Split regions into random halves."""
    builder, root = _rooted(num_vars, num_repetitions)
    greatest = (num_vars - 1).bit_length()
    depth = greatest if depth is None else checked_count("depth", depth, least=0)
    if depth > greatest:
        raise ArgumentError(
            f"depth: {num_vars} variables can be halved {greatest} times, got {depth}; leave depth out to go down to "
            "single variables"
        )
    shuffle = random.Random(seed).shuffle
    for _ in range(num_repetitions):
        frontier = [(root, list(range(num_vars)))]
        for _ in range(depth):
            halves = []
            for region, scope in frontier:
                if len(scope) == 1:
                    continue
                shuffle(scope)
                cut = len(scope) // 2
                parts = [(builder.region(bits_of(part)), part) for part in (scope[:cut], scope[cut:])]
                builder.partition(region, [part for part, _ in parts])
                halves += parts
            frontier = halves
    return builder


def from_tree(edges: Sequence[tuple[int, int]], root: int | None) -> Builder:
    """Split every variable of a rooted tree off the subtrees below it."""
    tree = rooted_tree(edges, 0 if root is None and not edges else root)
    num_vars = len(tree.order)
    if set(tree.order) != set(range(num_vars)):
        raise StructureError(f"edges: expected a tree over the variables 0 to {num_vars - 1}, got other nodes")
    builder = Builder()
    regions: dict[int, int] = {}
    for var in reversed(tree.order):
        leaf = builder.region(1 << var)
        below = [regions[child] for child in tree.children[var]]
        regions[var] = builder.merged([leaf, *below]) if below else leaf
    return builder


def _rooted(num_vars: int, num_repetitions: int) -> tuple[Builder, int]:
    checked_count("num_vars", num_vars)
    checked_count("num_repetitions", num_repetitions)
    builder = Builder()
    return builder, builder.region((1 << num_vars) - 1)
