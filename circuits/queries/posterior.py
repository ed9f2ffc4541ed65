"""The posterior of single variables, asked in part, and kept while one variable after the other becomes known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import LogSemiring, divided
from circuits.arguments import check_integers, check_mask, checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.input_layers import TableLayer
from circuits.engine.question import Question, nodes_of
from circuits.engine.weights import CircuitWeights, Weights
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import detached, query

_LOG = LogSemiring()
_MAX_NUMBERS, _ROWS_AT_ONCE = 1 << 22, 1 << 20


@dataclass(frozen=True, eq=False)
class Posterior:
    """What evidence says about single variables; build it with :func:`posterior`.

    Variable i is explained by one input unit n, and ``p(x_i = v | e) = sum_n p(n | e) p(v | n, e_i)``. The first factor
    needs a pass up and one down for all variables together; the second one reads a row of weights per value, which is
    what costs time if there are many. So it is asked for the variables that are of interest only, and what input units
    make of their evidence is kept when others become known.

    Attributes:
        pc: the circuit.
        weights: that everything is computed with.
        evidence: as it was at the beginning.
        origin: which of its queries each of the B queries here is, int64 (B,).
        conditions: the evidence on latents and the class alone, for the B queries.
        leaves: log-values of the input units under the evidence, relative to nothing: by input layer, (F, K, B).
        divisors: log-values of what the evidence is relative to, by input layer; None: it is relative to nothing.
        values: of the variables that became known since, int64 (B, D).
        known: which these are, bool (B, D).
    """

    pc: CompiledCircuit
    weights: CircuitWeights
    evidence: Evidence
    origin: Tensor
    conditions: Evidence
    leaves: Sequence[Tensor]
    divisors: Sequence[Tensor] | None
    values: Tensor
    known: Tensor

    @own_precision
    @torch.no_grad()
    def given(self, values: Tensor, observed: Tensor) -> Posterior:
        """Return the posterior given further values; the evidence on these variables no longer counts.

        Args:
            values: int64 (B, D); entries that are not observed are ignored.
            observed: bool (B, D).

        Raises:
            ArgumentError: shapes or dtypes that do not fit, or a value outside its variable's categories.
        """
        check_integers("values", values, "int64 (B, D)", dim=2)
        check_mask("observed", observed, self.known.shape)
        values = values.masked_fill(~observed, 0)
        told = Question(self.pc, Evidence.observe(values, observed), self.weights).inputs(_LOG)
        told_of = nodes_of(self.pc, observed)
        leaves = [torch.where(*changed) for changed in zip(told_of, told, self.leaves, strict=True)]
        all_values = torch.where(observed, values, self.values)
        return replace(self, leaves=leaves, values=all_values, known=self.known | observed)

    def rows(self, index: Tensor) -> Posterior:
        """Return the posterior of some of the B queries, int64 (n,); they may come more than once."""
        leaves = [_columns(leaf, index) for leaf in self.leaves]
        divisors = None if self.divisors is None else [_columns(divisor, index) for divisor in self.divisors]
        origin, conditions = self.origin[index], self.conditions.rows(index)
        values, known, weights = self.values[index], self.known[index], self.weights.of_queries(index)
        return Posterior(self.pc, weights, self.evidence, origin, conditions, leaves, divisors, values, known)

    @functools.cached_property
    def flows(self) -> list[Tensor]:
        """How probably each input unit explains its variable, ``p(n | e)``: by input layer, (F, K, B)."""
        return self._solved[1]

    @functools.cached_property
    def log_partition(self) -> Tensor:
        """``log Z`` of the evidence, with the factor 1 for what became known since: (B,).

        Raises ImpossibleEvidenceError if it is -inf for some query.
        """
        return self._solved[0]

    @functools.cached_property
    @own_precision
    def _solved(self) -> tuple[Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [(leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_() for leaf in self.leaves]
            values = leaves
            if self.divisors is not None:
                values = [divided(_LOG, *pair) for pair in zip(leaves, self.divisors, strict=True)]
            question = Question(self.pc, self.conditions, self.weights.detached())
            log_z = checked_possible(question.with_inputs(values).log_z)
            flows = torch.autograd.grad(log_z.sum(), leaves)
        return log_z.detach(), list(flows)

    @own_precision
    @torch.no_grad()
    def probs_at(self, query: Tensor, variable: Tensor, which: Tensor | None = None) -> Tensor:
        """Return ``p(x_i = v | e)`` of n single variables of single queries.

        Args:
            query: which of the B queries, int64 (n,).
            variable: which variable of it, int64 (n,).
            which: places among the values that are listed, or values if none are, int64 (n, m); None: all.

        Returns:
            (n, k) for evidence that lists k values, (n, C) for dense evidence, (n, m) with ``which``. It is 0 for
            variables that were missing, if values are listed. What became known has all probability at its value.
        """
        values, factors = _asked(self.evidence, self.origin[query], variable, which, self.pc.dtype)
        probs = torch.zeros_like(factors)
        for layer, leaf, flow in zip(_table_layers(self.pc), self.leaves, self.flows, strict=True):
            node, item = (layer.variables.unsqueeze(1) == variable).nonzero(as_tuple=True)
            at = node, slice(None), query[item]
            part = None if values is None else values[item]
            bank = self.weights.own[layer.parameter_rows.bank]
            probs.index_add_(0, item, _shares(layer, bank, node, part, factors[item], leaf[at], flow[at]))
        if values is None:
            values = torch.arange(factors.shape[1], device=query.device)
        is_value = (values == self.values[query, variable].unsqueeze(1)).to(probs)
        return torch.where(self.known[query, variable].unsqueeze(1), is_value, probs)

    @torch.no_grad()
    def distance(self, other: Posterior) -> Tensor:
        """Return bounds of the total variation distances between single variables' posteriors here and there, (B, D).

        ``other`` was made of this one by :meth:`given`, or the other way round. Only the input units' shares differ
        where the evidence on a variable is the same, so that the distance is at most that of the shares. Of variables
        that became known in between, the number means nothing.
        """
        total = torch.zeros(self.known.shape, dtype=self.pc.dtype, device=self.known.device)
        for layer, here, there in zip(self.pc.input_layers, self.flows, other.flows, strict=True):
            total.index_add_(1, layer.variables, (here - there).abs_().sum(1).t() / 2)
        return total


@query
@detached
def listed_marginals(
    pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None, differentiable: bool = False
) -> Tensor:
    """Return ``p(x_i = v | e)`` of the values that the evidence lists, in one pass; nothing of size C is made.

    Args:
        pc: the circuit.
        evidence: for B queries, with listed values and factors of them (:meth:`Evidence.sparse`).
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.
        differentiable: whether the result is differentiable in evidence and weights, at more time and memory.

    Returns:
        (B, D, k), rows sum to 1, those of missing variables to 0.

    Raises:
        ArgumentError: the evidence lists no values.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    if evidence.log_factors is None or evidence.values is None:
        raise ArgumentError("evidence: expected listed values with factors; see marginals for other kinds")
    return Question(pc, evidence, weights).gradients()


