"""Mixtures over blocks of variables: a component is a product of joint tables of a few variables each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.arguments import checked_count, shape_of
from circuits.errors import ArgumentError, StructureError
from circuits.families import Literal
from circuits.symbolic import Circuit, Input, Node, inputs, product, sum


def block_mixture(blocks: Sequence[Sequence[int]], num_components: int, num_categories: int | Sequence[int]) -> Circuit:
    """Build a mixture whose components have one joint table per block, ``p(x) = sum_k w_k prod_g p_kg(x_block(g))``.

    With blocks of one variable each it is the latent class model. Larger blocks keep what depends most strongly
    together, at the price of one weight per component and joint value. The sum node ``table{g}`` holds the tables of
    block g, (K, M) for its M joint values, the last variable's varying fastest; below it are the values' indicators.

    Args:
        blocks: disjoint and together all variables 0 .. D - 1, see :func:`correlated_blocks`.
        num_components: K >= 1.
        num_categories: C, one for all variables or one per variable.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: the blocks overlap, or leave a variable out.
    """
    checked_count("num_components", num_components)
    num_vars = checked_blocks(blocks)
    categories = checked_categories(num_categories, num_vars)
    tables = [
        sum(_joint_values(block, categories), num_units=num_components, name=f"table{position}")
        for position, block in enumerate(blocks)
    ]
    return Circuit(sum(product(*tables), num_units=1, name="components"))


def correlated_blocks(
    information: Tensor,  # shape: (D, D)
    num_categories: int | Sequence[int],
    *,
    max_values: int = 16,
) -> list[tuple[int, ...]]:
    """Partition the variables into blocks that depend strongly: merge, again and again, the two that share the most.

    What two blocks share is the total mutual information of their variables, one of each (greedy agglomeration).

    Args:
        information: mutual information of every two variables, (D, D), see
            ``ct.structures.empirical_mutual_information``.
        num_categories: C, one for all variables or one per variable.
        max_values: the most joint values that a block of several variables may have.

    Returns:
        The blocks, each in ascending order, sorted by their first variables.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    if not isinstance(information, Tensor) or information.dim() != 2 or len(information) != information.shape[1]:
        raise ArgumentError(f"information: expected a tensor (D, D), got {shape_of(information)}")
    checked_count("max_values", max_values)
    num_vars = len(information)
    values = torch.tensor(checked_categories(num_categories, num_vars), dtype=torch.float64)
    shared = information.detach().to("cpu", torch.float64, copy=True).fill_diagonal_(-torch.inf)
    shared[values.unsqueeze(1) * values > max_values] = -torch.inf
    members = [[var] for var in range(num_vars)]
    best, partner = shared.max(1)
    while bool(best.max() > -torch.inf):
        kept = int(best.argmax())
        merged = int(partner[kept])
        members[kept] += members[merged]
        members[merged] = []
        values[kept] *= values[merged]
        shared[kept] += shared[merged]
        shared[kept, values * values[kept] > max_values] = -torch.inf
        shared[:, kept] = shared[kept]
        shared[merged], shared[:, merged] = -torch.inf, -torch.inf
        stale = (partner == kept) | (partner == merged)
        stale[kept] = stale[merged] = True
        best[stale], partner[stale] = shared[stale].max(1)
        nearer = shared[:, kept] > best
        best[nearer], partner[nearer] = shared[nearer, kept], kept
    return sorted(tuple(sorted(block)) for block in members if block)


def checked_blocks(blocks: Sequence[Sequence[int]]) -> int:
    """Return how many variables the blocks have; raise StructureError unless they partition 0 .. D - 1."""
    variables = sorted(var for block in blocks for var in block)
    if not variables or variables != list(range(len(variables))) or not all(len(block) for block in blocks):
        raise StructureError(
            f"blocks: expected every variable from 0 to D - 1 in exactly one block, and no block empty, got {blocks!r}"
        )
    return len(variables)


def checked_categories(num_categories: int | Sequence[int], num_vars: int) -> list[int]:
    """Return the number of categories of each variable; raise ArgumentError unless they are ``num_vars`` counts."""
    categories = [num_categories] * num_vars if isinstance(num_categories, int) else list(num_categories)
    if len(categories) != num_vars or not all(isinstance(count, int) and count >= 1 for count in categories):
        raise ArgumentError(
            f"num_categories: expected an integer >= 1, or {num_vars} of them, one per variable, got {num_categories!r}"
        )
    return categories


def _joint_values(block: Sequence[int], categories: Sequence[int]) -> Node:
    """Return one unit per joint value of the block's variables, the indicator of that value."""
    indicators = [_indicators(var, categories[var]) for var in block]
    return indicators[0] if len(indicators) == 1 else product(*indicators, mode="outer")


def _indicators(var: int, num_categories: int) -> Input:
    return inputs(var, num_categories, Literal(num_categories, tuple(range(num_categories))))
