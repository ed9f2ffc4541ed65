"""Long chains in memory of the square root of their length: one segment after the other, and once more on the way down.

Only the vectors between segments are kept; what is inside of one is computed anew where its gradient is wanted (Grice,
Hughey and Speck 1997, "Reduced space sequence alignment"; Chen et al. 2016, "Training deep nets with sublinear memory
cost"). A segment is a circuit of its own, with the weights of the whole one, whose last sum has the next segment's
values as factors on what it mixes.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuits.engine.compile import CompiledCircuit
from circuits.engine.compile import compile as compile_circuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights, Weights
from circuits.errors import PropertyError
from circuits.evidence import Evidence
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Product, Sum, inputs, parameter_owner, product
from circuits.symbolic import sum as sum_node

_SHORTEST = 16


@dataclass(frozen=True, eq=False)
class _Segment:
    """Some steps of a chain as a circuit."""

    pc: CompiledCircuit
    last: Sum
    """Its last sum, which mixes the next segment's values too."""
    rows: dict[str, list[tuple[str, int]]]
    """By bank, where the whole circuit has these weights."""

    def weights(self, whole: Mapping[str, Weights]) -> CircuitWeights:
        """Return the whole circuit's weights as this one's."""
        own = {}
        for name, places in self.rows.items():
            log = torch.stack([whole[bank].log[row] for bank, row in places])
            own[name] = Weights(log, torch.stack([whole[bank].linear[row] for bank, row in places]))
        return CircuitWeights(own)


@dataclass(frozen=True, eq=False)
class _Segments:
    """A chain in segments: a first one, with the root, and others that are equal but for their variables."""

    first: _Segment
    other: _Segment | None
    variables: list[Tensor]
    """Of each segment, in the order of its own."""


_SEGMENTS: weakref.WeakKeyDictionary[CompiledCircuit, _Segments] = weakref.WeakKeyDictionary()


def segmented_log_z(question: Question) -> Tensor:
    """Return what :attr:`Question.log_z` does, with memory of the square root of the length of a homogeneous chain.

    Raises:
        PropertyError: the circuit is no chain of equal steps, weights are given at run time, or there is evidence on
            latents, or evidence that is relative to other evidence, or whose gradient is wanted.
    """
    pc, evidence = question.pc, question.evidence
    if question.weights.given or evidence.latents or evidence.reference is not None:
        raise PropertyError(
            "checkpointed: expected the circuit's own weights, and evidence on variables and classes that is relative "
            "to nothing; leave checkpointed out"
        )
    parts = [*evidence.factors.tensors(), *(() if evidence.classes is None else [evidence.classes])]
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        raise PropertyError(
            "checkpointed: expected evidence without a gradient, got tensors that require one; detach them, or leave "
            "checkpointed out"
        )
    found = _SEGMENTS.get(pc)
    if found is None or (found.first.pc.device, found.first.pc.dtype) != (pc.device, pc.dtype):
        found = _SEGMENTS[pc] = _segments(pc)
    own = question.weights.own
    tensors = [tensor for weights in own.values() for tensor in (weights.log, weights.linear)]

    def value_of(number: int, *tensors: Tensor) -> Tensor:
        ends = range(2, 2 * len(own) + 1, 2)
        parts = {name: Weights(*tensors[end - 2 : end]) for name, end in zip(own, ends, strict=True)}
        segment = found.first if number == 0 or found.other is None else found.other
        factors = evidence.factors.map(lambda tensor: tensor.index_select(1, found.variables[number]))
        part = Evidence(factors, classes=None if number else evidence.classes)
        asked = Question(segment.pc, part, segment.weights(parts))
        if len(tensors) > 2 * len(own):
            asked = asked.with_latents({segment.last: tensors[-1]})
        log_z = (asked.silenced() if question.silent else asked).log_z
        return log_z.unsqueeze(1) if number and log_z.dim() == 1 else log_z

    later: list[Tensor] = []
    for number in reversed(range(len(found.variables))):
        later = [_Recomputed.apply(functools.partial(value_of, number), *tensors, *later)]
    return later[0]


