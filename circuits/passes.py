"""The two passes over a compiled circuit: upward in a semiring, and downward.

Downward comes in two kinds: the adjoint of the upward pass in the log semiring (all gradients at once: posterior
marginals and expected flows, Darwiche 2003), and the choice of one child per reached sum unit (a sample, or the most
probable explanation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.evidence import Evidence
from circuits.input_layers import InputLayer
from circuits.layers import Flows, ProductLayer, SumLayer, Weights
from circuits.rows import Gradients
from circuits.semiring import ChoosingSemiring, LogSemiring, Semiring

if TYPE_CHECKING:
    from circuits.compile import CompiledCircuit

_CHUNK = 1 << 24

Banks = dict[str, Weights]


def leaves(pc: CompiledCircuit, semiring: Semiring, evidence: Evidence, banks: Banks) -> list[Tensor]:
    """Evaluate the input layers: one value (F, K, B, *E) per input layer."""
    return [layer(semiring, evidence, banks[layer.parameter_rows.bank]) for layer in pc.input_layers]


def upward(
    pc: CompiledCircuit, semiring: Semiring, leaf_values: Sequence[Tensor], banks: Banks, *, keep: bool = False
) -> list[Tensor | None]:
    """Evaluate all layers; with ``keep`` every layer's output stays, else only the root's (the last one)."""
    outputs: list[Tensor | None] = [*leaf_values, *[None] * len(pc.inner_layers)]
    for position, layer in enumerate(pc.inner_layers, start=len(leaf_values)):
        if isinstance(layer, ProductLayer):
            outputs[position] = layer(semiring, outputs)
        else:
            outputs[position] = layer(semiring, outputs, banks[layer.parameter_rows.bank])
        if not keep:
            for spent in pc.last_uses[position]:
                outputs[spent] = None
    return outputs


def log_root(pc: CompiledCircuit, leaf_values: Sequence[Tensor], banks: Banks) -> Tensor:
    """Return the root's log-value, shape (B,), differentiable in the leaves and in the log-weights of all banks."""
    log_weights = [banks[name].log for name in pc.sum_banks]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*leaf_values, *log_weights))
    if not needs_grad or torch.compiler.is_compiling():
        root = upward(pc, LogSemiring(), leaf_values, banks)[-1]
        assert root is not None
        return root[0, 0]
    return _LogRoot.apply(pc, banks, len(leaf_values), *leaf_values, *log_weights)


