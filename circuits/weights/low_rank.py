"""A node's own table, moved by a low rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.algebra.logspace import log_sum, product
from circuits.errors import ArgumentError
from circuits.weights.forms import Form, Own, refused, stacked
from circuits.weights.implicit import ImplicitWeights, at


@dataclass(frozen=True, eq=False)
class LowRank(Form):
    """The node's own table W, moved by a rank R: ``W_b[k, i] = (W[k, i] + sum_r v[k, r] u_b[i, r]) / (1 + ...)``.

    The denominator is the row's sum, so W_b is normalised. Factors are numbers >= 0, not logarithms: where one side is
    0, W_b is W, and has a gradient in it.

    Args:
        u: of the children, (I, R) or (B, I, R).
        v: of the units, (K, R) or (B, K, R).
    """

    u: Tensor
    v: Tensor

    @classmethod
    def from_logs(cls, log_u: Tensor, log_v: Tensor) -> LowRank:
        """Build the form of logarithms U, V, as PyJuice is given them: ``W + sum_r e^(U[i, r] + V[k, r])``."""
        return cls(log_u.exp(), log_v.exp())

    def check(self, who: object, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless the factors fit each other and the node."""
        rank = self.u.shape[-1] if isinstance(self.u, Tensor) and self.u.dim() else "R"
        for name, factor, size in (("u", self.u, shape[1]), ("v", self.v, shape[0])):
            is_matrix = isinstance(factor, Tensor) and factor.dim() in (2, 3) and factor.is_floating_point()
            if not is_matrix or tuple(factor.shape[-2:]) != (size, rank):
                raise refused(name, f"({size}, {rank}) or (B, {size}, {rank})", who, factor)
            least, greatest = map(float, torch.aminmax(factor.detach()) if factor.numel() else (0, 0))
            if not (least >= 0 and greatest < torch.inf):
                raise ArgumentError(
                    f"external: expected finite numbers >= 0 as {name} of {who}, got others; of logarithms make "
                    "it with LowRank.from_logs"
                )

    @property
    def batch_size(self) -> int | None:
        """B, or None."""
        return next((len(factor) for factor in (self.u, self.v) if factor.dim() == 3), None)

    def group(self) -> Hashable:
        """Nodes of one rank are joined; of one batch size are those that have one."""
        return LowRank, self.u.shape[-1]

    def joined(
        self, forms: Sequence[LowRank], own: Own, *, normalize: bool, shared: dict[Hashable, Any]
    ) -> JoinedLowRank:
        """Stack the factors, but for a v that all nodes share."""
        vs = [form.v for form in forms]
        vs = vs[:1] if all(v is vs[0] for v in vs) else vs
        of_own, of_vs = (LowRank, own.bank, own.rows), (LowRank, *map(id, vs))
        if of_own not in shared:
            log_own = own.table()
            shared[of_own] = log_own, log_own.exp()
        if of_vs not in shared:
            shared[of_vs] = stacked([v.to(own.log) for v in vs], 2)
        (log_own, table), v = shared[of_own], shared[of_vs]
        return JoinedLowRank(table, log_own, stacked([form.u.to(own.log) for form in forms], 2), v, None)


@dataclass(frozen=True, eq=False)
class JoinedLowRank(ImplicitWeights):
    """Tables of n nodes, moved by a low rank."""

    own: Tensor
    """(1 or n, K, I)."""
    log_own: Tensor
    u: Tensor
    """(n, B or 1, I, R)."""
    v: Tensor
    """(1 or n, B or 1, K, R)."""
    log_scale: Tensor | None
    per_query = ("u", "v", "log_scale")

    @property
    def num_units(self) -> int:  # type: ignore[override]
        """K."""
        return self.own.shape[1]

    def support(self) -> JoinedLowRank:
        """Return weights that are positive where these are."""
        own = (self.log_own > -torch.inf).to(self.own.dtype)
        return dataclasses.replace(self, own=own, u=(self.u > 0).to(own), v=(self.v > 0).to(own))

    def apply(self, x: Tensor) -> Tensor:
        """Multiply by the shared tables, and by R vectors of every query."""
        own = product(self.own.expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
        moved = torch.einsum("nbkr,nbre->nkbe", self.v, torch.einsum("nbir,nibe->nbre", self.u, x))
        row_sums = 1 + torch.einsum("nbkr,nbr->nkb", self.v, self.u.sum(2))
        return (own + moved) / row_sums.unsqueeze(3)

    @property
    def numbers_per_row(self) -> int:  # type: ignore[override]
        """I * (R + 1)."""
        return self.u.shape[2] * (self.u.shape[3] + 1)

    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Add up the node's own row and R others."""
        own = self.log_own[at(self.log_own, 0, slot), unit]
        u = self.u[at(self.u, 0, slot), at(self.u, 1, query)]  # (m, I, R)
        v = self.v[at(self.v, 0, slot), at(self.v, 1, query), unit]  # (m, R)
        moved = _log(u) + _log(v).unsqueeze(1)
        row_sum = 1 + (v * u.sum(1)).sum(1, keepdim=True)
        return log_sum(torch.cat([own.unsqueeze(2), moved], 2)) - row_sum.log()


def _log(x: Tensor) -> Tensor:
    """Return the logarithm, with gradient 0 where it is -inf."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -torch.inf)
