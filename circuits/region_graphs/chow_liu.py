"""Mutual information between the variables of data, and the tree that has the most of it (Chow and Liu 1968)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from circuits.arguments import check_stored, checked_count, kind_of, shape_of
from circuits.errors import ArgumentError
from circuits.precision import own_precision

_MAX_ELEMENTS = 1 << 24
"""How many numbers a table of pairwise counts, and a block of one-hot rows, may have at once."""


def chow_liu_tree(
    data: Tensor,
    *,
    num_categories: int | Sequence[int] | None = None,
    pseudocount: float = 0.01,
    weights: Tensor | None = None,
    observed: Tensor | None = None,
    num_bins: int | None = None,
) -> list[tuple[int, int]]:
    """Return the edges of the tree over the variables with the most mutual information (Chow and Liu 1968).

    It is the tree-shaped distribution that is closest to the data. See :func:`empirical_mutual_information` for the
    arguments.
    """
    return maximum_spanning_tree(
        empirical_mutual_information(
            data,
            num_categories=num_categories,
            pseudocount=pseudocount,
            weights=weights,
            observed=observed,
            num_bins=num_bins,
        )
    )


def empirical_mutual_information(
    data: Tensor,
    *,
    num_categories: int | Sequence[int] | None = None,
    pseudocount: float = 0.01,
    weights: Tensor | None = None,
    observed: Tensor | None = None,
    num_bins: int | None = None,
) -> Tensor:
    """Return the mutual information of every two variables in data, on the data's device.

    ``I(i, j) = sum_ab p_ij(a, b) log (p_ij(a, b) / (p_i(a) p_j(b)))``, with p_ij the smoothed relative frequencies and
    p_i their sums. Pairs are counted by matrix products of one-hot blocks, some variables and some rows at a time, so
    memory is bounded whatever the data's size.

    Args:
        data: integers (N, D), values 0 .. C - 1, or floating point with NaN for missing values.
        num_categories: C, one for all variables or one each; by default one more than each variable's largest value.
        pseudocount: added to the count of every pair of variables, spread evenly over the pairs of values.
        weights: (N,), >= 0, how much each row counts; 1 by default.
        observed: bool (N, D), False where a value is missing: each pair is counted in the rows that have both.
        num_bins: merge neighbouring values of ordered variables into so many bins of equal width before counting;
            without it 784 variables of 256 values cost 4e10 counts.

    Returns:
        float64 (D, D), in nats, symmetric; the diagonal holds the entropies.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    data, observed = known_values(data, observed)
    counts = checked_categories(data, num_categories)
    weights = _checked_weights(data, weights)
    if not isinstance(pseudocount, (int, float)) or not 0 <= pseudocount < float("inf"):
        raise ArgumentError(f"pseudocount: expected a finite number >= 0, got {pseudocount!r}")
    if num_bins is not None:
        checked_count("num_bins", num_bins)
        bins = counts.clamp_max(num_bins)
        data, counts = data.long() * bins // counts, bins
    num_vars = data.shape[1]
    total: float | Tensor = float(len(data)) if weights is None else float(weights.sum())
    information = torch.zeros(num_vars, num_vars, dtype=torch.float64, device=data.device)
    blocks = list(_blocks(num_vars, int(counts.max())))
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            joint = pair_counts(data, counts, rows, columns, weights, observed)
            if observed is not None:  # every pair has its own rows
                total = joint.sum((1, 3), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            valid = _is_valid(joint, counts, rows, columns)
            cells = valid.sum((1, 3), keepdim=True)
            joint = (joint + pseudocount * valid.double() / cells) / (total + pseudocount)
            if rows == columns:  # a variable with itself: only equal values occur, whatever the pseudocount
                own = torch.arange(len(rows), device=data.device)
                smoothed = joint[own, :, own].sum(-1)
                joint[own, :, own] = torch.diag_embed(smoothed)
            block = _information(joint)
            if rows == columns:  # rounding may differ between (i, j) and (j, i)
                block = block.triu() + block.triu(1).t()
            information[rows.start : rows.stop, columns.start : columns.stop] = block
            information[columns.start : columns.stop, rows.start : rows.stop] = block.t()
    return information


def maximum_spanning_tree(weights: Tensor) -> list[tuple[int, int]]:
    """Return the edges of the spanning tree of the complete graph with the greatest total weight (Prim 1957).

    Args:
        weights: (D, D), symmetric; the diagonal is ignored.

    Returns:
        D - 1 pairs (i, j), in the order in which the tree grew from node 0.
    """
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1] or not bool(weights.isfinite().all()):
        raise ArgumentError(f"weights: expected finite numbers of shape (D, D), got {tuple(weights.shape)}")
    weights = weights.detach().double().cpu()
    best, nearest = weights[0].clone(), torch.zeros(len(weights), dtype=torch.int64)
    best[0] = -torch.inf
    is_inside = torch.zeros(len(weights), dtype=torch.bool)
    is_inside[0] = True
    edges = []
    for _ in range(len(weights) - 1):
        new = int(best.argmax())
        edges.append((int(nearest[new]), new))
        is_inside[new] = True
        closer = (weights[new] > best) & ~is_inside
        best = torch.where(closer, weights[new], best)
        best[new] = -torch.inf
        nearest[closer] = new
    return edges


