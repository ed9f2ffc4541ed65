"""A compiled circuit, perhaps given evidence, as a ``torch.distributions.Distribution``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from circuits import queries
from circuits.arguments import checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights, check_compiled
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.families import Distribution as InputFamily
from circuits.precision import own_precision
from circuits.weights.latents import class_needed

T = TypeVar("T")

_KEPT = "_kept_"


def kept(function: Callable[[Any], Tensor]) -> Any:
    """Make a property of a method whose answer is kept where nothing that it depends on can change.

    That is without gradients, which an answer that was found without them does not have, and of a distribution that
    holds its weights: those of the circuit may be others at the next question.
    """
    compute, name = own_precision(function), _KEPT + function.__name__

    @functools.wraps(function)
    def answer(self: Any) -> Tensor:
        if torch.is_grad_enabled() or not self.holds_weights:
            return compute(self)
        if name not in vars(self):
            vars(self)[name] = compute(self)
        found: Tensor = vars(self)[name]
        return found

    return property(answer)


def without_kept(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a distribution that are not answers of :func:`kept` properties."""
    return {name: value for name, value in attributes.items() if not name.startswith(_KEPT)}


class CircuitDistribution(Distribution):
    """The distribution ``p(x)`` of a circuit, or ``p(x | e) = p(x) prod_i e_i(x_i) / Z(e)`` for B queries of evidence.

    ``event_shape`` is (D,); ``batch_shape`` is () without evidence and (B,) with it. Everything is exact, and
    ``log_prob`` is differentiable in the circuit's weights and the evidence.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own; with a batch dimension they are for B
            queries. By default the circuit's own are read when a question is asked.

    Raises:
        ArgumentError: an argument has a wrong type, or evidence or weights do not fit the circuit or each other.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  - as the base class declares it
    has_enumerate_support = False
    summed_out: Tensor | None = None
    """Variables that the distribution is not over, bool (B, D); what values say of them is ignored."""

    def __init__(
        self, pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
    ) -> None:
        check_compiled(pc)
        if evidence is not None and not isinstance(evidence, Evidence):
            raise ArgumentError(f"evidence: expected ct.Evidence or None, got {type(evidence).__name__}")
        num_queries = 1 if weights is None else weights.batch_size
        if evidence is None and num_queries > 1:
            evidence = Evidence.nothing(num_queries, pc.circuit.num_vars, pc.device)
        if evidence is not None:
            evidence.check(pc.num_categories)
            if num_queries not in (1, evidence.batch_size):
                raise ArgumentError(
                    f"weights: expected weights for {evidence.batch_size} queries like the evidence, or for all, got "
                    f"{num_queries}"
                )
        if pc.circuit.num_classes is not None and (evidence is None or evidence.classes is None):
            raise class_needed(pc.circuit.root)
        self.pc = pc
        self.evidence = evidence
        self.weights = weights
        batch_shape = torch.Size() if evidence is None else torch.Size([evidence.batch_size])
        super().__init__(batch_shape, torch.Size([pc.circuit.num_vars]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Values from 0 to C - 1 of every variable; whole or real numbers where there are infinitely many."""
        if self.pc.circuit.is_discrete and 0 not in self.pc.circuit.num_categories:
            return constraints.independent(constraints.integer_interval(0, self.pc.num_categories - 1), 1)
        families = {node.var: node.distribution for node in self.pc.circuit.inputs}
        each = [_support_of(families[var]) for var in range(self.pc.circuit.num_vars)]
        return constraints.independent(each[0], 1) if len(set(each)) == 1 else _AllOf(each, -1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> CircuitDistribution:
        """Not supported: give evidence for as many queries instead, so that the cost is visible."""
        raise ArgumentError(
            f"batch_shape: cannot expand to {tuple(batch_shape)}; repeat the evidence, evidence.rows(index), instead"
        )

    @property
    def holds_weights(self) -> bool:
        """Whether the weights are those at its beginning; else they are read when a question is asked."""
        return self.weights is not None

    @kept
    def log_partition(self) -> Tensor:
        """``log Z(e)``, of ``batch_shape``; 0 without evidence."""
        if self.evidence is None:
            return torch.zeros((), dtype=self.pc.dtype, device=self.pc.device)
        return self.pc.log_partition(self.evidence, self.weights)

    def log_prob(self, value: Tensor, *, log_partition: Tensor | None = None) -> Tensor:
        """Return ``log p(value | e)``, in nats; -inf where the circuit or the evidence rules a value out.

        Args:
            value: (*sample_shape, *batch_shape, D), int64 if all families are discrete.
            log_partition: ``log Z(e)`` where the caller has it; with one that is detached, the gradients are those of
                ``log p(value) prod_i e_i(value_i)``.

        Returns:
            (*sample_shape, *batch_shape).

        Raises:
            ArgumentError: a wrong shape or dtype, NaN, or a value outside its variable's categories.
            ImpossibleEvidenceError: Z(e) = 0.
        """
        tail = self.batch_shape + self.event_shape
        if not isinstance(value, Tensor) or value.shape[-len(tail) :] != tail:
            is_tensor = isinstance(value, Tensor)
            got = f"{tuple(value.shape)}" if is_tensor else f"{type(value).__name__}; wrap it in torch.as_tensor"
            raise ArgumentError(f"value: expected a tensor of shape (..., {', '.join(map(str, tail))}), got {got}")
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ArgumentError("value: expected complete values, got NaN; ct.queries.log_marginal sums variables out")
        num_samples = value.shape[: value.dim() - len(tail)].numel()
        x = value.reshape(num_samples, *tail)
        if self.evidence is None:
            return self.pc.log_partition(Evidence.observe(x), self.weights).reshape(value.shape[:-1])
        log_partition = self.log_partition if log_partition is None else log_partition
        checked_possible(log_partition)
        Evidence.observe(x.flatten(0, 1)).check(self.pc.num_categories)
        log_joint = self._log_joint(self.evidence, x)
        return (log_joint - log_partition).reshape(value.shape[:-1])

    def _log_joint(self, evidence: Evidence, x: Tensor) -> Tensor:
        """Return ``log p(x) prod_i e_i(x_i)``, (S, B), of values x, (S, B, D)."""
        is_per_query = self.weights is not None and self.weights.batch_size > 1
        if is_per_query and len(x) > 1:
            return torch.cat([self._log_joint(evidence, one) for one in x.split(1)])
        factors = evidence.factors.at(x, self.pc.dtype)
        observed = x.flatten(0, 1).unsqueeze(-1)
        scored = evidence
        if len(x) != 1:  # copies share what they are relative to
            index = torch.arange(evidence.batch_size, device=x.device).repeat(len(x))
            conditions = replace(evidence.with_factors(factors.new_zeros(*x.shape[1:], 1)), reference=None)
            scored = replace(conditions.rows(index), reference=evidence.reference)
        summed_out = None if self.summed_out is None else self.summed_out.repeat(len(x), 1)
        scored = scored.with_factors(factors.flatten(0, 1).unsqueeze(-1), observed, summed_out)
        return self.pc.log_partition(scored, self.weights).reshape(x.shape[:2])

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact, independent samples: int64 (*sample_shape, *batch_shape, D).

        Raises ImpossibleEvidenceError where Z(e) = 0.
        """
        shape = torch.Size(sample_shape)
        draws = self.query(queries.sample, max(1, shape.numel()), generator=generator)[: shape.numel()]
        return draws.reshape(*shape, *self.batch_shape, *self.event_shape)

    @kept
    def marginal_probs(self) -> Tensor:
        """``p(x_i = v | e)``, (*batch_shape, D, C); rows sum to 1, values that a variable does not have are 0."""
        if self.evidence is not None:
            return self.query(queries.marginals, differentiable=True)
        nothing = Evidence.nothing(1, self.pc.circuit.num_vars, self.pc.device)
        return queries.marginals(self.pc, nothing, weights=self.weights, differentiable=True)[0]

    def query(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Put a query of :mod:`circuits.queries` about this distribution: with its circuit, evidence and weights.

        ``dist.query(ct.queries.latent_marginals, nodes=["transition3"])`` is one.

        Args:
            function: takes the circuit first, then ``arguments``, and ``evidence`` and perhaps ``weights`` by name.
            arguments: what follows the circuit.
            options: further arguments by name.
        """
        if self.weights is not None:
            options["weights"] = self.weights
        return function(self.pc, *arguments, evidence=self.evidence, **options)

    @property
    def mean(self) -> Tensor:
        """The mean of every variable's value, taken as a number: (*batch_shape, D)."""
        return self.query(queries.mean, differentiable=True).reshape(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of every variable's value, taken as a number: (*batch_shape, D)."""
        return self.query(queries.variance, differentiable=True).reshape(*self.batch_shape, *self.event_shape)

    @property
    def mode(self) -> Tensor:
        """The values of the most probable explanation, int64 (*batch_shape, D): over latents and values together.

        It is the most probable x itself only if the circuit is deterministic; that maximum is NP-hard in general.
        """
        return self.query(queries.mpe).assignment.reshape(*self.batch_shape, *self.event_shape)

    def entropy(self) -> Tensor:
        """Return the entropy, in nats, of ``batch_shape``, where it is exact: independent variables, or a single one.

        Raises PropertyError for mixtures over several variables, whose entropy is intractable in general.
        """
        if not self.pc.circuit.is_deterministic and self.pc.circuit.num_vars > 1:
            raise PropertyError(
                f"entropy: intractable in general for {self.pc.circuit}, which mixes over several variables; "
                "estimate it with -dist.log_prob(dist.sample([1000])).mean(0)"
            )
        return torch.special.entr(self.marginal_probs).sum((-1, -2))

    def __repr__(self) -> str:
        return (
            f"CircuitDistribution({self.pc.circuit}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


class _AllOf(constraints.stack):
    """Vectors each of whose entries satisfies a constraint of its own."""

    def check(self, value: Tensor) -> Tensor:
        return super().check(value).all(self.dim)


def _support_of(family: InputFamily) -> constraints.Constraint:
    if family.num_values:
        return constraints.integer_interval(0, family.num_values - 1)
    return constraints.nonnegative_integer if family.is_discrete else constraints.real
