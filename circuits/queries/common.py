"""What the queries share: dense log-factors, and checks of what they ask for."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights, check_compiled, check_kinds
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.precision import outside_inference_mode, own_precision
from circuits.randomness import Source
from circuits.symbolic import Circuit, Sum

P = ParamSpec("P")
R = TypeVar("R")
Key = TypeVar("Key")

MAX_NUMBERS = 1 << 24
"""How many numbers a chunk of a query may hold at once; bounds the memory of queries that ask many questions."""


@dataclass(frozen=True, eq=False)
class SumPlaces:
    """Where sum nodes are found: a table for each layer, and one for all sums of a chain."""

    layers: Mapping[int, Sequence[int]]
    """Of every table, which is called by the first one."""
    rows: Mapping[Sum, tuple[int, int]]
    """The table of every node, and its row there."""
    outside: Sequence[Sum]
    """The nodes that are in no chain."""

    def table(self, by_layer: Mapping[int, Tensor], table: int) -> Tensor:
        """Return a table, (n, ...), of what was found by layer; that of a chain may be there as one."""
        layers, found = self.layers[table], by_layer[table]
        return found if len(found) >= len(layers) else torch.cat([by_layer[layer] for layer in layers])


_PLACES: weakref.WeakKeyDictionary[CompiledCircuit, SumPlaces] = weakref.WeakKeyDictionary()


class Rows(Mapping[Key, Tensor], Generic[Key]):
    """Rows of tables by keys, cut when they are asked for: thousands of tensors take longer to make than their numbers.

    Args:
        tables: by number.
        places: of the keys.
    """

    def __init__(self, tables: Mapping[int, Tensor], places: Mapping[Key, tuple[int, int]]) -> None:
        self._tables = tables
        self._places = places

    def __getitem__(self, key: Key) -> Tensor:
        """Return the row of a key."""
        table, row = self._places[key]
        return self._tables[table][row]

    def __iter__(self) -> Iterator[Key]:
        """Return all keys."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)

    def __repr__(self) -> str:
        return repr(dict(self))


def places_of_sums(pc: CompiledCircuit) -> SumPlaces:
    """Return where the circuit's sum nodes are found; made once."""
    if pc not in _PLACES:
        chains = [step.chain.positions for step in pc.schedule if step.chain]
        in_chains = {layer: (chain[0], row) for chain in chains for row, layer in enumerate(chain)}
        addresses = {node: pc.address(node) for node in pc.circuit.sums}
        outside = [node for node, (layer, _) in addresses.items() if layer not in in_chains]
        layers = {layer: [layer] for layer in pc.sum_layers if layer not in in_chains} | {c[0]: c for c in chains}
        rows = {node: in_chains.get(address[0], address) for node, address in addresses.items()}
        _PLACES[pc] = SumPlaces(layers, rows, outside)
    return _PLACES[pc]


