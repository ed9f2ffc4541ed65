"""The posterior of single variables, asked in part, and kept while one variable after the other becomes known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.arguments import check_integers, check_mask
from circuits.engine import passes
from circuits.engine.compile import CompiledCircuit
from circuits.engine.conditioning import Conditions, LayerValues
from circuits.engine.input_layers import TableLayer
from circuits.engine.passes import Banks
from circuits.engine.semirings import LogSemiring
from circuits.errors import PropertyError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import checked_possible, given_evidence, one_per_query


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
        conditions: on latents and classes.
        leaves: log-values of the input units under the evidence, relative to nothing: by input layer, (F, K, B).
        divisors: log-values of what the evidence is relative to, by input layer; None: it is relative to nothing.
        values: of the variables that became known since, int64 (B, D).
        known: which these are, bool (B, D).
    """

    pc: CompiledCircuit
    weights: Banks
    evidence: Evidence
    origin: Tensor
    conditions: Conditions
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
        told = Evidence.observe(values, observed)
        told.check(self.pc.num_categories)
        known = passes.leaves(self.pc, LogSemiring(), told, self.weights)
        leaves = [
            torch.where(_of_nodes(observed, layer.variables), new, old)
            for layer, new, old in zip(self.pc.input_layers, known, self.leaves, strict=True)
        ]
        all_values = torch.where(observed, values, self.values)
        return replace(self, leaves=leaves, values=all_values, known=self.known | observed)

    def rows(self, index: Tensor) -> Posterior:
        """Return the posterior of some of the B queries, int64 (n,); they may come more than once."""
        leaves = [_columns(leaf, index) for leaf in self.leaves]
        divisors = None if self.divisors is None else [_columns(divisor, index) for divisor in self.divisors]
        latents = {
            layer: replace(factors, log=factors.log.index_select(2, index))
            for layer, factors in self.conditions.latents.items()
        }
        classes = self.conditions.class_factors
        conditions = Conditions(latents, None if classes is None else classes.index_select(1, index))
        origin, values, known = self.origin[index], self.values[index], self.known[index]
        return Posterior(
            self.pc, self.weights.of_queries(index), self.evidence, origin, conditions, leaves, divisors, values, known
        )

    @functools.cached_property
    def flows(self) -> list[Tensor]:
        """How probably each input unit explains its variable, ``p(n | e)``: by input layer, (F, K, B)."""
        return self._solved[1]

    @functools.cached_property
    def log_partition(self) -> Tensor:
        """``log Z`` of the evidence, with the factor 1 for what became known since: (B,).

        Raises:
            ImpossibleEvidenceError: it is -inf for some query.
        """
        return self._solved[0]

    @functools.cached_property
    @own_precision
    def _solved(self) -> tuple[Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
            values = leaves
            if self.divisors is not None:
                divided = functools.partial(passes.divided, LogSemiring())
                values = [divided(*pair) for pair in zip(leaves, self.divisors, strict=True)]
            root = passes.log_root(self.pc, LayerValues(values, self.conditions), self.weights.detached())
            log_z = checked_possible(one_per_query(self.pc, root))
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
            bank = self.weights[layer.parameter_rows.bank]
            probs.index_add_(0, item, layer.shares(bank, node, part, factors[item], leaf[at], flow[at]))
        if values is None:
            values = torch.arange(factors.shape[1], device=query.device)
        is_value = (values == self.values[query, variable].unsqueeze(1)).to(probs)
        return torch.where(self.known[query, variable].unsqueeze(1), is_value, probs)

    @torch.no_grad()
    def distance(self, other: Posterior) -> Tensor:
        """Return bounds of the total variation distances between single variables' posteriors here and there, (B, D).

        Only the input units' shares differ where the evidence on a variable is the same, so that the distance is at
        most that of the shares. Of variables that became known in between, the number means nothing.

        Args:
            other: that this one was made of by :meth:`given`, or the other way round.
        """
        total = torch.zeros(self.known.shape, dtype=self.pc.dtype, device=self.known.device)
        for layer, here, there in zip(self.pc.input_layers, self.flows, other.flows, strict=True):
            total.index_add_(1, layer.variables, (here - there).abs_().sum(1).t() / 2)
        return total


@own_precision
@torch.no_grad()
def posterior(pc: CompiledCircuit, evidence: Evidence, *, weights: Banks | None = None) -> Posterior:
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
    banks = pc.weights() if weights is None else weights
    given = given_evidence(pc, evidence, banks)
    if given.log_factors is None or any(position < len(pc.input_layers) for position in banks.external):
        raise PropertyError(
            "posterior: expected factors on all values or on listed ones, and no external weights of input nodes; use "
            "ct.queries.marginals"
        )
    _table_layers(pc)
    leaves = passes.leaves(pc, LogSemiring(), replace(given, reference=None), banks)
    divisors = None if given.reference is None else passes.leaves(pc, LogSemiring(), given.reference, banks)
    nothing = torch.zeros(given.batch_size, given.num_vars, dtype=torch.int64, device=given.device)
    origin = torch.arange(given.batch_size, device=given.device)
    return Posterior(pc, banks, given, origin, leaves.conditions, leaves, divisors, nothing, nothing.bool())


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


def _of_nodes(where: Tensor, variables: Tensor) -> Tensor:
    return where.index_select(1, variables).t().unsqueeze(1)
