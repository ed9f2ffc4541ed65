"""Matrix products in log space, exact even where a linear-space product would underflow.

``log_matmul(w, x)[f, o, b] = log sum_i exp(w[f, o, i] + x[f, i, b])`` is computed with one batched GEMM of linear
weights after the column maximum of ``x`` is taken out. Terms that underflow cannot be seen in a sum above
``I * tiny / eps``; the rare sums below that are recomputed entry by entry in log space, in value and in gradient, so
that -inf comes out only where no term is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.precision import own_precision, own_sum_of_rows

_REPAIR_CHUNK = 1 << 22
_FEW_COLUMNS, _LARGE_MATRIX = 8, 1 << 14


@dataclass
class Contraction:
    """What the adjoint of one log-space product needs."""

    scaled: Tensor
    """exp(x - column maximum), shape (F, I, B)."""
    total: Tensor
    """weights @ scaled, shape (F, O, B)."""
    repaired: list[Repaired] | None
    """Entries recomputed in log space; None when no sum was small."""


@dataclass
class Repaired:
    """Entries (fold, out, column) of one product that were recomputed, each of shape (n,)."""

    fold: Tensor
    out: Tensor
    column: Tensor
    posterior: Tensor
    """Share of each term in its sum, shape (n, I)."""


def smallest_safe_sum(dtype: torch.dtype, num_terms: int) -> float:
    """Return the sum above which terms lost to underflow change nothing: ``num_terms * tiny / eps``."""
    info = torch.finfo(dtype)
    return num_terms * info.tiny / info.eps


def smallest_differentiable_sum(dtype: torch.dtype, num_terms: int) -> float:
    """Return the safe sum above which ``total ** -n``, part of the n-th derivative, does not overflow up to n = 3."""
    return max(smallest_safe_sum(dtype, num_terms), torch.finfo(dtype).tiny ** (1 / 3))


def contract(
    log_weights: Tensor,  # shape: (F, O, I)
    weights: Tensor,  # shape: (F, O, I), exp(log_weights)
    x: Tensor,  # shape: (F, I, B)
    *,
    record: bool,
) -> tuple[Tensor, Contraction | None]:  # shape: (F, O, B)
    """Multiply in log space, outside autograd; with ``record`` also return what :func:`contract_adjoint` needs."""
    peak = column_peak(x)
    scaled = torch.sub(x, peak).exp_()
    total = product(weights, scaled)
    all_safe = bool(total.min() >= smallest_safe_sum(x.dtype, x.shape[1])) if total.numel() else True
    saved = Contraction(scaled, total, None) if record else None
    if all_safe:
        return (total.log() if record else total.log_()).add_(peak), saved
    out = total.log().add_(peak)
    repaired = _repair(out, total, log_weights, x)
    if saved is not None:
        saved.repaired = repaired
    return out, saved


def contract_adjoint(
    grad: Tensor,  # shape: (F, O, B)
    weights: Tensor,  # shape: (F, O, I)
    saved: Contraction,
) -> tuple[Tensor, Tensor]:
    """Return (gradient of x (F, I, B), grad / total (F, O, B)); see :func:`add_weight_gradient` for the weights'."""
    scale = grad / saved.total
    if saved.repaired is not None:
        scale = scale.masked_fill_(saved.total < smallest_safe_sum(grad.dtype, weights.shape[-1]), 0.0)
    is_row_major = saved.scaled.is_contiguous()  # what is multiplied lies alike in memory
    grad_x = product(weights.mT, scale) if is_row_major else torch.bmm(scale.mT, weights).mT
    grad_x.mul_(saved.scaled)
    for entries in saved.repaired or ():
        flow = grad[entries.fold, entries.out, entries.column].unsqueeze(1) * entries.posterior
        grad_x.transpose(1, 2).index_put_((entries.fold, entries.column), flow, accumulate=True)
    return grad_x, scale


def repaired_weight_flows(grad: Tensor, saved: Contraction, out: Tensor) -> None:
    """Add the flows of the repaired entries to ``out``, the gradient of the log-weights, shape (F, O, I)."""
    for entries in saved.repaired or ():
        flow = grad[entries.fold, entries.out, entries.column].unsqueeze(1) * entries.posterior
        out.index_put_((entries.fold, entries.out), flow, accumulate=True)


def product(weights: Tensor, x: Tensor) -> Tensor:
    """Return the batched product of (F, O, I) and (F, I, B), (F, O, B).

    On a CPU, products with few columns are made in the other order: a decoder asks about few queries at a time, and the
    libraries' kernels for that shape take 3 to 10 times as long as for the transposed one.
    """
    is_thin = x.shape[2] <= _FEW_COLUMNS and x.shape[0] * x.shape[2] > 1 and weights.numel() >= _LARGE_MATRIX
    if x.device.type != "cpu" or not is_thin:
        return torch.bmm(weights, x)
    return torch.bmm(x.mT.contiguous(), weights.mT).mT.contiguous()


def column_peak(x: Tensor) -> Tensor:
    """Return the maximum of each column of ``x`` (F, I, B), shape (F, 1, B), with 0 where all of it is -inf."""
    peak = x.amax(-2, keepdim=True)
    return peak.masked_fill_(peak == -torch.inf, 0.0)


