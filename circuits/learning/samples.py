"""The data of a fit: checked once, kept where it is, moved to the circuit's device batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.digests import digest, parts
from circuits.engine.compile import CompiledCircuit, check_compiled
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Distribution
from circuits.learning._arrays import StoredRows, as_rows, as_tensor
from circuits.learning.distributed import Processes

_ALONE = Processes()
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Batch(NamedTuple):
    """Some samples on the circuit's device."""

    evidence: Evidence
    weights: Tensor | None
    """(B,), or None: every sample counts once."""

    def without_silence(self) -> Batch:
        """Return the batch in which samples that observe nothing have no weight: they are no data.

        They have no flow in any case; but they are not to count in means over the samples, such as a loss, either.
        """
        missing = self.evidence.missing
        silent = None if missing is None else missing.all(1)
        if silent is None or not bool(silent.any()):
            return self
        weights = torch.ones(len(silent), dtype=torch.float64, device=silent.device)
        return Batch(self.evidence, (weights if self.weights is None else self.weights).masked_fill(silent, 0.0))


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples over D variables."""

    x: Tensor | StoredRows
    """Integers, or floating point with NaN for missing values, (N, D)."""
    observed: Tensor | StoredRows | None
    """bool (N, D), or None: everything is."""
    weights: Tensor | None
    """(N,), or None: every sample counts once."""
    labels: Tensor | None = None
    """int64 (N,), or None: the circuit has no classes."""

    def batches(
        self, batch_size: int, device: torch.device, order: Tensor | None = None, processes: Processes = _ALONE
    ) -> Iterator[Batch]:
        """Yield all samples in batches of nearly equal sizes, so that no last batch is too small to learn from.

        Of each batch only the part that is this process's.
        """
        order = torch.arange(len(self.x)) if order is None else order
        for index in map(processes.share, order.tensor_split(-(-len(order) // batch_size))):
            x, observed, weights, labels = (
                None if tensor is None else tensor[index.to(tensor.device)].to(device)
                for tensor in (self.x, self.observed, self.weights, self.labels)
            )
            assert x is not None
            evidence = Evidence.observe(x, observed)
            yield Batch(evidence if labels is None else evidence.with_class(labels), weights)

    def digest(self) -> str:
        """Return a hash of everything that the samples say."""
        return digest(self.x, self.observed, self.weights, *([] if self.labels is None else [self.labels]))


def checked_samples(
    pc: CompiledCircuit,
    name: str,
    data: Any,
    observed: Any,
    sample_weights: Any,
    labels: Any = None,
    *,
    takes_labels: bool = True,
) -> Samples:
    """Return the samples as tensors; raise ArgumentError unless they fit the circuit. ``name`` is the argument's.

    A circuit with classes needs labels, but for those who do not ask the class: ``takes_labels=False``.
    """
    check_compiled(pc)
    x = as_rows(name, data)
    num_vars = pc.circuit.num_vars
    if not (x.dtype in _INTEGERS or x.is_floating_point()) or x.dim() != 2 or x.shape[1] != num_vars:
        raise ArgumentError(
            f"{name}: expected integers of shape (num_samples, {num_vars}), or floating point with NaN for missing "
            f"values, got {x.dtype} {tuple(x.shape)}; convert it with .to(torch.int64)"
        )
    if not len(x):
        raise ArgumentError(f"{name}: expected at least one sample, got shape {tuple(x.shape)}")
    if observed is not None:
        observed = as_rows("observed", observed)
        if observed.dtype != torch.bool or observed.shape != x.shape:
            raise ArgumentError(
                f"observed: expected bool of the shape of {name}, {tuple(x.shape)}, got {observed.dtype} "
                f"{tuple(observed.shape)}"
            )
    for start, part in parts(x):
        _check_values(pc, name, part, None if observed is None else observed[start : start + len(part)], start)
    if sample_weights is not None:
        sample_weights = as_tensor("sample_weights", sample_weights)
        is_valid = sample_weights.shape == x.shape[:1] and sample_weights.is_floating_point()
        if not is_valid or not bool(((sample_weights >= 0) & (sample_weights < torch.inf)).all()):
            raise ArgumentError(
                f"sample_weights: expected finite floating-point numbers >= 0 of shape ({len(x)},), got "
                f"{sample_weights.dtype} {tuple(sample_weights.shape)}"
            )
    return Samples(x, observed, sample_weights, checked_labels(pc, name, labels, len(x)) if takes_labels else None)


def checked_labels(pc: CompiledCircuit, name: str, labels: Any, num_samples: int) -> Tensor | None:
    """Return the labels as int64 (N,), None of a circuit without classes; ``name`` is the argument of the samples."""
    argument, num_classes = name.replace("data", "labels"), pc.circuit.num_classes
    if num_classes is None:
        if labels is not None:
            raise ArgumentError(f"{argument}: {pc.circuit} has no classes; build it with num_classes=")
        return None
    if labels is None:
        raise ArgumentError(f"{argument}: {pc.circuit} has {num_classes} classes; give the class of every sample")
    labels = as_tensor(argument, labels)
    if labels.dtype not in _INTEGERS or tuple(labels.shape) != (num_samples,):
        raise ArgumentError(
            f"{argument}: expected integers of shape ({num_samples},), got {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.long()
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ArgumentError(
            f"{argument}: expected numbers from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def _check_values(pc: CompiledCircuit, name: str, x: Tensor, observed: Tensor | None, first_sample: int) -> None:
    domains: dict[str, tuple[Distribution, list[int]]] = {}
    for var, family in {node.var: node.distribution for node in pc.circuit.inputs}.items():
        domains.setdefault(family.domain, (family, []))[1].append(var)
    for domain, (family, variables) in domains.items():
        columns = slice(None) if len(domains) == 1 else variables
        values = x[:, columns]
        outside = family.outside(values)
        if x.is_floating_point():
            outside &= ~values.isnan()
        if observed is not None:
            outside &= observed.to(x.device)[:, columns]
        if bool(outside.any()):
            sample, column = outside.nonzero()[0].tolist()
            var = column if len(domains) == 1 else variables[column]
            raise ArgumentError(
                f"{name}: expected {domain} of variable {var}, got {x[sample, var].item()} in sample "
                f"{first_sample + sample}; mark unknown values as False in `observed`"
            )
