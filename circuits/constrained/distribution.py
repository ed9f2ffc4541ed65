"""A chain circuit given evidence and that a finite automaton accepts the sequence: exact, and again a distribution.

The product of a hidden Markov model and its like with an automaton is a chain over pairs of states. Its normaliser,
marginals, samples and mode cost as many times those of the circuit as the automaton has states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, MaxSemiring, divided
from circuits.arguments import checked_temperature
from circuits.constrained.arcs import arcs_of, log_indicator
from circuits.constrained.chain import ArcSemiring, Chain, temperature_of
from circuits.constrained.class_leaves import class_leaves, explicit
from circuits.constrained.latents import ConstrainedLatentChoice
from circuits.distribution import CircuitDistribution, kept, without_kept
from circuits.engine.choices import Choice
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question, gradient_of
from circuits.engine.weights import CircuitWeights, check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.automata import Automaton, log_matmul, reading_order
from circuits.queries.common import require_finite_values
from circuits.queries.deterministic import DeterministicAutomaton
from circuits.queries.temperature import choosing_semiring
from circuits.randomness import RowGenerators, Source

T = TypeVar("T")


class ConstrainedDistribution(CircuitDistribution):
    """``p(x | e, A) = p(x) prod_i e_i(x_i) A(x) / Z`` for B queries, with A(x) = 1 if the automaton accepts x, else 0.

    Of a weighted automaton, A(x) is the sum of the weights of its runs on x. Exact for *chain* circuits: hidden Markov
    models, mixtures of independent variables, and all whose products split off the first or the last variable.
    ``log_prob`` and ``log_partition`` are differentiable in weights and evidence.

    Args:
        pc: a chain circuit over D variables with finitely many values.
        evidence: for B queries.
        automaton: reads x_0, x_1, ..., x_D-1; over at least as many values as any variable has.
        start: log-weights of the state before x_0, (B, S) or (S,), or bool: which states are possible; None: the
            automaton's own start. Where several are possible, the weights of x from each of them add up.
        accept: the same of the state after x_D-1; None: the automaton's own accepting states.
        reads: bool (B, D) or (D,), which variables the automaton reads; the others may have any value. None: all.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Raises:
        ArgumentError: an argument has a wrong type or shape, or the automaton reads too few values.
        PropertyError: the circuit is not a chain in the order of its variables, or one has infinitely many values.
    """

    def __init__(
        self,
        pc: CompiledCircuit,
        evidence: Evidence,
        automaton: DeterministicAutomaton | Automaton,
        *,
        start: Tensor | None = None,
        accept: Tensor | None = None,
        reads: Tensor | None = None,
        weights: CircuitWeights | None = None,
    ) -> None:
        check_compiled(pc)
        if not isinstance(evidence, Evidence):
            raise ArgumentError(f"evidence: expected ct.Evidence, got {type(evidence).__name__}")
        if not isinstance(automaton, (Automaton, DeterministicAutomaton)):
            raise ArgumentError(
                f"automaton: expected ct.queries.DeterministicAutomaton or ct.queries.Automaton, got "
                f"{type(automaton).__name__}"
            )
        require_finite_values(pc, "ConstrainedDistribution")
        self._order = reading_order(pc, "ConstrainedDistribution")
        arcs = arcs_of(automaton).to(pc.device, pc.dtype)
        if len(arcs.classes) < max(pc.circuit.num_categories):
            raise ArgumentError(
                f"automaton: expected one over at least {max(pc.circuit.num_categories)} values, got "
                f"{len(arcs.classes)}"
            )
        super().__init__(pc, evidence, weights=weights)
        self.automaton = automaton
        self._weights = pc.weights() if weights is None else weights
        self._log_start = _ends("start", start, arcs.log_start, evidence.batch_size)
        self._log_accept = _ends("accept", accept, arcs.log_accept, evidence.batch_size)
        self._reads = _checked_reads(reads, evidence)
        self._arcs = arcs if self._reads is None else arcs.with_idle()
        self._explicit = explicit(evidence, max(pc.circuit.num_categories), pc.dtype, self._reads)

    def given(self, evidence: Evidence) -> ConstrainedDistribution:
        """Return the distribution under other evidence, such as this one's with more values observed."""
        changed: ConstrainedDistribution = object.__new__(type(self))
        vars(changed).update(without_kept(vars(self)))
        evidence.check(self.pc.num_categories)
        changed.evidence = evidence
        changed._explicit = explicit(evidence, max(self.pc.circuit.num_categories), self.pc.dtype, self._reads)
        return changed

    @property
    def holds_weights(self) -> bool:
        """True: the weights are those at its beginning."""
        return True

    @kept
    def log_partition(self) -> Tensor:
        """``log Z = log sum_x p(x) prod_i e_i(x_i) A(x)``, (B,); -inf where nothing that is accepted is possible."""
        return self._log_z(self._explicit)

    @kept
    def log_acceptance(self) -> Tensor:
        """``log P(accepted | e)``, (B,), in nats: how much the constraint takes; of weighted automata E[A(x) | e]."""
        return self.log_partition - self._possible(self.pc.log_partition(self._evidence, self._weights))

    @own_precision
    def _log_joint(self, evidence: Evidence, x: Tensor) -> Tensor:
        """Return ``log p(x) prod_i e_i(x_i) A(x)``, (S, B), of values x, (S, B, D)."""
        if self._weights.batch_size > 1 and len(x) > 1:
            return torch.cat([self._log_joint(evidence, one) for one in x.split(1)])
        index = torch.arange(evidence.batch_size, device=x.device).repeat(len(x))
        factors = self._explicit.factors.at(x, self.pc.dtype)
        conditions = replace(self._explicit, reference=None).rows(index)
        scored = conditions.with_factors(factors.flatten(0, 1).unsqueeze(-1), x.long().flatten(0, 1).unsqueeze(-1))
        scored = replace(scored, reference=evidence.reference)  # copies share what they are relative to
        return self._log_z(scored, index).reshape(x.shape[:2])

    def query(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Refuse: queries of :mod:`circuits.queries` know nothing of automata.

        Raises:
            PropertyError: always.
        """
        raise PropertyError(
            f"{getattr(function, '__name__', function)}: it knows nothing of the automaton; a constrained distribution "
            "has log_partition, log_prob, marginal_probs, sample, mode, sample_latents"
        )

    @kept
    def marginal_probs(self) -> Tensor:
        """``p(x_i = v | e, A)``, (B, D, C); rows sum to 1, values that a variable does not have are 0."""
        evidence, num_values = self._explicit, max(self.pc.circuit.num_categories)
        if evidence.missing is not None:
            evidence = evidence.with_factors(evidence.dense(num_values, self.pc.dtype))
        gradient = self._gradient(evidence)
        if evidence.values is None:
            return gradient[..., :num_values]
        return gradient.new_zeros(*gradient.shape[:2], num_values).scatter_add(2, evidence.values, gradient)

    @kept
    def listed_marginal_probs(self) -> Tensor:
        """``p(x_i = v | e, A)`` of the values that the evidence lists, (B, D, k); dense evidence lists all.

        Raises:
            ArgumentError: the evidence says nothing on some variable that is read.
        """
        return self._gradient(self._explicit)

    @own_precision
    def _gradient(self, evidence: Evidence) -> Tensor:
        assert evidence.log_factors is not None
        return gradient_of(
            lambda factors, weights: self._possible(
                self._log_z(evidence.with_factors(factors, evidence.values, evidence.missing), weights=weights)
            ),
            evidence.log_factors.to(self.pc.dtype),
            self._weights,
        )

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: Source = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw exact, independent samples, all of them accepted: int64 (*sample_shape, B, D).

        Args:
            sample_shape: of the samples of each query.
            generator: on the circuit's device, or one per query.
            temperature: tau >= 0: explanations, latents, values and path together, to the power 1 / tau; 0: the best.

        Raises:
            ImpossibleEvidenceError: Z = 0.
        """
        shape = torch.Size(sample_shape)
        checked_temperature(temperature)
        values = self._draw(choosing_semiring(temperature), shape.numel(), generator)
        return values.reshape(*shape, *self.batch_shape, *self.event_shape)

    @property
    def mode(self) -> Tensor:
        """The values of the most probable explanation that is accepted, int64 (B, D): over latents and values together.

        Raises:
            ImpossibleEvidenceError: Z = 0.
        """
        return self._draw(MaxSemiring(), 1, None)

    @torch.no_grad()
    def sample_latents(
        self,
        num_samples: int = 1,
        *,
        generator: Source = None,
        temperature: float = 1.0,
    ) -> ConstrainedLatentChoice:
        """Draw the circuit's latents and the automaton's path from their posterior, with the variables summed out.

        Given both, the variables are independent, and whatever the path allows is accepted.

        Args:
            num_samples: S >= 1, draws per query: S * B columns, all queries of the first draw first.
            generator: on the circuit's device, or one per query.
            temperature: tau >= 0: drawn from the posterior to the power 1 / tau; 0 takes the best.

        Raises:
            ImpossibleEvidenceError: Z = 0.
        """
        checked_temperature(temperature)
        return self._choose(LogSemiring(), choosing_semiring(temperature), num_samples, generator)

    @torch.no_grad()
    def best_latents(self) -> ConstrainedLatentChoice:
        """Return the most probable latents and path, with the variables summed out, as B columns.

        Raises:
            ImpossibleEvidenceError: Z = 0.
        """
        return self._choose(LogSemiring(), MaxSemiring(), 1, None)

    def entropy(self) -> Tensor:
        """Refuse: the entropy of what a constraint leaves is intractable in general.

        Raises:
            PropertyError: always; names an estimate.
        """
        raise PropertyError(
            "entropy: under a constraint it is intractable in general; estimate it with "
            "-dist.log_prob(dist.sample([1000])).mean(0)"
        )

    @property
    @own_precision
    def mean(self) -> Tensor:
        """The mean of every variable's value, taken as a number: (B, D)."""
        return self.marginal_probs @ self._numbers

    @property
    @own_precision
    def variance(self) -> Tensor:
        """The variance of every variable's value, taken as a number: (B, D)."""
        probs = self.marginal_probs
        return probs @ self._numbers.square() - (probs @ self._numbers).square()

    @property
    def _numbers(self) -> Tensor:
        return torch.arange(max(self.pc.circuit.num_categories), dtype=self.pc.dtype, device=self.pc.device)

    @property
    def _evidence(self) -> Evidence:
        assert self.evidence is not None
        return self.evidence

    def _chain(
        self, of_values: ChoosingSemiring, semiring: ChoosingSemiring, question: Question, index: Tensor | None = None
    ) -> Chain:
        """Set up the pass, for the queries ``index``; backwards where the circuit splits off the last variable."""
        start, accept, arcs = self._log_start, self._log_accept, self._arcs
        if index is not None:
            start, accept = start[index], accept[index]
        if self._order[0] > self._order[-1]:
            start, accept, arcs = accept, start, arcs.reversed()
        vectors = ArcSemiring(semiring, self._order, arcs)
        return Chain(question, vectors, self._by_label(of_values, vectors, question, index), start, accept)

    @own_precision
    def _log_z(self, evidence: Evidence, index: Tensor | None = None, weights: CircuitWeights | None = None) -> Tensor:
        question = Question(self.pc, evidence, weights or self._weights)
        return self._chain(LogSemiring(), LogSemiring(), question, index).log_z()

    def _by_label(
        self, semiring: ChoosingSemiring, vectors: ArcSemiring, question: Question, index: Tensor | None
    ) -> list[Tensor]:
        """Return the log-values of all input units by label, per input layer (F, K, B, M)."""
        arcs, evidence, weights = self._arcs, question.evidence, question.weights
        num_classes = arcs.log_label.shape[1]
        by_class = class_leaves(self.pc, semiring, evidence, arcs.classes, num_classes, weights)
        leaves = [_by_label(arcs.log_label, values, semiring) for values in by_class]
        if self._reads is not None:
            reads = self._reads if index is None else self._reads[index]
            plain = Question(self.pc, replace(evidence, reference=None), weights).inputs(semiring)
            for position, layer in enumerate(self.pc.input_layers):
                is_read = reads[:, layer.variables].t()[:, None, :, None]  # (F, 1, B, 1)
                idle = plain[position].expand(leaves[position].shape[:3]).unsqueeze(-1)
                both = leaves[position].masked_fill(~is_read, -torch.inf), idle.masked_fill(is_read, -torch.inf)
                leaves[position] = torch.cat(both, -1)
        if evidence.reference is None:
            return leaves
        divisors = Question(self.pc, evidence.reference, weights).inputs(LogSemiring())
        return [divided(vectors, *pair) for pair in zip(leaves, divisors, strict=True)]

    @own_precision
    def _choose(
        self,
        of_values: ChoosingSemiring,
        semiring: ChoosingSemiring,
        num_samples: int,
        generator: Source,
    ) -> ConstrainedLatentChoice:
        """Choose latents and paths; ``of_values`` says whether the variables are summed or maximised out."""
        question = Question(self.pc, self._explicit, self._weights)
        chain = self._chain(of_values, semiring, question)
        log_score, found = chain.climb()
        self._possible(log_score)
        choices = chain.choose(found, num_samples, generator)
        return ConstrainedLatentChoice(
            self.pc,
            choices.units,
            choices.query,
            self._weights,
            choices.labels,
            self._arcs.classes,
            self._arcs.log_label,
        )

    @own_precision
    @torch.no_grad()
    def _draw(self, semiring: ChoosingSemiring, num_samples: int, generator: Source) -> Tensor:
        choice = self._choose(semiring, semiring, num_samples, generator)
        num_columns = len(choice.query)
        per_pass = self._evidence.batch_size if self._weights.batch_size > 1 else max(1, num_columns)
        drawn = []
        for columns in torch.arange(num_columns, device=self.pc.device).split(per_pass):
            given = replace(self._explicit, reference=None).rows(choice.query[columns])
            assert given.log_factors is not None
            factors = given.log_factors.to(self.pc.dtype)
            factors = factors + choice.log_path(given.values, columns, factors.shape[-1])
            given = given.with_factors(factors, given.values, given.missing)
            units = [reached[:, columns] for reached in choice.units]
            part = Choice(units, torch.arange(len(columns), device=self.pc.device))
            source = generator.at(int(columns[0])) if isinstance(generator, RowGenerators) else generator
            drawn.append(Question(self.pc, given, self._weights).values_of(semiring, part, source))
        return torch.cat(drawn)

    @staticmethod
    def _possible(log_z: Tensor) -> Tensor:
        impossible = (log_z == -torch.inf).nonzero().flatten().tolist()
        if impossible:
            raise ImpossibleEvidenceError(
                f"evidence, automaton: nothing that the automaton accepts is possible for {len(impossible)} of "
                f"{len(log_z)} queries (the first is query {impossible[0]}); allow more values, or another start or end"
            )
        return log_z

    def __repr__(self) -> str:
        return f"ConstrainedDistribution({self.pc.circuit}, {self.automaton}, batch_shape={tuple(self.batch_shape)})"


def _by_label(log_label: Tensor, by_class: Tensor, semiring: ChoosingSemiring) -> Tensor:
    """Add up the classes that labels (M, K) read: (F, K, B, classes) to (F, K, B, M)."""
    columns = by_class.flatten(0, 2).t().unsqueeze(0)
    if isinstance(semiring, MaxSemiring):
        summed = semiring.contract(log_label.unsqueeze(0), columns)[0]
    else:
        tau = temperature_of(semiring)
        summed = log_matmul(log_label.unsqueeze(0) / tau, columns / tau)[0] * tau
    return summed.t().unflatten(0, by_class.shape[:3])


def _ends(name: str, given: Tensor | None, own: Tensor, batch_size: int) -> Tensor:
    """Return log-weights of the automaton's states, (B, S)."""
    if given is None:
        return own.expand(batch_size, -1)
    shape = (batch_size, len(own))
    if not isinstance(given, Tensor) or tuple(given.shape) not in (shape, shape[1:]):
        got: Any = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(f"{name}: expected a tensor of shape {shape} or {shape[1:]}, got {got}")
    if given.dtype == torch.bool:
        given = log_indicator(given, own.dtype)
    if not given.is_floating_point() or not bool((given < torch.inf).all()):
        raise ArgumentError(f"{name}: expected bool, or log-weights below +inf, got {given.dtype} with NaN or +inf")
    return given.to(own.device, own.dtype).expand(shape)


def _checked_reads(reads: Tensor | None, evidence: Evidence) -> Tensor | None:
    if reads is None:
        return None
    shape = (evidence.batch_size, evidence.num_vars)
    if not isinstance(reads, Tensor) or reads.dtype != torch.bool or tuple(reads.shape) not in (shape, shape[1:]):
        got: Any = f"{reads.dtype} {tuple(reads.shape)}" if isinstance(reads, Tensor) else type(reads).__name__
        raise ArgumentError(f"reads: expected bool of shape {shape} or {shape[1:]}, got {got}")
    return None if bool(reads.all()) else reads.expand(shape)
