"""A question: a circuit, evidence for B queries, and weights; and the passes that answer it.

Every query is the upward pass in some semiring, its gradient, or a choice on the way down. In the log semiring the
adjoint of the pass gives all gradients at once: posterior marginals and expected flows (Darwiche 2003).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, Semiring, divided
from circuits.arguments import checked_possible
from circuits.engine import adjoint, choices
from circuits.engine.choices import Choice, Climb
from circuits.engine.gathering import Address, LayerValues
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.engine.weights import CircuitWeights, check_compiled, check_kinds
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.randomness import RowGenerators, Source
from circuits.symbolic import Sum
from circuits.weights.latents import LatentFactors, class_factors, class_needed, latents_by_layer

if TYPE_CHECKING:
    from circuits.engine.compile import CompiledCircuit

_LOG = LogSemiring()


class Question:
    """Evidence for B queries on a circuit with certain weights: checked once, answered by passes over its layers.

    Args:
        pc: the circuit.
        evidence: for B queries; None: it says nothing, for as many queries as there are weights for.
        weights: of ``pc.weights(...)``; None: the circuit's own, as they are now.

    Raises:
        ArgumentError: an argument of another kind, evidence that does not fit the circuit, or batch sizes that differ.

    Attributes:
        pc: the circuit.
        evidence: on the variables.
        weights: that all passes use.
        latents: factors on the children of sum nodes, by layer.
        class_factors: log-factors on the root's units, (R, B); None: the circuit has no classes, or they stay apart.
        silent: by sum layer, which nodes are the constant 1, bool (F, 1, B); see :meth:`silenced`.
        tops: where the nodes are whose units are asked for: the root; ``schedule`` are the steps up to them.
    """

    def __init__(
        self, pc: CompiledCircuit, evidence: Evidence | None = None, weights: CircuitWeights | None = None
    ) -> None:
        check_compiled(pc)
        check_kinds(evidence, weights)
        self.pc = pc
        self.weights = CircuitWeights(pc.own_weights()) if weights is None else weights
        batch_size = self.weights.batch_size if self.weights.given else 1
        if evidence is None:
            evidence = Evidence.nothing(batch_size, pc.circuit.num_vars, pc.device)
        elif not torch.compiler.is_compiling():
            evidence.check(pc.num_categories)
        if batch_size not in (1, evidence.batch_size):
            raise ArgumentError(
                f"weights: they are for a batch of {batch_size} queries, the evidence has {evidence.batch_size}; "
                "repeat the evidence or give weights without a batch dimension"
            )
        self.evidence = evidence
        self.latents: Mapping[int, LatentFactors] = {}
        self.class_factors = class_factors(evidence.classes, pc.circuit.num_classes, pc.device, pc.dtype)
        self.silent: Mapping[int, Tensor] = {}
        self.tops: Sequence[Address] = [(len(pc.layer_sizes) - 1, 0)]
        self.schedule = pc.schedule
        self._inputs: Sequence[Tensor] | None = None
        if evidence.latents:
            self.latents = self.with_latents({}).latents

    def inputs(self, semiring: Semiring) -> Sequence[Tensor]:
        """Return the values of all input units under the evidence: per input layer (F, K, B, *E)."""
        if self._inputs is not None:
            return self._inputs
        values = []
        for position, layer in enumerate(self.pc.input_layers):
            own, given = self.weights.own[layer.parameter_rows.bank], self.weights.given.get(position)
            if given is None:
                values.append(layer(semiring, self.evidence, own))
            else:
                value = None if given.is_everywhere else layer(semiring, self.evidence, own)
                values.append(given.values(semiring, self.evidence, layer.variables, value))
        if self.evidence.reference is None:
            return values
        divisors = self._with(evidence=self.evidence.reference).inputs(_LOG)
        return [divided(semiring, value, divisor) for value, divisor in zip(values, divisors, strict=True)]

    def with_inputs(self, values: Sequence[Tensor]) -> Question:
        """Return the question with given values of the input units, per input layer (F, K, B, *E)."""
        return self._with(_inputs=list(values))

    def with_latents(self, further: Mapping[Sum, Tensor]) -> Question:
        """Return the question with the evidence's factors on latents, times ``further`` ones, (B, I) each."""
        pc, given = self.pc, [(self.pc.sum_node(key), log) for key, log in (self.evidence.latents or {}).items()]
        given = [(node, log.to(pc.device, pc.dtype) + further.get(node, 0.0)) for node, log in given]
        given += [(node, log) for node, log in further.items() if node not in dict(given)]
        places = [(node, pc.address(node), log) for node, log in given]
        return self._with(latents=latents_by_layer(places, self.evidence.batch_size, next(iter(pc.bank.values()))))

    def silenced(self, silent_inputs: Sequence[Tensor] | None = None) -> Question:
        """Return the question with sum nodes on whose whole scope nothing is known as the constant 1.

        Their weights sum to 1, so each of their units is 1, whatever its weights: nothing is learnt from it, and in the
        max semiring no explanation of what nobody asked about is chosen. So learning counts no flow there (without
        this, padding would be counted with the present weights as its expectation, and slow EM down).

        Args:
            silent_inputs: of which nodes of each input layer nothing is known, bool (F, 1, B); None: those on whose
                variables the evidence says nothing.
        """
        pc = self.pc
        if silent_inputs is None:
            nothing = self.evidence.says_nothing(pc.num_categories)
            if not bool(nothing.any()):
                return self
            return self._with(evidence=self.evidence.without(nothing)).silenced(nodes_of(pc, nothing))
        values = {n: self._unless_heard(n, silent) for n, silent in enumerate(silent_inputs)}
        for step in pc.schedule:
            if step.chain is not None:
                values.update(step.chain.silent_sums(values, self._unless_heard, {*self.weights.given, *self.latents}))
                continue
            for position, layer in step.layers:
                values[position] = self._unless_heard(position, layer.all_of(values))
        return self._with(silent=values)

    def _unless_heard(self, position: int, silent: Tensor) -> Tensor:
        """Take out of the silent nodes of a layer, (F, 1, B), those with factors or weights that say something."""
        given, latents = self.weights.given.get(position), self.latents.get(position)
        if given is not None:
            silent = silent.index_fill(0, given.scaled_rows, False)
        if latents is not None:  # factors that are 0 throughout say nothing
            heard = (latents.log != 0).any(1, keepdim=True)
            silent = silent.index_copy(0, latents.rows, silent.index_select(0, latents.rows) & ~heard)
        return silent

    def levelled(self) -> tuple[Question, Tensor]:
        """Return the question :meth:`silenced`, without the factors that all values of a variable share.

        No posterior depends on these; the second value is the sum of their log-factors, (B,), that log Z lacks.
        """
        evidence, log_level = self.evidence.levelled(self.pc.num_categories)
        return self._with(evidence=evidence).silenced(), log_level

    def upward(self, semiring: Semiring) -> list[Tensor]:
        """Return the values of all layers, (F, K, B, *E) each; the last one has the root alone.

        Raises:
            PropertyError: the root has a unit per class, and the evidence does not name the class.
        """
        self.require_one_root()
        values = self.evaluated(semiring, self.inputs(semiring), keep=True)
        return [values[position] for position in range(len(values))]

    def climb(self, semiring: ChoosingSemiring) -> Climb:
        """Evaluate all layers for :meth:`choose`; raise ImpossibleEvidenceError where the root's value is -inf."""
        self.require_one_root()
        found = choices.climb(self, semiring)
        checked_possible(self.mixed(semiring, found.root))
        return found

    def root(self, semiring: Semiring) -> Tensor:
        """Return the root's value, (B, *E).

        Raises:
            PropertyError: the root has a unit per class, and the evidence does not name the class.
        """
        self.require_one_root()
        return self.mixed(semiring, self.top_of(self.evaluated(semiring, self.inputs(semiring))).unsqueeze(0))

    def mixed(self, semiring: Semiring, root: Tensor) -> Tensor:
        """Return the value of the root's units, (1, R, B, *E), added up over the classes: (B, *E)."""
        if self.class_factors is None:
            return root[0, 0]
        weighted = semiring.times(root, semiring.lift(self.class_factors.unsqueeze(0)))
        return semiring.contract(self.class_factors.new_zeros(1, 1, len(self.class_factors)), weighted)[0, 0]

    @property
    def log_z(self) -> Tensor:
        """``log Z``, (B,), differentiable in evidence and weights; (B, R) of R classes that are not named."""
        inputs = self.inputs(_LOG)
        tensors = (*inputs, *(self.weights.own[name].log for name in self.pc.sum_banks))
        tensors = (*tensors, *(factors.log for factors in self.latents.values()))
        is_eager = not torch.compiler.is_compiling()
        if is_eager and not self.weights.given and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            root = adjoint.LogRoot.apply(self, *tensors)
        else:
            root = self.top_of(self.evaluated(_LOG, inputs, scans=is_eager))
        if self.class_factors is None and self.pc.circuit.num_classes:
            return root.t()
        return self.mixed(_LOG, root.unsqueeze(0))

    def top_of(self, values: LayerValues) -> Tensor:
        """Return the values of the units that are asked for, (R, B, *E), from those of the layers."""
        return torch.cat([values[layer][row] for layer, row in self.tops])

    def choose(
        self, semiring: ChoosingSemiring, num_samples: int, generator: Source, *, found: Climb | None = None
    ) -> Choice:
        """Choose one child of every reached sum unit, for ``num_samples`` copies of the batch.

        In the log semiring it is an exact sample, in the max semiring the most probable explanation.

        Args:
            semiring: whose ``choose`` is used: a draw (log) or the best (max).
            num_samples: S, how many choices per query.
            generator: for draws.
            found: by :meth:`climb` in that semiring, where it is there already.

        Raises:
            ArgumentError: generators by row that are not one per query.
            ImpossibleEvidenceError: nothing is possible for some query.
        """
        if isinstance(generator, RowGenerators) and len(generator.seeds) != self.evidence.batch_size:
            raise ArgumentError(
                f"generator: expected {self.evidence.batch_size} seeds, one per query, got {len(generator.seeds)}"
            )
        found = self.climb(semiring) if found is None else found
        return choices.choose(self, semiring, found, num_samples, generator)

    def values_of(self, semiring: ChoosingSemiring, choice: Choice, generator: Source) -> Tensor:
        """Choose a value of every variable from the input units of a choice: (S * B, D), int64 if all are discrete."""
        return choices.values_of(self, semiring, choice, generator)

    def gradients(self, latents: Sequence[Sum] | None = None, *, allow_impossible: bool = False) -> Tensor:
        """Return ``d log Z / d log e``, the posterior marginals of variables or latents, in one pass (Darwiche 2003).

        They are differentiable if gradients are enabled and evidence or weights require them.

        Args:
            latents: sum nodes, which of whose children are used; None: the values that the evidence has factors on.
            allow_impossible: give 0 where log Z = -inf.

        Returns:
            In the shape of the evidence's factors; of latents (B, I_1 + I_2 + ...).

        Raises:
            ImpossibleEvidenceError: log Z = -inf for some query, unless that is allowed.
            PropertyError: the root has a unit per class, and the evidence does not name the class.
        """
        self.require_one_root()
        evidence = self.evidence
        others = list((evidence.latents or {}).values())
        if latents is None:
            assert evidence.log_factors is not None
            factors = evidence.log_factors

            def question_of(factors: Tensor) -> Question:
                return self._with(evidence=evidence.with_factors(factors, evidence.values, evidence.missing))

        else:
            sizes = [node.parameter_shape[1] for node in latents]
            factors = torch.zeros(evidence.batch_size, sum(sizes), dtype=self.pc.dtype, device=self.pc.device)
            others += [tensor for tensor in evidence.factors.tensors() if tensor.is_floating_point()]

            def question_of(factors: Tensor) -> Question:
                parts = dict(zip(latents, factors.split(sizes, 1), strict=True))
                return self.with_latents(parts)

        def log_z_of(factors: Tensor, weights: CircuitWeights) -> Tensor:
            log_z = question_of(factors)._with(weights=weights).log_z
            return log_z if allow_impossible else checked_possible(log_z)

        return gradient_of(log_z_of, factors, self.weights, also=others)

    def require_one_root(self) -> None:
        """Raise PropertyError if the root has a unit per class and the evidence does not name the class."""
        if self.pc.circuit.num_classes is not None and self.class_factors is None:
            raise class_needed(self.pc.circuit.root)

    def replayed(
        self, inputs: Sequence[Tensor], weights: CircuitWeights, latents: Mapping[int, LatentFactors]
    ) -> Tensor:
        """Return the log-values of the top units, (R, B), by operations that autograd can follow."""
        question = self._with(weights=weights, latents=latents)
        return question.top_of(question.evaluated(_LOG, inputs))

    def evaluated(
        self,
        semiring: Semiring,
        inputs: Sequence[Tensor],
        *,
        keep: bool = False,
        scans: bool = False,
        saved: dict[int, Any] | None = None,
    ) -> dict[int, Tensor]:
        """Return the values of the layers by position; unless ``keep``, only the root's.

        Args:
            semiring: what plus and times mean.
            inputs: the values of the input layers.
            keep: whether the values of all layers are.
            scans: whether a chain may be evaluated at once: log semiring, and of own weights no gradients by autograd.
            saved: where what :mod:`~circuits.engine.adjoint` needs is kept, by layer, with ``scans``; None: nowhere.
        """
        values, given = dict(enumerate(inputs)), self.weights.given
        for step in self.schedule:
            chain, scan = step.chain, None
            if scans and chain is not None:
                own, is_kept = self.weights.own[chain.bank], saved is not None
                scan = chain.scan(values, own, given, self.latents, self.silent, keep=is_kept)
            if scan is not None:
                values[step.position] = scan.first
                if saved is not None:
                    saved[step.position] = scan
            for position, layer in step.layers if scan is None else ():
                values[position] = self.layer_value(semiring, position, layer, values, saved)
                for spent in () if keep else self.pc.last_uses[position]:
                    del values[spent]
            for spent in step.spent if scan is not None else ():
                del values[spent]
        return values

    def layer_value(
        self,
        semiring: Semiring,
        position: int,
        layer: ProductLayer | SumLayer,
        values: LayerValues,
        saved: dict[int, Any] | None = None,
    ) -> Tensor:
        """Return the values of one layer, (F, K, B, *E), from those below; see :meth:`evaluated` for ``saved``."""
        if isinstance(layer, ProductLayer):
            return layer(semiring, values)
        own, latents = self.weights.own[layer.parameter_rows.bank], self.latents.get(position)
        if saved is None:
            out = layer(semiring, values, own, self.weights.given.get(position), latents)
        else:
            out, saved[position] = layer.forward_recorded(values, own, latents)
        if not self.silent:
            return out
        silent, one = self.silent[position], semiring.lift(out.new_zeros(1, 1, 1))
        return torch.where(silent.reshape(silent.shape + (1,) * (out.dim() - 3)), one, out)

    def _with(self, **attributes: Any) -> Question:
        changed = copy.copy(self)
        vars(changed).update(attributes)
        return changed