@query
@torch.no_grad()
def posterior(pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None) -> Posterior:
    """Return the posterior of single variables, to be asked in part; without gradients, see :func:`marginals` for them.

    Args:
        pc: a circuit of finite families.
        evidence: for B queries, dense or with listed values.
        weights: of ``pc.weights(external=...)`` with external ones of sums only, in place of the circuit's own.

    Raises:
        ArgumentError: the evidence does not fit the circuit.
        PropertyError: the evidence is of another kind, a variable has infinitely many values, or input nodes have
            external weights: such things are for :func:`marginals`.
    """
    question = Question(pc, evidence, weights)
    question.require_one_root()
    if evidence.log_factors is None or any(position < len(pc.input_layers) for position in question.weights.given):
        raise PropertyError(
            "posterior: expected factors on all values or on listed ones, and no external weights of input nodes; use "
            "ct.queries.marginals"
        )
    _table_layers(pc)
    leaves = Question(pc, replace(evidence, reference=None), question.weights).inputs(_LOG)
    divisors = None if evidence.reference is None else Question(pc, evidence.reference, question.weights).inputs(_LOG)
    nothing = Evidence.nothing(evidence.batch_size, evidence.num_vars, evidence.device)
    conditions = replace(nothing, latents=evidence.latents, classes=evidence.classes)
    unknown = torch.zeros(evidence.batch_size, evidence.num_vars, dtype=torch.int64, device=evidence.device)
    origin = torch.arange(evidence.batch_size, device=evidence.device)
    return Posterior(pc, question.weights, evidence, origin, conditions, leaves, divisors, unknown, unknown.bool())


def _table_layers(pc: CompiledCircuit) -> list[TableLayer]:
    layers = [layer for layer in pc.input_layers if isinstance(layer, TableLayer)]
    if len(layers) != len(pc.input_layers):
        raise PropertyError("posterior: expected variables with finitely many values; use ct.queries.marginals")
    return layers


