"""Fully factorized distributions and their mixtures."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.distributions import Categorical, Distribution
from circuits.errors import ArgumentError
from circuits.graph import Circuit, inputs, product, sum


def fully_factorized(num_vars: int, num_categories: int | Distribution | Sequence[int | Distribution]) -> Circuit:
    """Build independent variables: ``p(x) = prod_i p_i(x_i)``.

    Args:
        num_vars: D >= 1.
        num_categories: C of categorical variables, or another input family such as ``ct.Gaussian()``; one for all
            variables or one per variable.

    Raises:
        ArgumentError: an argument has a wrong type, length or value.
    """
    return mixture(num_vars, num_categories, num_components=1)


def mixture(
    num_vars: int, num_categories: int | Distribution | Sequence[int | Distribution], num_components: int
) -> Circuit:
    """Build a mixture of fully factorized distributions (latent class model): ``p(x) = sum_k w_k prod_i p_ki(x_i)``.

    Args:
        num_vars: D >= 1.
        num_categories: C of categorical variables, or another input family such as ``ct.Gaussian()``; one for all
            variables or one per variable.
        num_components: K >= 1.

    Raises:
        ArgumentError: an argument has a wrong type, length or value.
    """
    if not isinstance(num_vars, int) or num_vars < 1:
        raise ArgumentError(f"num_vars: expected an integer >= 1, got {num_vars!r}")
    if isinstance(num_categories, (int, Distribution)):
        families: Sequence[int | Distribution] = [num_categories] * num_vars
    else:
        families = num_categories
    if len(families) != num_vars:
        raise ArgumentError(f"num_categories: expected one number or num_vars={num_vars} of them, got {len(families)}")
    leaves = [
        inputs(var, num_components, family if isinstance(family, Distribution) else Categorical(family))
        for var, family in enumerate(families)
    ]
    return Circuit(sum(product(*leaves), num_units=1))