def gradient_of(
    log_z_of: Callable[[Tensor, CircuitWeights], Tensor],
    factors: Tensor,
    weights: CircuitWeights,
    *,
    also: Sequence[Tensor] = (),
) -> Tensor:
    """Return ``d log Z / d log e`` of a function, in the shape of the log-factors.

    The result is itself differentiable if gradients are enabled and factors or weights require them.

    Args:
        log_z_of: log Z, (B,), of given log-factors and weights.
        factors: log-factors of the evidence.
        weights: the circuit's.
        also: other tensors that ``log_z_of`` depends on, and that the result is to be differentiable in.
    """
    tensors = (factors, *weights.tensors(), *also)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.inference_mode(False), torch.enable_grad():
        if differentiable:
            factors = factors.clone() if factors.requires_grad else factors.detach().requires_grad_()
        else:
            factors, weights = factors.detach().clone().requires_grad_(), weights.detached()
        (gradient,) = torch.autograd.grad(log_z_of(factors, weights).sum(), factors, create_graph=differentiable)
    return gradient


def nodes_of(pc: CompiledCircuit, of_variables: Tensor) -> list[Tensor]:
    """Return what holds of variables, (B, D), for the nodes of every input layer: (F, 1, B)."""
    return [of_variables.index_select(1, layer.variables).t().unsqueeze(1) for layer in pc.input_layers]