def query(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a query: it computes in the circuit's own precision, and its arguments are of their kinds.

    A circuit is an argument ``pc``, ``p`` or ``q``; of the others it looks at ``evidence``, ``weights`` and
    ``generator``.
    """
    parameters = inspect.signature(function).parameters
    run = outside_inference_mode(own_precision(function))

    @functools.wraps(function)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            given = dict(zip(parameters, args, strict=False)) | kwargs
            for name in ("pc", "p", "q"):
                if name in given:
                    check_compiled(given[name], name)
            check_kinds(given.get("evidence"), given.get("weights"))
            if "evidence" in given and given["evidence"] is None and parameters["evidence"].default is not None:
                raise ArgumentError("evidence: expected a ct.Evidence, got None; Evidence.nothing(1, D) says nothing")
            generator = given.get("generator")
            if not isinstance(generator, Source):
                raise ArgumentError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        return run(*args, **kwargs)

    return ask


def detached(query: Callable[P, R]) -> Callable[P, R]:
    """Decorate a query with a table as its result: it is detached unless called with ``differentiable=True``.

    Tables are gradients of log Z themselves, so a differentiable one needs the passes recorded.
    """

    @functools.wraps(query)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.nullcontext() if kwargs.get("differentiable") else torch.no_grad():
            return query(*args, **kwargs)

    return answer


def has_infinite_values(pc: CompiledCircuit) -> bool:
    """Return whether some variable has infinitely many values."""
    return 0 in pc.circuit.num_categories


def require_finite_values(pc: CompiledCircuit, query: str = "this query") -> None:
    """Raise PropertyError, which names the input node, unless all variables have finitely many values."""
    if has_infinite_values(pc):
        node = next(node for node in pc.circuit.inputs if not node.distribution.num_values)
        raise PropertyError(
            f"{query}: expected variables with finitely many values, got {node}, a {node.distribution}; condition on "
            "its variable, or use families over 0 .. C - 1"
        )


def dense_evidence(pc: CompiledCircuit, evidence: Evidence | None, weights: CircuitWeights | None = None) -> Evidence:
    """Return the evidence with log-factors of all values, (B, D, C), -inf for values that a variable does not have.

    Raises ArgumentError if it does not fit the circuit, PropertyError for infinitely many values or without a class.
    """
    require_finite_values(pc)
    question = Question(pc, evidence, weights)
    question.require_one_root()
    given, num_values = question.evidence, max(pc.circuit.num_categories)
    factors = given.dense(num_values, pc.dtype)[..., :num_values]
    return given.with_factors(factors.masked_fill(~existing_values(pc), -torch.inf))


def factors_of(evidence: Evidence) -> Tensor:
    """Return the log-factors of :func:`dense_evidence`, (B, D, C)."""
    assert evidence.log_factors is not None
    return evidence.log_factors


def dense_factors(pc: CompiledCircuit, evidence: Evidence | None, query: str) -> Tensor:
    """Return the log-factors of :func:`dense_evidence`, for a query that takes evidence on variables only.

    Raises PropertyError for classes or infinitely many values, and for evidence on latents or relative to other.
    """
    require_finite_values(pc, query)
    if pc.circuit.num_classes is not None:
        raise one_root_needed(query, pc.circuit)
    refuse_relative(evidence, query)
    if evidence is not None and evidence.latents:
        raise PropertyError(
            f"{query}: expected evidence on variables only, got some on latents; leave that out, or fold it into the "
            "circuit's weights"
        )
    return factors_of(dense_evidence(pc, evidence))


def one_root_needed(who: str, circuit: Circuit) -> PropertyError:
    """Return the error of what takes circuits with one root unit only, for one that has a unit per class."""
    return PropertyError(
        f"{who}: expected a circuit with one root unit, got {circuit} with one per class; "
        "ct.transforms.condition(pc, evidence.with_class(label)) is that of one class"
    )


def refuse_relative(evidence: Evidence | None, query: str) -> None:
    """Raise PropertyError, for a query that has no use for it, if the evidence is relative to other evidence."""
    if evidence is not None and evidence.reference is not None:
        raise PropertyError(f"{query}: expected evidence that is relative to no other; leave relative_to out")


def has_one_explanation(pc: CompiledCircuit, evidence: Evidence) -> bool:
    """Whether no assignment has two explanations; classes that are mixed are explanations of their own."""
    is_mixture = evidence.classes is not None and evidence.classes.dim() == 2
    return pc.circuit.is_deterministic and not is_mixture


def existing_values(pc: CompiledCircuit) -> Tensor:
    """Return which of the C values each variable has: bool (D, C)."""
    values = torch.arange(max(pc.circuit.num_categories), device=pc.device)
    return values < pc.num_categories.unsqueeze(1)


def queries_per_pass(pc: CompiledCircuit) -> int:
    """Return how many queries one pass takes so that the circuit's values stay within ``MAX_NUMBERS``."""
    per_query = pc.circuit.num_units + pc.circuit.num_vars * max(pc.circuit.num_categories)
    return max(1, MAX_NUMBERS // per_query)


def value_table(pc: CompiledCircuit, name: str, table: Tensor | None, *, extra_dim: bool = False) -> Tensor:
    """Return numbers per variable and value, (D, C), in the circuit's type; None: the value itself.

    With ``extra_dim`` (D, C, M) is allowed too. Raises ArgumentError for another type or shape, or numbers that are
    none.
    """
    num_vars, num_values = existing_values(pc).shape
    if table is None:
        return torch.arange(num_values, device=pc.device, dtype=pc.dtype).expand(num_vars, -1)
    shapes = f"({num_vars}, {num_values})" + (f" or ({num_vars}, {num_values}, M)" if extra_dim else "")
    if not isinstance(table, Tensor):
        raise ArgumentError(f"{name}: expected a tensor of shape {shapes}, got {type(table).__name__}")
    if tuple(table.shape[:2]) != (num_vars, num_values) or table.dim() > 2 + extra_dim or table.is_complex():
        raise ArgumentError(f"{name}: expected real numbers of shape {shapes}, got {table.dtype} {tuple(table.shape)}")
    if not bool(table.detach().isfinite().all()):
        raise ArgumentError(f"{name}: expected finite numbers, got NaN or infinity")
    return table.to(pc.device, pc.dtype)


def checked_labels(pc: CompiledCircuit, argument: str, labels: Tensor | None, num_samples: int) -> Tensor | None:
    """Return the classes of samples as int64 (N,), None of a circuit without classes; ``argument`` is their name."""
    num_classes = pc.circuit.num_classes
    if num_classes is None:
        if labels is not None:
            raise ArgumentError(f"{argument}: {pc.circuit} has no classes; build it with num_classes=")
        return None
    if labels is None:
        raise ArgumentError(f"{argument}: {pc.circuit} has {num_classes} classes; give the class of every sample")
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not is_integer or tuple(labels.shape) != (num_samples,):
        raise ArgumentError(
            f"{argument}: expected integers of shape ({num_samples},), got {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.long()
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ArgumentError(
            f"{argument}: expected numbers from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return labels
