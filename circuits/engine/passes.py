"""The passes over a compiled circuit: upward in a semiring, and its adjoint in the log semiring.

The adjoint gives all gradients at once: posterior marginals and expected flows (Darwiche 2003). The other way downward,
the choice of one child per reached sum unit, is in :mod:`circuits.engine.choices`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.engine.addressing import Gradients
from circuits.engine.conditioning import Conditions, LatentFactors, LayerValues, conditions_of
from circuits.engine.external import ExternalWeights
from circuits.engine.layers import Flows, ProductLayer, Weights
from circuits.engine.semirings import LogSemiring, Semiring
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.precision import own_precision

if TYPE_CHECKING:
    from circuits.engine.compile import CompiledCircuit
    from circuits.symbolic import Circuit


class Banks(dict[str, Weights]):
    """The weights that one pass uses: those of every bank by name, and external ones by layer."""

    def __init__(self, weights: Mapping[str, Weights], external: Mapping[int, ExternalWeights] | None = None) -> None:
        super().__init__(weights)
        self.external: Mapping[int, Any] = external or {}
        """Of sum layers :class:`~circuits.engine.external.GivenSums`, of input layers ``GivenInputs``."""

    @property
    def batch_size(self) -> int:
        """B of the external weights; 1 when all queries share them."""
        return max([1, *(given.batch_size for given in self.external.values())])

    def tensors(self) -> list[Tensor]:
        """Return all log-weights."""
        return [*(bank.log for bank in self.values()), *(t for given in self.external.values() for t in given.tensors)]

    def of_queries(self, index: Tensor) -> Banks:
        """Return the weights of some queries, int64 (m,); they may come more than once."""
        return Banks(self, {layer: given.of_queries(index) for layer, given in self.external.items()})

    def detached(self, *, requires_grad: bool = False) -> Banks:
        """Return the same weights without their history, the banks as new leaves of automatic differentiation."""
        banks = {name: bank.with_log(bank.log.detach().requires_grad_(requires_grad)) for name, bank in self.items()}
        return Banks(banks, {layer: given.detached() for layer, given in self.external.items()})


@own_precision
def leaves(pc: CompiledCircuit, semiring: Semiring, evidence: Evidence, banks: Banks) -> LayerValues:
    """Evaluate the input layers: one value (F, K, B, *E) per input layer, and keep the conditions with them.

    Raises:
        ArgumentError: the batch sizes of evidence and external weights differ, or latents or classes do not fit.
    """
    if banks.batch_size not in (1, evidence.batch_size):
        raise ArgumentError(
            f"weights: they are for a batch of {banks.batch_size} queries, the evidence has {evidence.batch_size}; "
            "repeat the evidence or give weights without a batch dimension"
        )
    values: list[Any] = []
    for position, layer in enumerate(pc.input_layers):
        external = banks.external.get(position)
        own = None
        if external is None or not external.is_everywhere:
            own = layer(semiring, evidence, banks[layer.parameter_rows.bank])
        values.append(own if external is None else external.values(semiring, evidence, layer.variables, own))
    if evidence.reference is not None:
        divisors = leaves(pc, LogSemiring(), evidence.reference, banks)
        values = [divided(semiring, value, divisor) for value, divisor in zip(values, divisors, strict=True)]
    return LayerValues(values, pc.conditions(evidence))


def divided(semiring: Semiring, value: Tensor, log_divisor: Tensor) -> Tensor:
    """Divide values of input units, (F, K, B, *E), by exp(log_divisor), (F, K, B or less); by 1 where that is 0.

    Copies of a batch that follow each other share its divisors.
    """
    log_divisor = log_divisor.masked_fill(log_divisor == -torch.inf, 0.0)
    if log_divisor.shape[2] < value.shape[2]:
        log_divisor = log_divisor.repeat(1, 1, value.shape[2] // log_divisor.shape[2])
    return semiring.times(value, semiring.lift(-log_divisor))


def silent_sums(pc: CompiledCircuit, is_silent: Sequence[Tensor], conditions: Conditions, banks: Banks) -> Conditions:
    """Return the conditions with the sum nodes on whose whole scope nothing is known.

    Their weights sum to 1, so each of their units is the constant 1, whatever its weights: nothing is learnt from it,
    and in the max semiring no explanation of what nobody asked about is chosen. So learning counts no flow there
    (without this, padding would be counted with the present weights as its expectation, and slow EM down).

    Args:
        pc: the circuit.
        is_silent: of which nodes of each input layer nothing is known, bool (F, 1, B).
        conditions: on latents and classes; a latent with factors is known.
        banks: external weights that do not sum to 1 are no constant.
    """
    outputs: list[Tensor | None] = []
    for position, silent in enumerate(is_silent):
        external = banks.external.get(position)
        outputs.append(silent if external is None else _heard(silent, external.scaled_rows))
    by_layer = {}
    for position, layer in enumerate(pc.inner_layers, start=len(outputs)):
        if isinstance(layer, ProductLayer):
            outputs.append(layer.all_of(outputs))
            continue
        silent = layer.all_of(outputs)
        external = banks.external.get(position)
        if external is not None:
            silent = _heard(silent, external.scaled_rows)
        if position in conditions.latents:
            factors = conditions.latents[position]  # those that are 0 throughout say nothing
            is_heard = (factors.log != 0).any(1, keepdim=True)
            silent = silent.index_copy(0, factors.rows, silent.index_select(0, factors.rows) & ~is_heard)
        outputs.append(silent)
        by_layer[position] = silent
    return replace(conditions, silent=by_layer)


@own_precision
def heard_leaves(pc: CompiledCircuit, semiring: Semiring, evidence: Evidence, banks: Banks) -> LayerValues:
    """Evaluate the input layers so that sum nodes on whose variables nothing is known are the constant 1.

    See :func:`silent_sums`: no flow is counted there, and no choice there counts.
    """
    nothing = evidence.says_nothing(pc.num_categories)
    if not bool(nothing.any()):
        return leaves(pc, semiring, evidence, banks)
    values = leaves(pc, semiring, evidence.without(nothing), banks)
    return LayerValues(values, silent_sums(pc, silent_inputs(pc, nothing), values.conditions, banks))


def silent_inputs(pc: CompiledCircuit, silent: Tensor) -> list[Tensor]:
    """Return of which nodes of every input layer nothing is known, (F, 1, B), from that of the variables, (B, D)."""
    return [silent.index_select(1, layer.variables).t().unsqueeze(1) for layer in pc.input_layers]


def _heard(silent: Tensor, rows: Tensor) -> Tensor:
    return silent.index_fill(0, rows, False)


def _silenced(values: Tensor, silent: Tensor | None, semiring: Semiring) -> Tensor:
    """Put the constant 1 of a semiring where sum nodes are silent; values are (F, K, B, *E), ``silent`` (F, 1, B)."""
    if silent is None:
        return values
    one = semiring.lift(torch.zeros(1, 1, 1, dtype=values.dtype, device=values.device))
    return torch.where(silent.reshape(silent.shape + (1,) * (values.dim() - 3)), one, values)


@own_precision
def upward(
    pc: CompiledCircuit,
    semiring: Semiring,
    leaf_values: Sequence[Tensor],
    banks: Banks,
    *,
    keep: bool = False,
    per_class: bool = False,
) -> list[Tensor | None]:
    """Evaluate all layers; with ``keep`` every layer's output stays, else only the root's (the last one).

    Class evidence adds one output at the end: the root's units mixed by the classes' factors, (1, 1, B, *E).

    Raises:
        PropertyError: the root has a unit per class and the evidence does not name the class, unless ``per_class``.
    """
    conditions = conditions_of(leaf_values)
    if pc.circuit.num_classes is not None and conditions.class_factors is None and not per_class:
        raise class_needed(pc)
    outputs = LayerValues([*leaf_values, *[None] * len(pc.inner_layers)], conditions)
    for position, layer in enumerate(pc.inner_layers, start=len(leaf_values)):
        if isinstance(layer, ProductLayer):
            outputs[position] = layer(semiring, outputs)
        else:
            weights = banks[layer.parameter_rows.bank]
            values = layer(semiring, outputs, weights, banks.external.get(position))
            outputs[position] = _silenced(values, conditions.silent.get(position), semiring)
        if not keep:
            for spent in pc.last_uses[position]:
                outputs[spent] = None
    if conditions.class_factors is not None:
        outputs.append(_mix_classes(semiring, outputs[-1], conditions.class_factors))
    return outputs


def class_needed(pc: CompiledCircuit) -> PropertyError:
    """Return the error of a query that needs one distribution on a circuit that has one per class."""
    return PropertyError(
        f"this query needs one distribution, and the root {pc.circuit.root} has one per class; say which with "
        "evidence.with_class(labels), or mix them with evidence.with_class_prior(log_prior)"
    )


@own_precision
def log_root(pc: CompiledCircuit, leaf_values: Sequence[Tensor], banks: Banks) -> Tensor:
    """Return the root's log-value, differentiable in the leaves, the conditions, and the log-weights of all banks.

    Returns:
        (B,); (B, R) of a circuit with R classes, unless the class is part of the evidence.
    """
    conditions = conditions_of(leaf_values)
    log_weights = [banks[name].log for name in pc.sum_banks]
    latents = [factors.log for factors in conditions.latents.values()]
    tensors = (*leaf_values, *log_weights, *latents)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not needs_grad or torch.compiler.is_compiling() or banks.external:
        root = upward(pc, LogSemiring(), leaf_values, banks, per_class=True)[-1]
        assert root is not None
        return root[0].t() if conditions.class_factors is None and pc.circuit.num_classes else root[0, 0]
    units = _LogRoot.apply(pc, banks, conditions, *tensors)
    if conditions.class_factors is not None:
        return _mix_classes(LogSemiring(), units.unsqueeze(0), conditions.class_factors)[0, 0]
    return units.t() if pc.circuit.num_classes else units[0]


def _mix_classes(semiring: Semiring, root: Tensor, class_factors: Tensor) -> Tensor:
    """Add up the root's units, (1, R, B, *E), times the classes' factors, (R, B): (1, 1, B, *E)."""
    weighted = semiring.times(root, semiring.lift(class_factors.unsqueeze(0)))
    return semiring.contract(class_factors.new_zeros(1, 1, len(class_factors)), weighted)


def one_root_needed(who: str, circuit: Circuit) -> PropertyError:
    """Return the error of what takes circuits with one root unit only, for one that has a unit per class."""
    return PropertyError(
        f"{who} needs a circuit with one root unit, and {circuit} has one per class; "
        "ct.transforms.condition(pc, evidence.with_class(label)) is that of one class"
    )


class _LogRoot(torch.autograd.Function):
    """The upward pass in the log semiring with the explicit adjoint of every layer.

    Written out, because automatic differentiation would materialise one gradient per use of a tied weight; here all of
    them are accumulated by the GEMMs themselves.
    """

    @staticmethod
    def forward(ctx: Any, pc: CompiledCircuit, banks: Banks, conditions: Conditions, *tensors: Tensor) -> Tensor:
        num_leaves = len(pc.input_layers)
        outputs = LayerValues([*tensors[:num_leaves], *[None] * len(pc.inner_layers)], conditions)
        ctx.saved = {}
        for position, layer in enumerate(pc.inner_layers, start=num_leaves):
            if isinstance(layer, ProductLayer):
                outputs[position] = layer(LogSemiring(), outputs)
            else:
                values, ctx.saved[position] = layer.forward_recorded(outputs, banks[layer.parameter_rows.bank])
                outputs[position] = _silenced(values, conditions.silent.get(position), LogSemiring())
            for spent in pc.last_uses[position]:
                outputs[spent] = None
        ctx.pc, ctx.num_leaves, ctx.banks, ctx.conditions = pc, num_leaves, banks, conditions
        ctx.save_for_backward(*tensors)
        root = outputs[-1]
        assert root is not None
        return root[0].clone() if root is tensors[0] else root[0]

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, None, None, *_LogRoot._differentiable_gradients(ctx, grad)
        pc: CompiledCircuit = ctx.pc
        needed = ctx.needs_input_grad[3:]
        flows = {
            name: Flows(ctx.banks[name].log) if needed[ctx.num_leaves + i] else None
            for i, name in enumerate(pc.sum_banks)
        }
        gradients = Gradients(pc.layer_sizes, grad.shape[1])
        gradients.add(len(pc.layer_sizes) - 1, slice(0, 1, 1), grad.unsqueeze(0))
        latents: Mapping[int, LatentFactors] = ctx.conditions.latents
        latent_grads: dict[int, Tensor] = {}
        for position in reversed(range(ctx.num_leaves, len(pc.layer_sizes))):
            layer = pc.inner_layers[position - ctx.num_leaves]
            incoming = gradients.pop(position)
            if incoming is None:
                continue
            if isinstance(layer, ProductLayer):
                layer.adjoint(incoming, gradients)
            else:
                if position in ctx.conditions.silent:
                    incoming = incoming.masked_fill(ctx.conditions.silent[position], 0.0)
                bank = layer.parameter_rows.bank
                grad_x = layer.adjoint(incoming, ctx.saved[position], ctx.banks[bank], gradients, flows[bank])
                if position in latents:
                    latent_grads[position] = grad_x.index_select(0, latents[position].rows)
        leaf_grads = [gradients.pop(position) for position in range(ctx.num_leaves)]
        bank_grads = []
        for name in pc.sum_banks:
            flow = flows[name]
            bank_grads.append(None if flow is None else flow.total(ctx.banks[name].linear))
        return None, None, None, *leaf_grads, *bank_grads, *(latent_grads.get(position) for position in latents)

    @staticmethod
    def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the pass once more with operations that autograd can differentiate twice."""
        tensors = ctx.saved_tensors
        leaf_values, others = tensors[: ctx.num_leaves], tensors[ctx.num_leaves :]
        logs = dict(zip(ctx.pc.sum_banks, others, strict=False))
        banks = Banks({name: ctx.banks[name].with_log(log) for name, log in logs.items()})
        latents = {
            position: replace(factors, log=log)
            for (position, factors), log in zip(ctx.conditions.latents.items(), others[len(logs) :], strict=True)
        }
        values = LayerValues(leaf_values, Conditions(latents, silent=ctx.conditions.silent))
        root = upward(ctx.pc, LogSemiring(), values, banks, per_class=True)[-1]
        assert root is not None
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True) if needed]
        grads = iter(torch.autograd.grad(root[0], wanted, grad, create_graph=True, allow_unused=True))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[3:])


@own_precision
def factor_gradients(
    log_z_of: Callable[[Tensor, Banks], Tensor], factors: Tensor, banks: Banks, *, also: Sequence[Tensor] = ()
) -> Tensor:
    """Return ``d log Z / d log e``: the posterior marginals, in the shape of the log-factors.

    The result is itself differentiable if gradients are enabled and factors or weights require them.

    Args:
        log_z_of: log Z, (B,), of given log-factors and weights.
        factors: log-factors of the evidence.
        banks: the circuit's weights.
        also: other tensors that ``log_z_of`` depends on, and that the result is to be differentiable in.
    """
    tensors = (factors, *banks.tensors(), *also)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.inference_mode(False), torch.enable_grad():
        if differentiable:
            factors = factors.clone() if factors.requires_grad else factors.detach().requires_grad_()
        else:
            factors = factors.detach().clone().requires_grad_()
            banks = banks.detached()
        (gradient,) = torch.autograd.grad(log_z_of(factors, banks).sum(), factors, create_graph=differentiable)
    return gradient