def _asked(
    evidence: Evidence, query: Tensor, variable: Tensor, which: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Return values, or None for all of them, and their factors, (n, k), of n variables of single queries."""
    assert evidence.log_factors is not None
    place = (query, variable) if which is None else (query.unsqueeze(1), variable.unsqueeze(1), which)
    factors = evidence.log_factors[place].to(dtype)
    if evidence.missing is not None:
        missing = evidence.missing[query, variable].unsqueeze(1)
        factors = factors.masked_fill(missing, 0.0 if evidence.values is None else -torch.inf)
    return which if evidence.values is None else evidence.values[place], factors


def _columns(leaf: Tensor, index: Tensor) -> Tensor:
    return leaf if leaf.shape[2] == 1 and len(index) != 1 else leaf.index_select(2, index)


def _shares(
    layer: TableLayer,
    weights: Weights,
    node: Tensor,  # shape: (n,)
    values: Tensor | None,  # shape: (n, k)
    factors: Tensor,  # shape: (n, k)
    log_values: Tensor,  # shape: (n, K)
    flows: Tensor,  # shape: (n, K)
) -> Tensor:  # shape: (n, k)
    """Return how probably n nodes explain their variable and it has each of k values: the adjoint of the layer.

    The nodes are rows of the layer, ``values`` those of each one's variable (None: all C), ``factors`` their
    log-factors, ``log_values`` of the node's units under these, and ``flows`` how probably each of the units explains
    the variable.
    """
    num_categories, num_units = weights.log.shape[1:]
    row = layer.parameter_rows.index[node]
    if values is not None:
        places = values + (row * num_categories).unsqueeze(1)
        tables = weights.log.reshape(-1, num_units), weights.linear.reshape(-1, num_units)
        return _mix_adjoint(*tables, places, factors, log_values, flows)
    out = torch.empty_like(factors[:, :num_categories])
    for used in row.unique().tolist():
        here = row == used
        parts = (part[here] for part in (factors[:, :num_categories], log_values, flows))
        out[here] = _mix_adjoint(weights.log[used], weights.linear[used], None, *parts)
    return torch.nn.functional.pad(out, (0, factors.shape[1] - num_categories))


def _mix_adjoint(
    log_table: Tensor,  # shape: (V, K)
    table: Tensor,  # shape: (V, K), exp(log_table)
    values: Tensor | None,  # shape: (n, k)
    log_factors: Tensor,  # shape: (n, k)
    log_mixed: Tensor,  # shape: (n, K)
    grad: Tensor,  # shape: (n, K)
) -> Tensor:  # shape: (n, k)
    """Return the gradient of the factors, ``sum_u grad[n, u] e^(log_factors[n, j] + log_table[v_j, u] - mixed[n, u])``.

    What :func:`~circuits.algebra.logspace.log_mix` made of the factors, or of more of them, is ``log_mixed``; ``grad``
    is its gradient, 0 where it is -inf. Values None are all V rows of the table, in order.
    """
    peak = log_factors.amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = (log_mixed - peak).exp()
    low = total < logspace.smallest_safe_sum(log_table.dtype, log_factors.shape[1])
    scale = torch.where(low, 0.0, grad / torch.where(low, 1.0, total))
    out = (scale @ table.t() if values is None else _row_products(table, values, scale)) * (log_factors - peak).exp()
    row, unit = (low & (grad != 0)).nonzero(as_tuple=True)
    for part in range(0, len(row), max(1, _MAX_NUMBERS // log_factors.shape[1])):
        r, u = (index[part : part + max(1, _MAX_NUMBERS // log_factors.shape[1])] for index in (row, unit))
        weights = log_table.t()[u] if values is None else log_table[values[r], u.unsqueeze(1)]
        shares = (weights + log_factors[r] - log_mixed[r, u].unsqueeze(1)).exp()
        out.index_add_(0, r, grad[r, u].unsqueeze(1) * shares)
    return out


def _row_products(table: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Return the products of the rows ``values`` (n, k) of a table (V, K) with vectors (n, K): (n, k)."""
    (num, num_listed), num_units = values.shape, table.shape[1]
    per_chunk = max(1, (_ROWS_AT_ONCE if table.device.type == "cpu" else _MAX_NUMBERS) // (num_listed * num_units))
    rows = table.new_empty(min(num, per_chunk) * num_listed, num_units)
    out = torch.empty_like(values, dtype=table.dtype)
    for start in range(0, num, per_chunk):
        listed = values[start : start + per_chunk]
        read = torch.index_select(table, 0, listed.flatten(), out=rows[: listed.numel()])
        torch.bmm(
            read.unflatten(0, listed.shape),
            x[start : start + per_chunk].unsqueeze(2),
            out=out[start : start + per_chunk].unsqueeze(2),
        )
    return out
