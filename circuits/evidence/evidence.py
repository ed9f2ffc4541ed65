"""Evidence: one log-factor per variable and value.

Hard evidence is 0 at the observed value and -inf elsewhere; a missing variable is 0 everywhere; soft (virtual) evidence
is any log-weight per value, for instance a language model's logits. All are the same thing, stored as the cheapest of
the kinds in :mod:`circuits.evidence.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.arguments import check_factors, check_floats, check_integers, check_mask, check_pair, check_range
from circuits.digests import tensor_code
from circuits.errors import ArgumentError
from circuits.evidence.kinds import Dense, Factors, Interval, Listed, Normal, Nothing, Where

if TYPE_CHECKING:
    from circuits.symbolic import Sum

_MAX_SHOWN = 1000


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log-factors on the variables of a batch of B queries; build it with the class methods.

    Attributes:
        factors: on the variables, of one kind or of several.
        latents: log-factors on the children of sum nodes, (B, I) each, by node or name; see :meth:`with_latents`.
        classes: labels, int64 (B,), or log-factors on the classes, (B, R); see :meth:`with_class`.
        reference: evidence that every input unit's value is divided by its value under; see :meth:`relative_to`.
    """

    factors: Factors
    latents: Mapping[Sum | str, Tensor] | None = None
    classes: Tensor | None = None
    reference: Evidence | None = None

    @classmethod
    def observe(cls, x: Tensor, observed: Tensor | None = None) -> Evidence:
        """Hard evidence ``x``, (B, D), where ``observed``, bool (B, D), is True; everywhere when it is None.

        Args:
            x: integers or bool, or floating point, where NaN is missing. What is not observed may be anything.

        Raises:
            ArgumentError: wrong shapes or dtypes.
        """
        x = x.long() if isinstance(x, Tensor) and x.dtype == torch.bool else x
        is_real = isinstance(x, Tensor) and x.is_floating_point()
        (check_floats if is_real else check_integers)("x", x, "int64 or floating point (B, D)", dim=2)
        x, missing = (x, x.isnan()) if is_real else (x.long(), None)
        if observed is not None:
            check_mask("observed", observed, x.shape)
            missing = ~observed if missing is None else missing | ~observed
        if missing is None:
            return cls(Listed(x.unsqueeze(-1)))
        return cls(Listed(x.masked_fill(missing, 0).unsqueeze(-1)).without(missing))

    @classmethod
    def soft(cls, log_factors: Tensor) -> Evidence:
        """Soft evidence: any log-factors, (B, D, C); -inf rules a value out; NaN and +inf are errors.

        A variable with fewer than C categories ignores the rest of its row.

        Raises:
            ArgumentError: wrong shape or dtype, or a factor that is NaN or +inf.
        """
        check_factors("log_factors", log_factors, "(B, D, C)", dim=3)
        return cls(Dense(log_factors))

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
        check_integers("values", values, "int64 (B, D, k)", dim=3)
        check_factors("log_factors", log_factors, "(B, D, k)", dim=3)
        shape, got = tuple(values.shape), tuple(log_factors.shape)
        if got != shape:
            raise ArgumentError(f"log_factors: expected the shape of values, {shape}, got {got}")
        if missing is not None:
            check_mask("missing", missing, values.shape[:2])
        listed = Listed(values.long(), log_factors)
        listed.check_distinct()
        return cls(listed if missing is None else listed.without(missing))

    @classmethod
    def mixed(cls, x: Tensor, observed: Tensor, log_factors: Tensor) -> Evidence:
        """Hard evidence ``x`` (B, D) where ``observed`` (B, D), soft evidence ``log_factors`` (B, D, C) elsewhere.

        Raises:
            ArgumentError: wrong shapes or dtypes, an observed value outside 0 .. C - 1, a factor that is NaN or +inf.
        """
        check_integers("x", x, "int64 (B, D)", dim=2)
        check_mask("observed", observed, x.shape)
        both = cls.where(observed, cls.observe(x), cls.soft(log_factors)).factors
        check_range(x.masked_fill(~observed, 0), log_factors.shape[-1], "x")
        return cls(Dense(both.dense(log_factors.shape[-1], log_factors.dtype)))

    @classmethod
    def interval(cls, lower: Tensor, upper: Tensor) -> Evidence:
        """Evidence that ``lower < x_i <= upper``: log Z is the log-probability of the box.

        With ``lower`` = -inf it is the cumulative distribution at ``upper``. Categories are ordered by their numbers.

        Args:
            lower: floating point (B, D); -inf where there is no bound.
            upper: floating point (B, D); +inf where there is no bound.

        Raises:
            ArgumentError: wrong shapes or dtypes, or a bound that is NaN.
        """
        check_pair("lower", lower, "upper", upper)
        if bool((lower.isnan() | upper.isnan()).any()):
            raise ArgumentError("lower, upper: expected numbers or infinities, got NaN; use -inf and +inf for no bound")
        return cls(Interval(lower, upper))

    @classmethod
    def gaussian(cls, mean: Tensor, std: Tensor) -> Evidence:
        """Soft evidence with the factor ``e_i(v) = N(v; mean, std^2)``: the value was measured with normal noise.

        Args:
            mean: the measurements, floating point (B, D).
            std: the standard deviations of their noise, floating point (B, D), > 0.

        Raises:
            ArgumentError: wrong shapes or dtypes, or numbers that are not finite or not positive.
        """
        check_pair("mean", mean, "std", std)
        if not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
            raise ArgumentError("mean, std: expected finite numbers, std > 0; use Evidence.where for missing variables")
        return cls(Normal(mean, std))

    @classmethod
    def where(cls, condition: Tensor, one: Evidence, other: Evidence) -> Evidence:
        """Evidence ``one`` on the variables where ``condition`` is True, evidence ``other`` elsewhere.

        Evidence on latents and on the class is that of both; of a latent that both have factors on, ``one``'s count.
        Each variable stays relative to what it was relative to.

        Args:
            condition: bool (B, D) or (D,).
            one, other: for B queries over D variables.

        Raises:
            ArgumentError: shapes that do not fit, or both name the class.
        """
        one._check_alike(other)
        if isinstance(condition, Tensor) and condition.shape == (one.num_vars,):
            condition = condition.expand(one.batch_size, -1)
        check_mask("condition", condition, (one.batch_size, one.num_vars))
        if one.classes is not None and other.classes is not None:
            raise ArgumentError("other: it names the class, as `one` does; give it once")
        reference = None
        if one.reference is not None or other.reference is not None:  # where nothing is known a unit has the value 1
            references = (side.reference or cls(Nothing(condition)) for side in (one, other))
            reference = cls.where(condition, *references)
        return cls(
            one.factors.where(condition.clone(), other.factors),
            latents={**(other.latents or {}), **(one.latents or {})} or None,
            classes=other.classes if one.classes is None else one.classes,
            reference=reference,
        )

    @classmethod
    def nothing(cls, batch_size: int, num_vars: int, device: torch.device | str | None = None) -> Evidence:
        """Evidence that says nothing: every variable is missing. Its log-partition is log 1 = 0."""
        return cls(Nothing(torch.zeros(batch_size, num_vars, dtype=torch.bool, device=device)))

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
            name, shape = f"log_factors[{key!r}]", f"({self.batch_size}, I)"
            check_factors(name, factors, shape, dim=2, batch_size=self.batch_size)
        return replace(self, latents={**(self.latents or {}), **log_factors})

    def with_class(self, labels: Tensor | int) -> Evidence:
        """Return the same evidence with the class observed: int64 (B,), or one number for all queries.

        Queries on a circuit with ``num_classes`` then are about p(x | class), and log Z has shape (B,).

        Raises:
            ArgumentError: a wrong shape or dtype.
        """
        if isinstance(labels, int):
            labels = torch.full((self.batch_size,), int(labels), device=self.device)
        check_integers("labels", labels, f"int64 ({self.batch_size},)", dim=1)
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
        check_factors("log_prior", log_prior, f"(R,) or ({self.batch_size}, R)", dim=2, batch_size=self.batch_size)
        return replace(self, classes=log_prior)

    def relative_to(self, other: Evidence) -> Evidence:
        """Return the same evidence with every input unit's value divided by its value under ``other``.

        An input unit n on variable i then is ``sum_v e_i(v) p(v | n) / sum_v o_i(v) p(v | n)``, with o the factors of
        ``other``, and divided by 1 where the divisor is 0. Soft evidence q on unobserved variables, relative to itself,
        gives the circuit with leaves ``p(v | n) q_i(v) / Z_n``: q does not move the posterior of the latents then.

        Args:
            other: for the same queries and variables; what it says on latents and the class does not matter.

        Raises:
            ArgumentError: ``other`` is no evidence or for other queries, or one of the two is relative already.
        """
        self._check_alike(other)
        if self.reference is not None or other.reference is not None:
            raise ArgumentError("other: expected evidence that is not relative yet, relative to such; got it twice")
        return replace(self, reference=replace(other, latents=None, classes=None))

    def with_factors(
        self, log_factors: Tensor, values: Tensor | None = None, missing: Tensor | None = None
    ) -> Evidence:
        """Return evidence with the same latents, class and reference, and other factors.

        Args:
            log_factors: dense (B, D, C), or of the listed values.
            values: the listed values, int64 (B, D, k); None: dense.
            missing: where every value has log-factor 0, bool (B, D); None: nowhere.
        """
        factors = Dense(log_factors) if values is None else Listed(values, log_factors)
        return replace(self, factors=factors if missing is None else factors.without(missing))

    @property
    def _one_kind(self) -> Factors:
        """The kind of the factors where there are any, if it is the same everywhere."""
        kind = self.factors
        return kind.one if isinstance(kind, Where) and isinstance(kind.other, Nothing) else kind

    @property
    def log_factors(self) -> Tensor | None:
        """Dense factors (B, D, C), or those of listed values (B, D, k); None for other kinds, and for several."""
        return getattr(self._one_kind, "log_factors", None)

    @property
    def values(self) -> Tensor | None:
        """Listed values, int64 or floating point (B, D, k); None for other kinds, and for several."""
        return getattr(self._one_kind, "values", None)

    @property
    def missing(self) -> Tensor | None:
        """On which variables there are no factors at all, bool (B, D); None: on all there are."""
        return ~self.factors.known() if isinstance(self.factors, (Where, Nothing)) else None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.factors.stored)

    @property
    def num_vars(self) -> int:
        """D."""
        return self.factors.stored.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the evidence is stored."""
        return self.factors.stored.device

    def dense(self, num_categories: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the log-factors of the values 0 .. num_categories - 1, shape (B, D, num_categories)."""
        return self.factors.dense(num_categories, dtype)

    def says_nothing(self, num_categories: Tensor) -> Tensor:
        """Return on which variables every value has the log-factor 0, as on missing ones: bool (B, D).

        Evidence that is relative to other evidence says nothing only where that does not either. The numbers of
        categories, int64 (D,), are C for the values 0 .. C - 1, -1 for all whole numbers from 0 on, 0 for others.
        """
        return self._even(num_categories) == 0

    def levelled(self, num_categories: Tensor) -> tuple[Evidence, Tensor]:
        """Take out the factors that all values of a variable share, which no posterior depends on.

        Returns the evidence with these variables missing, and the sum of their log-factors, (B,): what its log Z lacks.
        """
        even = self._even(num_categories)
        if not bool(((even != 0) & ~even.isnan()).any()):
            return self, even.new_zeros(len(even))
        return self.without(~even.isnan()), even.nan_to_num(0.0).sum(1)

    @torch.no_grad()
    def _even(self, num_categories: Tensor) -> Tensor:
        """Return the log-factor of all values of a variable, NaN where they differ; if relative, 0 where both are."""
        num_categories = num_categories.to(self.device)
        even = self.factors.even(num_categories)
        if self.reference is None:
            return even
        return torch.where((even == 0) & (self.reference._even(num_categories) == 0), 0.0, torch.nan)

    def rows(self, index: Tensor | slice) -> Evidence:
        """Return the evidence of some of the B queries."""
        return self._map(lambda tensor: tensor[index])

    def pick(self, query: Tensor, variable: Tensor) -> Evidence:
        """Return the evidence on n single variables of given queries, (n,) each, as n queries over one variable."""
        return Evidence(self.factors.map(lambda tensor: tensor[query, variable].unsqueeze(1)))

    def to(self, device: torch.device | str) -> Evidence:
        """Return the evidence on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def check(self, num_categories: Tensor) -> None:
        """Raise ArgumentError unless the evidence fits variables with these numbers of categories, int64 (D,).

        They are as for :meth:`says_nothing`; of infinitely many values the layers of their input units check which fit.
        """
        stored, count = self.factors.stored, len(num_categories)
        if stored.shape[1] != count:
            raise ArgumentError(f"evidence: the circuit has {count} variables, the evidence has {stored.shape[1]}")
        if stored.device != num_categories.device:
            raise ArgumentError(
                f"evidence: expected it on {num_categories.device}, where the circuit is, got {stored.device}; move it "
                "with evidence.to(pc.device), or x.to(pc.device)"
            )
        self.factors.check(num_categories)
        if self.reference is not None:
            self.reference.check(num_categories)

    def without(self, where: Tensor) -> Evidence:
        """Return the evidence that says nothing on the variables ``where``, bool (B, D)."""
        return replace(self, factors=self.factors.without(where))

    def __repr__(self) -> str:
        """Python code that builds the evidence; shapes alone where it has more than a thousand numbers."""
        latents, classes = self.latents or {}, () if self.classes is None else (self.classes,)
        if max(part.numel() for part in (*self.factors.tensors(), *latents.values(), *classes)) > _MAX_SHOWN:
            kind = type(self.factors).__name__.lower()
            return f"Evidence({kind}, {self.batch_size} queries, {self.num_vars} variables, {self.device})"
        code = self.factors.code()
        if self.reference is not None:
            code += f".relative_to({self.reference!r})"
        if latents:
            items = (f"{key!r}: {tensor_code(latent)}" for key, latent in latents.items())
            code += f".with_latents({{{', '.join(items)}}})"
        if self.classes is not None:
            code += f".with_class{'' if self.classes.dim() == 1 else '_prior'}({tensor_code(self.classes)})"
        return code

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the code in interactive shells and failing examples too, which otherwise list a dataclass's fields."""
        printer.text(repr(self))

    def _check_alike(self, other: Evidence) -> None:
        shape = self.batch_size, self.num_vars
        if not isinstance(other, Evidence) or (other.batch_size, other.num_vars) != shape:
            got = f"{other.batch_size, other.num_vars}" if isinstance(other, Evidence) else type(other).__name__
            raise ArgumentError(f"other: expected evidence for {shape} queries and variables, got {got}")

    def _map(self, function: Callable[[Tensor], Tensor]) -> Evidence:
        return Evidence(
            self.factors.map(function),
            latents=self.latents and {key: function(latent) for key, latent in self.latents.items()},
            classes=None if self.classes is None else function(self.classes),
            reference=None if self.reference is None else self.reference._map(function),
        )
