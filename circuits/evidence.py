"""Evidence: one log-factor per variable and value.

Hard evidence is 0 at the observed value and -inf elsewhere; a missing variable is 0 everywhere; soft (virtual) evidence
is any log-weight per value, for instance a language model's logits. All three are the same thing, stored in the
cheapest of two forms: dense factors (B, D, C), or *listed* values (B, D, k) with -inf for every value not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.errors import ArgumentError

if TYPE_CHECKING:
    from circuits.graph import Sum


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log-factors on the variables of a batch of B queries; build it with the class methods.

    Attributes:
        log_factors: (B, D, C) dense, or (B, D, k) for the listed values, or None: 0 for every listed value.
        values: None when dense, else the listed values, int64 (B, D, k).
        missing: bool (B, D), True where every value has log-factor 0; None: nowhere.
        latents: log-factors on the children of sum nodes, (B, I) each, by node or name; see :meth:`with_latents`.
        classes: labels, int64 (B,), or log-factors on the classes, (B, R); see :meth:`with_class`.
    """

    log_factors: Tensor | None
    values: Tensor | None
    missing: Tensor | None
    latents: Mapping[Sum | str, Tensor] | None = None
    classes: Tensor | None = None

    @classmethod
    def observe(cls, x: Tensor, observed: Tensor | None = None) -> Evidence:
        """Hard evidence ``x``, int64 (B, D), where ``observed``, bool (B, D), is True; everywhere when it is None.

        Entries of ``x`` that are not observed are ignored and may hold anything.

        Raises:
            ArgumentError: wrong shapes or dtypes.
        """
        _check_tensor("x", x, "int64 (B, D)", x_dim=2, integer=True)
        if observed is None:
            return cls(None, x.long().unsqueeze(-1), None)
        _check_mask("observed", observed, x.shape)
        return cls(None, x.long().masked_fill(~observed, 0).unsqueeze(-1), ~observed)

    @classmethod
    def soft(cls, log_factors: Tensor) -> Evidence:
        """Soft evidence: any log-factors, (B, D, C); -inf rules a value out; NaN and +inf are errors.

        A variable with fewer than C categories ignores the rest of its row.

        Raises:
            ArgumentError: wrong shape or dtype, or a factor that is NaN or +inf.
        """
        _check_factors(log_factors, "(B, D, C)")
        return cls(log_factors, None, None)

    @classmethod
    def sparse(cls, values: Tensor, log_factors: Tensor, missing: Tensor | None = None) -> Evidence:
        """Soft evidence on k listed values per variable; every other value is ruled out.

        Args:
            values: int64 (B, D, k), distinct within a row but for those ruled out with -inf.
            log_factors: (B, D, k); -inf rules a listed value out too.
            missing: bool (B, D); True makes every value of that variable possible with log-factor 0.

        Raises:
            ArgumentError: wrong shapes or dtypes, or a factor that is NaN or +inf.
        """
        _check_tensor("values", values, "int64 (B, D, k)", x_dim=3, integer=True)
        _check_factors(log_factors, "(B, D, k)")
        if values.shape != log_factors.shape:
            raise ArgumentError(
                f"log_factors: expected the shape of values, {tuple(values.shape)}, got {tuple(log_factors.shape)}"
            )
        if missing is not None:
            _check_mask("missing", missing, values.shape[:2])
        _check_distinct(values, log_factors)
        return cls(log_factors, values.long(), missing)

    @classmethod
    def mixed(cls, x: Tensor, observed: Tensor, log_factors: Tensor) -> Evidence:
        """Hard evidence ``x`` (B, D) where ``observed`` (B, D), soft evidence ``log_factors`` (B, D, C) elsewhere.

        Raises:
            ArgumentError: wrong shapes or dtypes, an observed value outside 0 .. C - 1, or a factor that is NaN or
                +inf.
        """
        _check_factors(log_factors, "(B, D, C)")
        _check_tensor("x", x, "int64 (B, D)", x_dim=2, integer=True)
        _check_mask("observed", observed, x.shape)
        if log_factors.shape[:2] != x.shape:
            raise ArgumentError(
                f"log_factors: expected (B, D, C) with (B, D) = {tuple(x.shape)}, got {tuple(log_factors.shape)}"
            )
        num_values = log_factors.shape[-1]
        _check_range(x.masked_fill(~observed, 0), num_values, "x")
        hard = torch.full_like(log_factors, -torch.inf)
        hard.scatter_(2, x.long().masked_fill(~observed, 0).unsqueeze(-1), 0.0)
        return cls(torch.where(observed.unsqueeze(-1), hard, log_factors), None, None)

    @classmethod
    def nothing(cls, batch_size: int, num_vars: int, device: torch.device | str | None = None) -> Evidence:
        """Evidence that says nothing: every variable is missing. Its log-partition is log 1 = 0."""
        values = torch.zeros(batch_size, num_vars, 1, dtype=torch.int64, device=device)
        return cls(None, values, torch.ones(batch_size, num_vars, dtype=torch.bool, device=device))

    def with_latents(self, log_factors: Mapping[Sum | str, Tensor]) -> Evidence:
        """Return the same evidence with log-factors on latent variables too.

        A sum node is a latent variable: which of its child units is used. The factor of child unit i multiplies that
        child wherever this node uses it, for all of the node's units: in an HMM, ``{"transition3": f}`` with f (B, N)
        is soft evidence on the hidden state of step 4. Other nodes tied to this one are not touched.

        Args:
            log_factors: by sum node, or its name: (B, I) for its I child units, in the order of its children; -inf
                rules a child unit out. They replace what the same key had before.

        Raises:
            ArgumentError: a wrong shape or dtype, or a factor that is NaN or +inf.
        """
        for key, factors in log_factors.items():
            _check_conditions(f"log_factors[{key!r}]", factors, f"({self.batch_size}, I)", self.batch_size)
        return replace(self, latents={**(self.latents or {}), **log_factors})

    def with_class(self, labels: Tensor | int) -> Evidence:
        """Return the same evidence with the class observed: int64 (B,), or one number for all queries.

        Queries on a circuit with ``num_classes`` then are about p(x | class), and log Z has shape (B,).

        Raises:
            ArgumentError: a wrong shape or dtype.
        """
        if isinstance(labels, int):
            labels = torch.full((self.batch_size,), int(labels), device=self.device)
        _check_tensor("labels", labels, f"int64 ({self.batch_size},)", x_dim=1, integer=True)
        if len(labels) != self.batch_size:
            raise ArgumentError(f"labels: expected one per query, ({self.batch_size},), got {tuple(labels.shape)}")
        return replace(self, classes=labels.long())

    def with_class_prior(self, log_prior: Tensor) -> Evidence:
        """Return the same evidence with log-factors on the classes, for instance their log-prior: (R,) or (B, R).

        Queries on a circuit with ``num_classes`` then are about ``sum_r exp(log_prior_r) p(x | class r)``: one root.

        Raises:
            ArgumentError: a wrong shape or dtype, or a factor that is NaN or +inf.
        """
        if isinstance(log_prior, Tensor) and log_prior.dim() == 1:
            log_prior = log_prior.expand(self.batch_size, -1)
        _check_conditions("log_prior", log_prior, f"(R,) or ({self.batch_size}, R)", self.batch_size)
        return replace(self, classes=log_prior)

    def with_factors(self, log_factors: Tensor) -> Evidence:
        """Return evidence with the same latents and class, and dense log-factors, (B, D, C), on the variables."""
        return replace(self, log_factors=log_factors, values=None, missing=None)

    @property
    def is_dense(self) -> bool:
        """Whether every value's factor is stored."""
        return self.values is None

    @property
    def batch_size(self) -> int:
        """B."""
        return self._stored.shape[0]

    @property
    def num_vars(self) -> int:
        """D."""
        return self._stored.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the evidence is stored."""
        return self._stored.device

    @property
    def _stored(self) -> Tensor:
        stored = self.log_factors if self.values is None else self.values
        assert stored is not None
        return stored

    def dense(self, num_categories: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the log-factors of all values, shape (B, D, num_categories)."""
        if self.values is None:
            assert self.log_factors is not None
            factors = self.log_factors.to(dtype)
        else:
            listed = (
                torch.zeros_like(self.values, dtype=dtype) if self.log_factors is None else self.log_factors.to(dtype)
            )
            factors = listed.new_full((*self.values.shape[:2], num_categories), -torch.inf)
            factors = factors.scatter_reduce(2, self.values, listed, "amax")
        return factors if self.missing is None else factors.masked_fill(self.missing.unsqueeze(-1), 0.0)

    def rows(self, index: Tensor | slice) -> Evidence:
        """Return the evidence of some of the B queries."""
        return self._map(lambda tensor: tensor[index])

    def pick(self, query: Tensor, variable: Tensor) -> Evidence:
        """Return the evidence on n single variables of given queries, (n,) each, as n queries over one variable."""
        variables_only = replace(self, latents=None, classes=None)
        return variables_only._map(lambda tensor: tensor[query, variable].unsqueeze(1))

    def to(self, device: torch.device | str) -> Evidence:
        """Return the evidence on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def check(self, num_categories: Tensor) -> None:
        """Raise ArgumentError unless the evidence fits variables with these numbers of categories, int64 (D,)."""
        if self.num_vars != len(num_categories):
            raise ArgumentError(
                f"evidence: the circuit has {len(num_categories)} variables, the evidence has {self.num_vars} "
                f"(shape {tuple(self._stored.shape)})"
            )
        if self.values is not None:
            _check_range(self.values, num_categories.unsqueeze(-1), "x")
        elif self._stored.shape[-1] < int(num_categories.max()):
            raise ArgumentError(
                f"log_factors: expected at least {int(num_categories.max())} values per variable, got "
                f"{self._stored.shape[-1]} (shape {tuple(self._stored.shape)})"
            )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Evidence:
        mapped = {k: None if v is None else function(v) for k, v in vars(self).items() if k != "latents"}
        latents = None if self.latents is None else {key: function(value) for key, value in self.latents.items()}
        return replace(self, **mapped, latents=latents)


def _check_tensor(name: str, value: Tensor, expected: str, *, x_dim: int, integer: bool) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{name}: expected a tensor {expected}, got {type(value).__name__}; wrap it in torch.as_tensor"
        )
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if value.dim() != x_dim or is_integer != integer:
        raise ArgumentError(f"{name}: expected {expected}, got {value.dtype} {tuple(value.shape)}")


def _check_factors(log_factors: Tensor, shape: str) -> None:
    _check_tensor("log_factors", log_factors, f"floating point {shape}", x_dim=3, integer=False)
    if not log_factors.is_floating_point():
        raise ArgumentError(f"log_factors: expected floating point {shape}, got {log_factors.dtype}")
    if not bool((log_factors.detach() < torch.inf).all()):
        raise ArgumentError("log_factors: expected numbers below +inf (-inf rules a value out), got NaN or +inf")


def _check_conditions(name: str, log_factors: Tensor, shape: str, batch_size: int) -> None:
    _check_tensor(name, log_factors, f"floating point {shape}", x_dim=2, integer=False)
    if not log_factors.is_floating_point() or len(log_factors) != batch_size:
        raise ArgumentError(
            f"{name}: expected floating point {shape}, got {log_factors.dtype} {tuple(log_factors.shape)}"
        )
    if not bool((log_factors.detach() < torch.inf).all()):
        raise ArgumentError(f"{name}: expected numbers below +inf (-inf rules an alternative out), got NaN or +inf")


def _check_distinct(values: Tensor, log_factors: Tensor) -> None:
    possible = torch.where(
        log_factors.detach() > -torch.inf, values, -1 - torch.arange(values.shape[-1], device=values.device)
    )
    ordered = possible.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(repeated):
        batch, var, position = repeated[0].tolist()
        raise ArgumentError(
            f"values: expected distinct values in a row, got {int(ordered[batch, var, position])} twice at batch "
            f"{batch}, "
            f"variable {var}; add up its factors with torch.logaddexp first"
        )


def _check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"{name}: expected a bool tensor of shape {tuple(shape)}, got {got}")


def _check_range(values: Tensor, upper: Tensor | int, name: str) -> None:
    outside = (values < 0) | (values >= upper)
    if bool(outside.any()):
        first = outside.nonzero()[0].tolist()
        limit = upper if isinstance(upper, int) else int(upper.expand_as(values[0])[tuple(first[1:])])
        raise ArgumentError(
            f"{name}: expected values from 0 to {limit - 1}, got {int(values[tuple(first)])} at batch {first[0]}, "
            f"variable {first[1]}; use `observed` for unknown values"
        )