class _LogRoot(torch.autograd.Function):
    """The upward pass in the log semiring with the explicit adjoint of every layer.

    Written out, because automatic differentiation would materialise one gradient per use of a tied weight; here all of
    them are accumulated by the GEMMs themselves.
    """

    @staticmethod
    def forward(ctx: Any, pc: CompiledCircuit, banks: Banks, num_leaves: int, *tensors: Tensor) -> Tensor:
        leaf_values = tensors[:num_leaves]
        outputs: list[Tensor | None] = [*leaf_values, *[None] * len(pc.inner_layers)]
        ctx.saved = {}
        for position, layer in enumerate(pc.inner_layers, start=num_leaves):
            if isinstance(layer, ProductLayer):
                outputs[position] = layer(LogSemiring(), outputs)
            else:
                outputs[position], ctx.saved[position] = layer.forward_recorded(
                    outputs, banks[layer.parameter_rows.bank]
                )
            for spent in pc.last_uses[position]:
                outputs[spent] = None
        ctx.pc, ctx.num_leaves, ctx.banks = pc, num_leaves, banks
        ctx.save_for_backward(*tensors)
        root = outputs[-1]
        assert root is not None
        return root[0, 0].clone() if root is tensors[0] else root[0, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, None, None, *_LogRoot._differentiable_gradients(ctx, grad)
        pc: CompiledCircuit = ctx.pc
        needed = ctx.needs_input_grad[3:]
        flows = {
            name: Flows(ctx.banks[name].log) if needed[ctx.num_leaves + i] else None
            for i, name in enumerate(pc.sum_banks)
        }
        gradients = Gradients(pc.layer_sizes, len(grad))
        gradients.add(len(pc.layer_sizes) - 1, slice(0, 1, 1), grad.reshape(1, 1, -1))
        for position in reversed(range(ctx.num_leaves, len(pc.layer_sizes))):
            layer = pc.inner_layers[position - ctx.num_leaves]
            incoming = gradients.pop(position)
            if incoming is None:
                continue
            if isinstance(layer, ProductLayer):
                layer.adjoint(incoming, gradients)
            else:
                bank = layer.parameter_rows.bank
                layer.adjoint(incoming, ctx.saved[position], ctx.banks[bank], gradients, flows[bank])
        leaf_grads = [gradients.pop(position) for position in range(ctx.num_leaves)]
        bank_grads = []
        for name in pc.sum_banks:
            flow = flows[name]
            bank_grads.append(None if flow is None else flow.total(ctx.banks[name].linear))
        return None, None, None, *leaf_grads, *bank_grads

    @staticmethod
    def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the pass once more with operations that autograd can differentiate twice."""
        tensors = ctx.saved_tensors
        logs = dict(zip(ctx.pc.sum_banks, tensors[ctx.num_leaves :], strict=True))
        banks = {name: Weights(log, ctx.banks[name].linear) for name, log in logs.items()}
        root = upward(ctx.pc, LogSemiring(), tensors[: ctx.num_leaves], banks)[-1]
        assert root is not None
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True) if needed]
        grads = iter(torch.autograd.grad(root[0, 0], wanted, grad, create_graph=True, allow_unused=True))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[3:])


def factor_gradients(log_z_of: Callable[[Tensor, Banks], Tensor], factors: Tensor, banks: Banks) -> Tensor:
    """Return ``d log Z / d log e``: the posterior marginals, in the shape of the log-factors.

    The result is itself differentiable if gradients are enabled and factors or weights require them.

    Args:
        log_z_of: log Z, (B,), of given log-factors and weights.
        factors: log-factors of the evidence.
        banks: the circuit's weights.
    """
    tensors = (factors, *(weights.log for weights in banks.values()))
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.inference_mode(False), torch.enable_grad():
        if differentiable:
            factors = factors.clone() if factors.requires_grad else factors.detach().requires_grad_()
        else:
            factors = factors.detach().clone().requires_grad_()
            banks = {name: Weights(weights.log.detach(), weights.linear) for name, weights in banks.items()}
        (gradient,) = torch.autograd.grad(log_z_of(factors, banks).sum(), factors, create_graph=differentiable)
    return gradient


def downward_choice(
    pc: CompiledCircuit,
    semiring: ChoosingSemiring,
    outputs: Sequence[Tensor | None],
    banks: Banks,
    num_samples: int,
    generator: torch.Generator | None,
) -> tuple[list[Tensor], Tensor]:
    """Choose one child of every reached sum unit, from the root down, for ``num_samples`` copies of the batch.

    Args:
        pc: the compiled circuit.
        semiring: whose ``choose`` is used: a draw (log) or the best (max).
        outputs: of :func:`upward` with ``keep=True`` in that semiring.
        banks: the weights that ``outputs`` were computed with.
        num_samples: S, how many choices per query.
        generator: for draws.

    Returns:
        The chosen unit of every node of each input layer, -1 where a node was not reached, a list of (F, S * B), and
        the query of each column, (S * B,).
    """
    root = outputs[-1]
    assert root is not None
    batch_size = root.shape[2]
    query = torch.arange(batch_size, device=root.device).repeat(num_samples)
    units = [torch.full((size[0], len(query)), -1, device=root.device) for size in pc.layer_sizes]
    units[-1].zero_()
    for position in reversed(range(len(pc.input_layers), len(pc.layer_sizes))):
        layer = pc.inner_layers[position - len(pc.input_layers)]
        node, column = (units[position] >= 0).nonzero(as_tuple=True)
        unit = units[position][node, column]
        if isinstance(layer, ProductLayer):
            choices = layer.child_choices(unit)
        else:
            choices = _choose_children(layer, semiring, outputs, banks, node, unit, query[column], generator)
        for slot, choice in enumerate(choices):
            _mark(units, layer.child_layer[node, slot], layer.child_row[node, slot], column, choice)
        units[position] = units[position].new_empty(0)
    return units[: len(pc.input_layers)], query


def _choose_children(
    layer: SumLayer,
    semiring: ChoosingSemiring,
    outputs: Sequence[Tensor | None],
    banks: Banks,
    node: Tensor,
    unit: Tensor,
    query: Tensor,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Choose a child unit for n reached sum units; per child slot the chosen unit, -1 where another slot was chosen."""
    children = layer.gather(outputs)
    log_weights = banks[layer.parameter_rows.bank].log
    chosen = torch.empty_like(unit)
    for part in _chunks(len(node), children.shape[1]):
        scores = children[node[part], :, query[part]] + log_weights[layer.parameter_rows.index[node[part]], unit[part]]
        chosen[part] = semiring.choose(scores, generator)
    choices = []
    for num_units in layer.child_units:
        choices.append(torch.where((chosen >= 0) & (chosen < num_units), chosen, -1))
        chosen = chosen - num_units
    return choices


def _mark(units: list[Tensor], layers: Tensor, rows: Tensor, columns: Tensor, choice: Tensor) -> None:
    """Record that the unit ``choice`` of the node at (layer, row) was reached in a column; -1: it was not."""
    for layer in layers.unique().tolist():
        here = (layers == layer) & (choice >= 0)
        units[layer][rows[here], columns[here]] = choice[here]


def _chunks(length: int, width: int) -> Iterator[slice]:
    """Cut ``length`` rows of ``width`` numbers into slices of bounded size."""
    step = max(1, _CHUNK // width)
    for start in range(0, length, step):
        yield slice(start, start + step)


def draw_values(
    pc: CompiledCircuit,
    semiring: ChoosingSemiring,
    evidence: Evidence,
    banks: Banks,
    units: Sequence[Tensor],
    query: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Choose a value of every variable from the reached input units: (S * B, D), int64 if all families are discrete."""
    dtype = torch.int64 if pc.circuit.is_discrete else pc.dtype
    values = torch.zeros(len(query), pc.circuit.num_vars, dtype=dtype, device=query.device)
    for layer, reached in zip(pc.input_layers, units, strict=True):
        assert isinstance(layer, InputLayer)
        node, column = (reached >= 0).nonzero(as_tuple=True)
        for part in _chunks(len(node), banks[layer.parameter_rows.bank].log.shape[1]):
            n, c = node[part], column[part]
            weights = banks[layer.parameter_rows.bank]
            chosen = layer.choose(semiring, evidence, weights, n, reached[n, c], query[c], generator)
            values[c, layer.variables[n]] = chosen.to(dtype)
    return values
