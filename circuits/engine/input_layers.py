"""The input layers of a compiled circuit: log-tables of finite families, and families that are evaluated directly.

Like all layers they evaluate F nodes at once, into values (F, K, B, *E), see :mod:`circuits.engine.layers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from circuits.algebra import logspace
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, Semiring
from circuits.engine.gathering import ParameterRows
from circuits.engine.weights import Weights
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Dense, Evidence, Factors, Indexed, Interval, Listed, Normal, Nothing, Where
from circuits.families import Direct
from circuits.randomness import RowGenerators, Source
from circuits.weights.given import Reached
from circuits.weights.rows import values_of_rows


class InputLayer(nn.Module, ABC):
    """Input units of F nodes of one family with K units each."""

    variables: Tensor
    checks_values: ClassVar[bool] = False
    """Whether evaluating looks at the values anyway, so that looking where they count costs no wait for a device."""

    def __init__(self, variables: Sequence[int], parameters: ParameterRows, num_vars: int) -> None:
        super().__init__()
        self.parameter_rows = parameters
        self.takes_all = list(variables) == list(range(num_vars))
        self.register_buffer("variables", torch.tensor(variables), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.parameter_rows.move(fn)
        return super()._apply(fn, recurse)

    def forward(self, semiring: Semiring, evidence: Evidence, weights: Weights) -> Tensor:
        """Return the sum of ``e(v) p(v)`` over all v of every unit, as values of the semiring (F, K, B, *E)."""
        return self._of_kinds(
            evidence.factors,
            lambda factors: self._evaluate(semiring, factors, weights),
            lambda: self._without_evidence(semiring, weights, evidence.batch_size),
            lambda condition: self._of_variables(condition).t().unsqueeze(1),  # (F, 1, B)
        )

    @abstractmethod
    def choose(
        self, semiring: ChoosingSemiring, evidence: Evidence, weights: Weights, reached: Reached, generator: Source
    ) -> Tensor:
        """Choose a value of n reached units: shape (n,).

        It is drawn from ``e(v) p(v)`` in the log semiring, and the best in the max semiring.
        """

    @abstractmethod
    def scores(self, evidence: Evidence, weights: Weights, reached: Reached) -> Tensor:
        """Return ``log e(v) + log p(v)`` of all values v of n reached units, (n, C).

        Raises:
            PropertyError: there are infinitely many values.
        """

    def _of_kinds(
        self,
        factors: Factors,
        evaluate: Callable[[Factors], Tensor],
        of_nothing: Callable[[], Tensor],
        mask_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Evaluate factors of one kind, or of several: each where it counts; one that counts nowhere need not fit."""
        if isinstance(factors, Nothing):
            return of_nothing()
        if not isinstance(factors, Where) or (isinstance(factors, Indexed) and not self.checks_values):
            return evaluate(factors)
        mask = mask_of(factors.condition)
        if not torch.compiler.is_compiling() and (self.checks_values or not isinstance(factors.other, Nothing)):
            if bool(mask.all()):
                return self._of_kinds(factors.one, evaluate, of_nothing, mask_of)
            if not bool(mask.any()):
                return self._of_kinds(factors.other, evaluate, of_nothing, mask_of)
        rest, one = (self._of_kinds(part, evaluate, of_nothing, mask_of) for part in (factors.other, factors.one))
        return torch.where(mask.reshape(mask.shape + (1,) * (one.dim() - mask.dim())), one, rest)

    @abstractmethod
    def _evaluate(self, semiring: Semiring, factors: Factors, weights: Weights) -> Tensor:
        """Return the values of all units (F, K, B, *E) under factors of one kind."""

    def _without_evidence(self, semiring: Semiring, weights: Weights, batch_size: int) -> Tensor:
        """Return the values of all units where nothing is known, (F, K, B, *E)."""
        log_one = self._log_one(semiring, weights)
        one = semiring.lift(log_one.expand(len(self.variables), weights.log.shape[-1], 1))
        return one.expand(-1, -1, batch_size, *one.shape[3:])

    @abstractmethod
    def _log_one(self, semiring: Semiring, weights: Weights) -> Tensor:
        """Return 0 if the semiring adds up, else the log-probability of the best value of every unit, (F, K, 1)."""

    def _of_variables(self, tensor: Tensor) -> Tensor:
        """Select this layer's variables: (B, D, ...) to (B, F, ...)."""
        return tensor if self.takes_all else tensor.index_select(1, self.variables)


