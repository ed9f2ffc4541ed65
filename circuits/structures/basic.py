"""Fully factorized distributions, their mixtures, and naive Bayes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.arguments import checked_count
from circuits.families import Categorical, Distribution
from circuits.structures.options import families_of
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
