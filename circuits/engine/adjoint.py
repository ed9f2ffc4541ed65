"""The upward pass in the log semiring as one differentiable function, with the explicit adjoint of every layer.

Written out, because automatic differentiation would materialise one gradient per use of a tied weight; here all of them
are accumulated by the GEMMs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.chains import Chain, Scan
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.precision import own_precision

if TYPE_CHECKING:
    from circuits.engine.question import Question

_LOG = LogSemiring()


class Gradients:
    """Gradients of the layers' outputs, (F, K, B) each, that add up; nothing is copied until a second one arrives."""

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int) -> None:
        self._sizes = sizes
        self._batch_size = batch_size
        self._values: dict[int, Tensor] = {}
        self._owned: set[int] = set()

    def pop(self, layer: int) -> Tensor | None:
        """Return the gradient of a layer's output and forget it; None if nothing was added."""
        return self._values.pop(layer, None)

    def of_first(self, num_layers: int) -> list[Tensor | None]:
        """Return the gradients of the first layers' outputs."""
        return [self._values.get(layer) for layer in range(num_layers)]

    def add(self, layer: int, nodes: slice | Tensor, grad: Tensor) -> None:
        """Add ``grad`` to that of some nodes of a layer."""
        current = self._values.get(layer)
        num_nodes, num_units = self._sizes[layer]
        if isinstance(nodes, slice) and nodes == slice(0, num_nodes, 1):
            self._values[layer] = grad if current is None else current + grad
            if current is not None:
                self._owned.add(layer)
            return
        if current is None:
            current = grad.new_zeros(num_nodes, num_units, self._batch_size)
        elif layer not in self._owned:
            current = current.clone()
        self._owned.add(layer)
        self._values[layer] = current
        if isinstance(nodes, slice):
            current[nodes] += grad
        else:
            current.index_add_(0, nodes, grad)


class Flows:
    """Gradient with respect to the log-weights of one bank, (P, O, I), gathered over the layers that use it."""

    def __init__(self, bank: Tensor) -> None:
        self.linear = torch.zeros_like(bank)
        """Gradient with respect to the linear weights."""
        self.extra: Tensor | None = None
        """Gradient that is already with respect to the log-weights."""

    def total(self, linear_weights: Tensor) -> Tensor:
        """Return ``w * d/dw`` plus the rest: the gradient with respect to the log-weights."""
        flows = self.linear.mul_(linear_weights)
        return flows if self.extra is None else flows.add_(self.extra)


class LogRoot(torch.autograd.Function):
    """From a question, its input layers' values, its sum banks' log-weights and its latents' factors to (R, B)."""

    @staticmethod
    def forward(ctx: Any, question: Question, *tensors: Tensor) -> Tensor:
        """Evaluate all layers, and keep of each what its adjoint needs."""
        ctx.question, ctx.saved, ctx.num_inputs = question, {}, len(question.pc.input_layers)
        ctx.save_for_backward(*tensors)
        return question.top_of(question.evaluated(_LOG, tensors[: ctx.num_inputs], scans=True, saved=ctx.saved))

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Send the root's gradient down through all layers."""
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(ctx, grad)
        question: Question = ctx.question
        pc, own, latents = question.pc, question.weights.own, question.latents
        needed = ctx.needs_input_grad[1 + ctx.num_inputs :]
        flows = {name: Flows(own[name].log) for name, is_needed in zip(pc.sum_banks, needed, strict=False) if is_needed}
        descent = _descend(question, ctx.saved, grad, flows)
        gradients, latent_grads = descent.inputs, descent.layers
        for chain, grads in descent.chains if latents else ():
            latent_grads.update(zip(chain.positions, grads.split(1), strict=True))
        return (
            None,
            *gradients.of_first(ctx.num_inputs),
            *(flows[name].total(own[name].linear) if name in flows else None for name in pc.sum_banks),
            *(latent_grads[at].index_select(0, latents[at].rows) if at in latent_grads else None for at in latents),
        )


def latent_gradients(question: Question) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the root's log-values, (R, B), and ``d log Z / d log f`` of factors f on what sum nodes mix, by layer.

    They are those of the layers of ``question.latents``, (F, I, B), as far as they are used, and of chains: of all sums
    by the layer of the first one, (T, K, B), unless evaluated layer by layer. No weights are given at run time.
    """
    saved = dict[int, Any]()
    root = question.top_of(question.evaluated(_LOG, question.inputs(_LOG), scans=True, saved=saved))
    mixed = root if question.class_factors is None else root + question.class_factors
    descent = _descend(question, saved, mixed.softmax(0), {})
    return root, descent.layers | {chain.positions[0]: grads for chain, grads in descent.chains}


class _Descent(NamedTuple):
    """Gradients at the end of a pass down."""

    inputs: Gradients
    layers: dict[int, Tensor]
    """Of factors on what sums mix, (F, I, B): of layers of ``question.latents`` and in chains."""
    chains: list[tuple[Chain, Tensor]]
    """Those of chains that were evaluated as one, (T, K, B)."""


def _descend(question: Question, saved: Mapping[int, Any], grad: Tensor, flows: Mapping[str, Flows]) -> _Descent:
    """Send the root's gradient, (R, B), down through all layers."""
    pc = question.pc
    found = _Descent(Gradients(pc.layer_sizes, grad.shape[1]), {}, [])
    tops = grad.split([pc.layer_sizes[layer][1] for layer, _ in question.tops])
    for (at, row), part in zip(question.tops, tops, strict=True):
        found.inputs.add(at, slice(row, row + 1, 1), part.unsqueeze(0))
    for step in reversed(pc.schedule):
        scan, chain = saved.get(step.position), step.chain
        if not isinstance(scan, Scan) or chain is None:
            for position, layer in reversed(step.layers):
                grads = _send_down(question, saved, position, layer, found.inputs, flows)
                if grads is not None and (chain is not None or position in question.latents):
                    found.layers[position] = grads
            continue
        incoming = found.inputs.pop(step.position)
        if incoming is not None:
            flow = flows[chain.bank].linear if chain.bank in flows else None
            grads = chain.adjoint(incoming[0], scan, question.weights.own[chain.bank], question.silent, flow)
            chain.send(grads, found.inputs)
            found.chains.append((chain, grads))
    return found


def _send_down(
    question: Question,
    saved: Mapping[int, Any],
    position: int,
    layer: ProductLayer | SumLayer,
    gradients: Gradients,
    flows: Mapping[str, Flows],
) -> Tensor | None:
    """Send the gradient of one layer's output to its children and its weights; return that of what sums mix."""
    incoming = gradients.pop(position)
    if incoming is None:
        return None
    if isinstance(layer, ProductLayer):
        layer.adjoint(incoming, gradients)
        return None
    if position in question.silent:
        incoming = incoming.masked_fill(question.silent[position], 0.0)
    bank = layer.parameter_rows.bank
    return layer.adjoint(incoming, saved[position], question.weights.own[bank], gradients, flows.get(bank))


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Run the pass once more with operations that autograd can differentiate twice."""
    question: Question = ctx.question
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) for _ in range(ctx.num_inputs)]
    own = {name: question.weights.own[name].with_log(next(tensors)) for name in question.pc.sum_banks}
    latents = {position: replace(factors, log=next(tensors)) for position, factors in question.latents.items()}
    root = question.replayed(inputs, question.weights.with_own(own), latents)
    wanted = [t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True) if needed]
    grads = iter(torch.autograd.grad(root, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[1:])