class TableLayer(InputLayer):
    """Input units of F nodes with equally many categories C: each reads a column of a log-table (C, K)."""

    def _evaluate(self, semiring: Semiring, factors: Factors, weights: Weights) -> Tensor:
        if isinstance(factors, Indexed):
            index = self._of_variables(factors.index).t()
            return values_of_rows(semiring, factors.rows, index, self.parameter_rows.index, weights)
        if isinstance(factors, Listed):
            return self._listed(semiring, factors, weights)
        dense = factors.dense(weights.log.shape[1], weights.log.dtype)
        return self.of_values(semiring, semiring.lift(dense), weights)

    def of_values(
        self,
        semiring: Semiring,
        factors: Tensor,  # shape: (B, D, C, *E)
        weights: Weights,
    ) -> Tensor:  # shape: (F, K, B, *E)
        """Return the sum over v of factor v times ``p(v)`` of every unit; the factors are values of the semiring."""
        num_categories, num_nodes = weights.log.shape[1], len(self.variables)
        if factors.shape[2] < num_categories:
            got = tuple(factors.shape)
            raise ArgumentError(f"factors: expected at least {num_categories} values per variable, got shape {got}")
        factors = self._of_variables(factors)[:, :, :num_categories]  # (B, F, C, *E)
        batch_size = len(factors)
        is_one_matmul = self.parameter_rows.is_tied and num_nodes > 1
        if is_one_matmul:  # all positions share one table: one GEMM reads it once
            factors = factors.flatten(0, 1).unsqueeze(1)
        log_table = self.parameter_rows.select(weights.log, expand=not is_one_matmul).transpose(1, 2)
        table = self.parameter_rows.select(weights.linear, expand=not is_one_matmul).transpose(1, 2)
        out = semiring.contract(log_table, factors.movedim(0, 2), weights=table)
        if is_one_matmul:
            out = out[0].unflatten(1, (batch_size, num_nodes)).movedim(2, 0).contiguous()
        return out

    def _log_one(self, semiring: Semiring, weights: Weights) -> Tensor:
        if semiring.adds_up:
            return weights.log.new_zeros(())
        return self.parameter_rows.select(weights.log).amax(1).unsqueeze(-1)

    def choose(
        self, semiring: ChoosingSemiring, evidence: Evidence, weights: Weights, reached: Reached, generator: Source
    ) -> Tensor:
        """Choose a value of n reached units, int64 (n,); among listed ones without looking at the others."""
        node, unit, query = reached
        listed = evidence.factors
        if not isinstance(listed, Listed) or listed.log_factors is None:
            return semiring.choose(self.scores(evidence, weights, reached), generator)
        values = listed.values[query, self.variables[node]].long()  # (n, k)
        scores = weights.log[self.parameter_rows.index[node].unsqueeze(1), values, unit.unsqueeze(1)]
        scores = scores + listed.log_factors[query, self.variables[node]].to(scores.dtype)
        return values.gather(1, semiring.choose(scores, generator).unsqueeze(1)).squeeze(1)

    def scores(self, evidence: Evidence, weights: Weights, reached: Reached) -> Tensor:
        """Return ``log e(v) + log w(v)`` of n reached units, (n, C)."""
        node, unit, query = reached
        scores = weights.log[self.parameter_rows.index[node], :, unit]
        factors = evidence.pick(query, self.variables[node]).dense(scores.shape[1], scores.dtype)
        return scores + factors[:, 0, : scores.shape[1]]

    def _listed(self, semiring: Semiring, listed: Listed, weights: Weights) -> Tensor:
        num_categories, num_units = weights.log.shape[1:]
        values = self._of_variables(listed.values).long()  # (B, F, k)
        batch_size, num_nodes, num_listed = values.shape
        if num_listed == 1:
            out = self._looked_up(values[..., 0].t(), weights.log)
            if listed.log_factors is not None:
                out = out + self._of_variables(listed.log_factors)[..., 0].t().unsqueeze(1).to(out.dtype)
            return semiring.lift(out)
        factors = self._of_variables(listed.factors(weights.log.dtype))
        values = (values + (self.parameter_rows.index * num_categories).view(1, -1, 1)).flatten(0, 1)
        log_table, table = weights.log.reshape(-1, num_units), weights.linear.reshape(-1, num_units)
        out = semiring.mix(log_table, values, factors.flatten(0, 1), table=table)
        return out.unflatten(0, (batch_size, num_nodes)).movedim(0, 2).contiguous()

    def _looked_up(self, values: Tensor, bank: Tensor) -> Tensor:
        """Return the log-weights of one value per node and query, (F, B) to (F, K, B)."""
        num_categories, num_units = bank.shape[1:]
        if self.parameter_rows.is_tied and num_categories <= values.numel():
            # transposing the one table is cheaper than transposing what is read from it
            columns = self.parameter_rows.select(bank, expand=False)[0].t().contiguous()
            return columns.index_select(1, values.flatten()).unflatten(1, values.shape).transpose(0, 1)
        rows = values + (self.parameter_rows.index * num_categories).unsqueeze(1)
        read = bank.reshape(-1, num_units).index_select(0, rows.flatten())
        return read.unflatten(0, values.shape).transpose(1, 2).contiguous()