def known_values(data: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return data as integers, with 0 in the place of missing values, and where values are known; None: everywhere.

    Missing is what ``observed`` says, and NaN. Truth values are 0 and 1. Raises ArgumentError for other numbers.
    """
    if not isinstance(data, Tensor) or data.is_complex():
        got = f"{data.dtype}" if isinstance(data, Tensor) else type(data).__name__
        raise ArgumentError(f"data: expected an int64 tensor (N, D), got {got}; convert it with torch.as_tensor(data)")
    check_stored("data", data)
    if observed is not None:
        if not isinstance(observed, Tensor) or observed.dtype != torch.bool or observed.shape != data.shape:
            got = f"{observed.dtype} {tuple(observed.shape)}" if isinstance(observed, Tensor) else f"{type(observed)}"
            raise ArgumentError(f"observed: expected bool of the shape of data, {tuple(data.shape)}, got {got}")
        observed = observed.to(data.device)
    if data.is_floating_point():
        is_number = ~data.isnan()
        if not bool(is_number.all()):
            observed = is_number if observed is None else observed & is_number
    values = data if observed is None else data.masked_fill(~observed, 0)
    if values.is_floating_point() and not torch.equal(values, values.round().clamp(-(2**62), 2**62)):
        raise ArgumentError(
            "data: expected whole numbers, and NaN where a value is missing, got others; cut real numbers into bins, "
            "for instance with torch.bucketize(data, edges)"
        )
    return values.long(), observed


@own_precision
def pair_counts(
    data: Tensor, counts: Tensor, rows: range, columns: range, weights: Tensor | None, observed: Tensor | None = None
) -> Tensor:
    """Count the pairs of values of some variables with others: float64 (rows, C, columns, C)."""
    size = int(counts.max())
    # float32 counts whole numbers below 2**24 exactly, and a block has fewer rows than that
    dtype = torch.float32 if weights is None else torch.float64
    joint = torch.zeros(len(rows) * size, len(columns) * size, dtype=torch.float64, device=data.device)
    chunk = max(1, _MAX_ELEMENTS // (max(len(rows), len(columns)) * size))
    for start in range(0, len(data), chunk):
        part = data[start : start + chunk]
        known = None if observed is None else observed[start : start + chunk].to(data.device)
        left = _one_hot(part, known, rows, size, dtype)
        right = left if rows == columns else _one_hot(part, known, columns, size, dtype)
        if weights is not None:
            left = left * weights[start : start + chunk, None].to(dtype)
        joint += (left.t() @ right).double()
    return joint.unflatten(1, (len(columns), size)).unflatten(0, (len(rows), size))


def checked_categories(data: Tensor, num_categories: int | Sequence[int] | None) -> Tensor:
    """Return each variable's number of categories, int64 (D,), after a look at data."""
    if not isinstance(data, Tensor) or data.dim() != 2 or data.is_floating_point() or data.dtype == torch.bool:
        raise ArgumentError(f"data: expected an int64 tensor (N, D), got {kind_of(data)}")
    check_stored("data", data)
    if 0 in data.shape:
        raise ArgumentError(f"data: expected at least one row and one variable, got shape {tuple(data.shape)}")
    largest = data.amax(0)
    if num_categories is None:
        counts = largest.long() + 1
    elif isinstance(num_categories, int):
        counts = torch.full_like(largest, checked_count("num_categories", num_categories), dtype=torch.int64)
    elif not isinstance(num_categories, Iterable):
        raise ArgumentError(f"num_categories: expected a number or one per variable, got {num_categories!r}")
    else:
        given = [checked_count("num_categories", count) for count in num_categories]
        if len(given) != data.shape[1]:
            raise ArgumentError(f"num_categories: expected one number or {data.shape[1]} of them, got {len(given)}")
        counts = torch.tensor(given, device=data.device)
    wrong = ((data < 0) | (data >= counts)).nonzero()
    if len(wrong):
        row, var = wrong[0].tolist()
        raise ArgumentError(
            f"data: expected values from 0 to {int(counts[var]) - 1}, got {int(data[row, var])} at row {row}, "
            f"variable {var}"
        )
    return counts


def _blocks(num_vars: int, num_categories: int) -> Iterator[range]:
    """Yield ranges of variables, as many at a time as a table of pairwise counts has room for."""
    size = max(1, int(_MAX_ELEMENTS**0.5) // num_categories)
    for start in range(0, num_vars, size):
        yield range(start, min(start + size, num_vars))


def _one_hot(data: Tensor, observed: Tensor | None, variables: range, size: int, dtype: torch.dtype) -> Tensor:
    """Return which value some variables have, (n, variables * C); none where it is missing."""
    values = data[:, variables.start : variables.stop]
    out = torch.zeros(*values.shape, size, dtype=dtype, device=values.device)
    out.scatter_(2, values.long().unsqueeze(2), 1)
    if observed is not None:
        out *= observed[:, variables.start : variables.stop, None]
    return out.flatten(1)


def _is_valid(joint: Tensor, counts: Tensor, rows: range, columns: range) -> Tensor:
    """Return which pairs of values exist, bool (rows, C, columns, C)."""
    exists = torch.arange(joint.shape[1], device=joint.device) < counts.unsqueeze(1)
    return exists[rows.start : rows.stop, :, None, None] & exists[None, None, columns.start : columns.stop]


def _information(joint: Tensor) -> Tensor:
    """Return the mutual information of tables (I, C, J, C) of joint probabilities: (I, J)."""
    independent = joint.sum(3, keepdim=True) * joint.sum(1, keepdim=True)
    terms = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)
    return terms.sum((1, 3))


def _checked_weights(data: Tensor, weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != data.shape[:1] or weights.dtype == torch.bool:
        raise ArgumentError(f"weights: expected numbers of shape ({len(data)},), one per row, got {shape_of(weights)}")
    if not bool(((weights >= 0) & (weights < torch.inf)).all()) or float(weights.sum()) <= 0:
        raise ArgumentError("weights: expected finite numbers >= 0, not all 0")
    return weights.to(data.device, torch.float64)


__all__ = ["chow_liu_tree", "empirical_mutual_information", "maximum_spanning_tree"]