class _Recomputed(torch.autograd.Function):
    """A function of tensors of which nothing is kept but its arguments; it is evaluated again for the gradient."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Evaluate it."""
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Evaluate it again, and differentiate that."""
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            wanted = [t for t in tensors if t.requires_grad]
            grads = iter(torch.autograd.grad(ctx.function(*tensors), wanted, grad, allow_unused=True))
        return None, *(next(grads) if need else None for need in needed)


def _segments(pc: CompiledCircuit) -> _Segments:
    """Cut a chain into segments."""
    sums, leaves = _steps(pc.circuit.root)
    leaf_owners = {tuple(parameter_owner(leaf) for leaf in step) for step in leaves}
    sum_owners = {parameter_owner(node) for node in sums[1:]}
    if not sums or len(leaf_owners) > 1 or len(sum_owners) > 1:
        raise PropertyError(
            f"checkpointed: expected a chain of equal steps, such as ct.structures.hmm builds, got {pc.circuit}; leave "
            "checkpointed out"
        )
    length = max(_SHORTEST, math.isqrt(len(sums)))
    start = (len(sums) - 1) % length + 1
    starts = [0, *range(start, len(sums), length)]
    parts = [leaves[one:other] for one, other in zip(starts, [*starts[1:], len(sums)], strict=True)]
    variables = [torch.tensor([leaf.var for step in part for leaf in step], device=pc.device) for part in parts]
    first = _segment(pc, sums[0], sums[-1], leaves[:start])
    other = _segment(pc, sums[-1], sums[-1], leaves[:length]) if len(parts) > 1 else None
    return _Segments(first, other, variables)


def _steps(root: Node) -> tuple[list[Sum], list[list[Input]]]:
    """Return the sums of a chain and the inputs that each mixes the product of; nothing of other circuits."""
    sums, leaves = [], []
    node: Node | None = root
    while node is not None:
        if not isinstance(node, Sum) or len(node.children) > 1 or node.unit is not None:
            return [], []
        below = node.children[0]
        factors: Sequence[Node] = below.children if isinstance(below, Product) else (below,)
        inner = [factor for factor in factors if not isinstance(factor, Input)]
        if len(inner) > 1 or (isinstance(below, Product) and below.mode != "elementwise"):
            return [], []
        sums.append(node)
        leaves.append([factor for factor in factors if isinstance(factor, Input)])
        node = inner[0] if inner else None
    return sums, leaves


def _segment(pc: CompiledCircuit, top: Sum, below: Sum, leaves: Sequence[Sequence[Input]]) -> _Segment:
    """Build steps with the weights of ``top`` in the first sum, and those of ``below`` in the others."""
    made: dict[ParametricNode, Any] = {}

    def with_owner(source: ParametricNode, make: Callable[..., Any]) -> Any:
        node = make(tied_to=made.get(parameter_owner(source)))
        return made.setdefault(parameter_owner(source), node) and node

    node: Any = None
    last: Any = None
    variables = itertools.count()
    numbers = [[next(variables) for _ in step] for step in leaves]
    for step in reversed(range(len(leaves))):
        factors = [
            with_owner(leaf, functools.partial(inputs, variable, leaf.num_units, leaf.distribution))
            for variable, leaf in zip(numbers[step], leaves[step], strict=True)
        ]
        factors += [] if node is None else [node]
        mixed = factors[0] if len(factors) == 1 else product(*factors)
        source = below if step else top
        node = with_owner(source, functools.partial(sum_node, mixed, num_units=source.num_units))
        last = node if last is None else last
    compiled = compile_circuit(
        Circuit(node, num_classes=None if node.num_units == 1 else node.num_units), dtype=pc.dtype
    )
    rows: dict[str, dict[int, tuple[str, int]]] = defaultdict(dict)
    for owner, own in made.items():
        bank, row = compiled.bank_address(own)
        rows[bank][row] = pc.bank_address(owner)
    ordered = {bank: [places[row] for row in range(len(places))] for bank, places in rows.items()}
    return _Segment(compiled.to(pc.device), last, ordered)
