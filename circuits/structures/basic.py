"""Fully factorized distributions, their mixtures, and naive Bayes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.families import Categorical, Distribution
from circuits.structures.options import checked_table, families_of
from circuits.symbolic import Circuit, inputs, product, sum


def fully_factorized(num_vars: int, num_categories: int | Distribution | Sequence[int | Distribution]) -> Circuit:
    """Build independent variables: ``p(x) = prod_i p_i(x_i)``.

    Args:
        num_vars: D >= 1.
        num_categories: C, or an input family; one for all variables or one per variable.

    Raises:
        ArgumentError: an argument has a wrong type, length or value.
    """
    return mixture(num_vars, num_categories, num_components=1)


def mixture(
    num_vars: int, num_categories: int | Distribution | Sequence[int | Distribution], num_components: int
) -> Circuit:
    """Build a mixture of fully factorized distributions, ``p(x) = sum_k w_k prod_i p_ki(x_i)``.

    This is the latent class model (Lazarsfeld and Henry 1968).

    Args:
        num_vars: D >= 1.
        num_categories: C, or an input family; one for all variables or one per variable.
        num_components: K >= 1.

    Raises:
        ArgumentError: an argument has a wrong type, length or value.
    """
    checked_count("num_vars", num_vars)
    families = families_of("num_categories", num_categories, num_vars)
    leaves = [inputs(var, num_components, family) for var, family in enumerate(families)]
    return Circuit(sum(product(*leaves), num_units=1))


def mixture_of(components: Sequence[Circuit], *, weights: Tensor | None = None) -> Circuit:
    """Build a mixture of circuits over the same variables, ``p(x) = sum_k w_k p_k(x)``.

    The named nodes of component k are called ``member{k}.{name}`` in it, its root is called ``members``. Components
    with R classes make a mixture for each class.

    Args:
        components: K >= 1 circuits.
        weights: w, (K,), sum to 1; equal when omitted.

    Raises:
        ArgumentError: an argument has a wrong type, or there are no components.
        StructureError: the components are not over the same variables with the same numbers of categories, or have
            different numbers of classes, or the weights have a wrong shape or do not sum to 1.
    """
    is_list = isinstance(components, Sequence) and len(components) > 0
    if not is_list or not all(isinstance(one, Circuit) for one in components):
        raise ArgumentError(f"components: expected one or more circuits, got {components!r:.60}")
    num_classes = {one.num_classes for one in components}
    if len(num_classes) > 1:
        raise StructureError(f"components: expected equally many classes in all of them, got {num_classes}")
    count = len(components)
    shares = torch.full((count,), 1 / count) if weights is None else weights
    checked_table("weights", shares, (count,), 1, True)
    roots = [one.with_prefix(f"member{k}.").root for k, one in enumerate(components)]
    table = torch.kron(shares.unsqueeze(0), torch.eye(roots[0].num_units, dtype=shares.dtype))
    root = sum(*roots, num_units=roots[0].num_units, weights=table, name="members")
    return Circuit(root, num_classes=components[0].num_classes)


def naive_bayes(
    num_features: int, num_categories: int | Distribution | Sequence[int | Distribution], num_classes: int
) -> Circuit:
    """Build naive Bayes, ``p(x, y) = p(y) prod_i p(x_i | y)`` (Duda and Hart 1973; Maron 1961).

    The class is a variable like the others, the last one: condition on it, sample it, or ask for its marginals given
    the features. The circuit is deterministic in the sense that every assignment has one explanation, its class.

    Args:
        num_features: D >= 1; the features are the variables 0 .. D - 1, and the class is variable D.
        num_categories: C, or an input family; one for all features or one per feature.
        num_classes: K >= 1. The node named ``class`` holds the indicators of the classes and ``prior`` holds p(y).

    Raises:
        ArgumentError: an argument has a wrong type, length or value.
    """
    checked_count("num_features", num_features)
    families = families_of("num_categories", num_categories, num_features)
    leaves = [inputs(var, num_classes, family) for var, family in enumerate(families)]
    label = inputs(num_features, num_classes, Categorical(num_classes), weights=torch.eye(num_classes), name="class")
    return Circuit(sum(product(*leaves, label), num_units=1, name="prior"))