def _repair(out: Tensor, total: Tensor, log_weights: Tensor, x: Tensor) -> list[Repaired]:
    """Recompute in log space the entries of ``out`` whose sum is too small to trust; -inf if nothing is possible."""
    low = total < smallest_safe_sum(x.dtype, x.shape[1])
    possible = torch.bmm((log_weights > -torch.inf).to(x.dtype), (x > -torch.inf).to(x.dtype)) > 0
    out.masked_fill_(low, -torch.inf)
    fold, row, column = (low & possible).nonzero(as_tuple=True)
    repaired = []
    per_chunk = max(1, _REPAIR_CHUNK // x.shape[1])
    for start in range(0, len(fold), per_chunk):
        f, o, b = (index[start : start + per_chunk] for index in (fold, row, column))
        terms = log_weights[f, o] + x[f, :, b]
        out[f, o, b] = torch.logsumexp(terms, 1)
        repaired.append(Repaired(f, o, b, torch.softmax(terms, 1)))
    return repaired


def contract_plain(
    log_weights: Tensor,  # shape: (F, O, I)
    x: Tensor,  # shape: (F, I, B)
) -> Tensor:  # shape: (F, O, B)
    """Multiply in log space with plain differentiable operations: for second derivatives and for ``torch.compile``."""
    peak = column_peak(x.detach())
    total = torch.matmul(log_weights.exp(), (x - peak).exp())
    smallest = smallest_safe_sum if torch.compiler.is_compiling() else smallest_differentiable_sum
    low = total < smallest(x.dtype, x.shape[1])
    out = torch.where(low, -torch.inf, torch.where(low, 1.0, total).log() + peak)
    if torch.compiler.is_compiling() or not bool(low.any()):
        return out
    possible = torch.matmul((log_weights > -torch.inf).to(x.dtype), (x > -torch.inf).to(x.dtype)) > 0
    f, o, b = (low & possible).nonzero(as_tuple=True)
    exact = torch.logsumexp(log_weights.expand(x.shape[0], -1, -1)[f, o] + x[f, :, b], 1)
    return out.index_put((f, o, b), exact)


class _LogMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_weights: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        out, ctx.saved = contract(log_weights, weights, x, record=needs_grad)
        if needs_grad:
            ctx.save_for_backward(log_weights, weights, x)
        return out

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        log_weights, weights, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            out = contract_plain(log_weights, x)
            tensors = {0: log_weights, 2: x}
            needed = [position for position in tensors if ctx.needs_input_grad[position]]
            grads = torch.autograd.grad(out, [tensors[i] for i in needed], grad, create_graph=True, allow_unused=True)
            gradient_of = dict(zip(needed, grads, strict=True))
            return gradient_of.get(0), None, gradient_of.get(2)
        grad = grad.contiguous()
        grad_x, scale = contract_adjoint(grad, weights, ctx.saved)
        if not ctx.needs_input_grad[0]:
            return None, None, grad_x
        flows = torch.bmm(scale, ctx.saved.scaled.transpose(1, 2)).mul_(weights)
        repaired_weight_flows(grad, ctx.saved, flows)
        return flows, None, grad_x


def log_matmul(
    log_weights: Tensor,  # shape: (F, O, I)
    x: Tensor,  # shape: (F, I, B)
    *,
    weights: Tensor | None = None,  # shape: (F, O, I)
) -> Tensor:  # shape: (F, O, B)
    """Return ``log sum_i exp(log_weights[f, o, i] + x[f, i, b])``, twice differentiable in ``log_weights`` and ``x``.

    -inf exactly where no term is possible, never NaN. The log-weights are at most 0; ``weights`` are their
    exponentials, where the caller has these already.
    """
    if torch.compiler.is_compiling():
        return contract_plain(log_weights, x)
    if weights is None:
        weights = log_weights.detach().exp()
    if not (torch.is_grad_enabled() and (log_weights.requires_grad or x.requires_grad)):
        return contract(log_weights, weights, x, record=False)[0]
    return _LogMatmul.apply(log_weights, weights, x)


def log_mix(
    log_table: Tensor,  # shape: (V, K)
    values: Tensor,  # shape: (n, k)
    log_factors: Tensor,  # shape: (n, k)
    *,
    table: Tensor | None = None,  # shape: (V, K)
) -> Tensor:  # shape: (n, K)
    """Return ``log sum_j exp(log_factors[n, j] + log_table[values[n, j], k])``; only the listed rows are read.

    -inf exactly where no term is possible, never NaN. The log-table is at most 0; ``table`` is its exponential, where
    the caller has it already (then no gradient reaches the table).
    """
    peak = log_factors.detach().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    table = log_table.exp() if table is None or log_table.requires_grad else table
    total = own_sum_of_rows(table, values, (log_factors - peak).exp())
    low = total < smallest_safe_sum(log_table.dtype, values.shape[1])
    out = torch.where(low, -torch.inf, torch.where(low, 1.0, total).log() + peak)
    if torch.compiler.is_compiling() or not bool(low.any()):
        return out
    row, unit = low.nonzero(as_tuple=True)
    terms = log_table[values[row], unit.unsqueeze(1)] + log_factors[row]
    possible = (terms > -torch.inf).any(1)  # where nothing is, logsumexp has the gradient NaN
    return out.index_put((row[possible], unit[possible]), torch.logsumexp(terms[possible], 1))


def log_sum(terms: Tensor) -> Tensor:
    """Return the log-sum-exp along the last axis; -inf, with the gradient 0, where no term is possible."""
    is_possible = terms.detach().amax(-1, keepdim=True) > -torch.inf
    total = torch.logsumexp(torch.where(is_possible, terms, 0.0), -1)
    return torch.where(is_possible.squeeze(-1), total, -torch.inf)
