"""Factors on the children of single sum nodes, and on the root's units: evidence on latents, and on the class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.errors import ArgumentError, PropertyError
from circuits.symbolic import Node, Sum


@dataclass(frozen=True, eq=False)
class LatentFactors:
    """Log-factors on the children of n of the F sum nodes of one layer: evidence on what chooses among them."""

    rows: Tensor
    """Which nodes of the layer, int64 (n,)."""
    log: Tensor
    """Log-factors, (n, I, B)."""

    def applied(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Multiply the layer's children, (F, I, B, *E), by the factors."""
        factors = semiring.lift(self.log)
        if len(self.rows) == len(x):
            order = self.rows.argsort()
            return semiring.times(x, factors.index_select(0, order))
        return x.index_copy(0, self.rows, semiring.times(x.index_select(0, self.rows), factors))

    def added(self, log_weights: Tensor, node: Tensor, query: Tensor) -> Tensor:
        """Add the factors to the log-weights, (m, I), of m reached sum units, in place; node, query: (m,)."""
        matches = node.unsqueeze(1) == self.rows  # (m, n)
        given, slot = matches.nonzero(as_tuple=True)
        log_weights[given] += self.log[slot, :, query[given]]
        return log_weights


def latents_by_layer(
    factors: Iterable[tuple[Sum, tuple[int, int], Tensor]], batch_size: int, like: Tensor
) -> dict[int, LatentFactors]:
    """Return log-factors on the children of sum nodes by layer, in the type and on the device of ``like``.

    Args:
        factors: a node, where it is evaluated (layer, row), and its factors (B, I).
        batch_size: B.
        like: any tensor.

    Raises:
        ArgumentError: factors of a wrong shape, or given twice.
    """
    by_layer: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for node, (layer, row), log in factors:
        shape = batch_size, node.parameter_shape[1]
        if log.shape != shape:
            raise ArgumentError(
                f"latents: expected log-factors {shape} for the child units of {node}, got {tuple(log.shape)}"
            )
        if row in by_layer[layer]:
            raise ArgumentError(f"latents: {node} is given twice, by name and by node; give it once")
        by_layer[layer][row] = log.to(like).t()
    return {
        layer: LatentFactors(torch.tensor(list(rows), device=like.device), torch.stack(list(rows.values())))
        for layer, rows in by_layer.items()
    }


def class_factors(
    classes: Tensor | None, num_classes: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Return log-factors on the R units of a root, (R, B), of labels (B,) or log-factors (B, R); None of None."""
    if classes is None:
        return None
    if num_classes is None:
        raise ArgumentError("evidence: it names a class, but the circuit has none; see ct.Circuit(num_classes=...)")
    classes = classes.to(device)
    if classes.dim() == 1:
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ArgumentError(
                f"labels: expected numbers from 0 to {num_classes - 1}, got {int(classes.min())} to "
                f"{int(classes.max())}"
            )
        is_other = torch.arange(num_classes, device=device).unsqueeze(1) != classes
        return torch.zeros(is_other.shape, dtype=dtype, device=device).masked_fill(is_other, -torch.inf)
    if classes.shape[1] != num_classes:
        raise ArgumentError(f"log_prior: expected {num_classes} classes, got shape {tuple(classes.shape)}")
    return classes.to(dtype).t()


def class_needed(root: Node) -> PropertyError:
    """Return the error of a query that needs one distribution on a circuit that has one per class."""
    return PropertyError(
        f"evidence: expected one that says the class, since the root {root} has a distribution per class; "
        "say which with evidence.with_class(labels), or mix them with evidence.with_class_prior(log_prior)"
    )