class DirectLayer(InputLayer):
    """Input units of F nodes of a family that is evaluated at given values."""

    zero: Tensor
    checks_values = True

    def __init__(
        self,
        variables: Sequence[int],
        parameters: ParameterRows,
        num_vars: int,
        distribution: Direct,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(variables, parameters, num_vars)
        self.distribution = distribution
        self.register_buffer("zero", torch.zeros((), dtype=dtype), persistent=False)

    def choose(
        self, semiring: ChoosingSemiring, evidence: Evidence, weights: Weights, reached: Reached, generator: Source
    ) -> Tensor:
        """Choose a value of n reached units, (n,), in the circuit's dtype."""
        if isinstance(generator, RowGenerators):
            raise PropertyError(
                f"generator: expected a torch.Generator for {self.distribution}; those by row draw from finitely many "
                "values"
            )
        node, unit, query = reached
        parameters = weights.log[self.parameter_rows.index[node], :, unit].unbind(1)  # S of (n,)
        return self._of_kinds(
            evidence.pick(query, self.variables[node]).factors,
            lambda factors: self._chosen(semiring, factors, parameters, generator),
            lambda: self._any(semiring, parameters, -torch.inf, torch.inf, generator),
            lambda condition: condition[:, 0],
        )

    def scores(self, evidence: Evidence, weights: Weights, reached: Reached) -> Tensor:
        """Refuse."""
        raise PropertyError(
            f"variable {int(self.variables[0])}: expected finitely many values for this query, got a "
            f"{self.distribution}"
        )

    def of_units(self, evidence: Evidence, parameters: Sequence[Tensor]) -> Tensor:
        """Return the log-values of units with S parameters of their own per query, (F, K, B) each: (F, K, B)."""
        return self._of_kinds(
            evidence.factors,
            lambda factors: self._of_units(LogSemiring(), factors, parameters),
            lambda: torch.zeros_like(parameters[0]),
            lambda condition: self._of_variables(condition).t().unsqueeze(1),
        )

    def columns(self, tensor: Tensor) -> Tensor:
        """Select this layer's variables: (B, D, ...) to (F, 1, B, ...), in the circuit's dtype."""
        return self._of_variables(tensor).transpose(0, 1).unsqueeze(1).to(self.zero.dtype)

    def _evaluate(self, semiring: Semiring, factors: Factors, weights: Weights) -> Tensor:
        parameters = self.parameter_rows.select(weights.log).unsqueeze(-1).unbind(1)  # S of (F, K, 1)
        out = self._of_units(semiring, factors, parameters)
        out = out + self.parameter_rows.select(weights.linear).transpose(1, 2)
        return semiring.lift(out.to(self.zero.dtype))

    def _log_one(self, semiring: Semiring, weights: Weights) -> Tensor:
        if semiring.adds_up:
            return self.zero
        return self._peak(self.parameter_rows.select(weights.log).unsqueeze(-1).unbind(1)).to(self.zero.dtype)

    def _of_units(self, semiring: Semiring, factors: Factors, parameters: Sequence[Tensor]) -> Tensor:
        """Return the log-values of units with given parameters under factors of one kind, (F, K, B)."""
        if isinstance(factors, Interval):
            return self._in_bounds(semiring, parameters, self.columns(factors.lower), self.columns(factors.upper))
        if isinstance(factors, Normal):
            joined, out = self.distribution.times_normal(parameters, *map(self.columns, (factors.mean, factors.std)))
            return out if semiring.adds_up else out + self._peak(joined)
        values, log_factors = self._checked_list(factors)
        parameters = [part.unsqueeze(-1) for part in parameters]
        scores = self.distribution.log_density(parameters, self.columns(values))  # (F, K, B, k)
        if log_factors is not None:
            scores = scores + self.columns(log_factors)
        if scores.shape[-1] == 1:
            return scores.squeeze(-1)
        return logspace.log_sum(scores) if semiring.adds_up else scores.amax(-1)

    def _in_bounds(self, semiring: Semiring, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        if semiring.adds_up:
            return self.distribution.log_interval(parameters, lower, upper)
        best = self.distribution.mode(parameters, lower, upper)
        is_inside = (lower < best) & (best <= upper) if self.distribution.is_discrete else lower < upper
        return torch.where(is_inside, self.distribution.log_density(parameters, best), -torch.inf)

    def _chosen(
        self,
        semiring: ChoosingSemiring,
        factors: Factors,
        parameters: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Choose a value of n units, (n,), under factors of one kind on n single variables (n, 1, ...)."""
        if isinstance(factors, Interval):
            return self._any(semiring, parameters, factors.lower[:, 0], factors.upper[:, 0], generator)
        if isinstance(factors, Normal):
            mean, std = (part[:, 0].to(self.zero.dtype) for part in (factors.mean, factors.std))
            joined, _ = self.distribution.times_normal(parameters, mean, std)
            return self._any(semiring, joined, -torch.inf, torch.inf, generator)
        values, log_factors = self._checked_list(factors)
        values = values[:, 0]
        scores = self.distribution.log_density([part.unsqueeze(-1) for part in parameters], values)
        chosen = semiring.choose(scores if log_factors is None else scores + log_factors[:, 0], generator)
        return values.gather(1, chosen.unsqueeze(1))[:, 0].to(self.zero.dtype)

    def _any(
        self,
        semiring: ChoosingSemiring,
        parameters: Sequence[Tensor],
        lower: Tensor | float,
        upper: Tensor | float,
        generator: torch.Generator | None,
    ) -> Tensor:
        bounds = [torch.as_tensor(bound).to(parameters[0]).expand_as(parameters[0]) for bound in (lower, upper)]
        if semiring.adds_up:
            return self.distribution.draw(parameters, bounds[0], bounds[1], generator)
        return self.distribution.mode(parameters, bounds[0], bounds[1])

    def _peak(self, parameters: Sequence[Tensor]) -> Tensor:
        free = [torch.full_like(parameters[0], bound) for bound in (-torch.inf, torch.inf)]
        return self.distribution.log_density(parameters, self.distribution.mode(parameters, free[0], free[1]))

    def _checked_list(self, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """Return the values and log-factors of a list, (B, D, k); dense factors are those of 0 .. C - 1."""
        if isinstance(factors, Dense) and self.distribution.is_discrete:
            values = torch.arange(factors.log_factors.shape[-1], device=factors.stored.device)
            return values.expand_as(factors.log_factors), factors.log_factors
        if not isinstance(factors, Listed):
            raise ArgumentError(
                f"log_factors: a {self.distribution} has no list of values; use Evidence.gaussian or Evidence.interval "
                "on its variable, and Evidence.where to join kinds of evidence"
            )
        if not torch.compiler.is_compiling():
            values = factors.values if factors.values.shape[1] == 1 else self._of_variables(factors.values)
            outside = self.distribution.outside(values)
            if bool(outside.any()):
                raise ArgumentError(
                    f"x: expected {self.distribution.domain} for a {self.distribution}, got "
                    f"{values[outside][0].item()}; use NaN or `observed` for unknown values"
                )
        return factors.values, factors.log_factors
