"""The data of a fit: checked once, kept where it is, moved to the circuit's device batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from circuits.digests import digest, parts
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Distribution
from circuits.learning.distributed import Processes
from circuits.learning.known_latents import KnownState, known_states, latent_factors
from circuits.learning.tables import StoredRows, Table, as_rows, as_tensor
from circuits.queries.common import checked_labels
from circuits.symbolic import Input, Sum

if TYPE_CHECKING:
    import numpy as np

Rows: TypeAlias = "Tensor | np.ndarray | Table | list[Any] | StoredRows"
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
        silent = None if missing is None or self.evidence.latents else missing.all(1)
        if silent is None or not bool(silent.any()):
            return self
        weights = torch.ones(len(silent), dtype=torch.float64, device=silent.device)
        return Batch(self.evidence, (weights if self.weights is None else self.weights).masked_fill(silent, 0.0))


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples over D variables, and what is known about them beside their values.

    Args:
        x: integers or truth values, or floating point with NaN for missing values, (N, D). They stay where they are,
            also in a file (``np.memmap``), and are looked at in parts; batches are moved to the circuit's device. Other
            tables, such as h5py data sets, need a length and rows by an array of integers.
        observed: bool (N, D), False where a value is missing: then its marginal likelihood is maximised. None: all are
            there.
        weights: how often each sample counts, (N,) >= 0; None: once.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``: then likelihoods are
            p(x | class of x), and each class learns from its own samples.
        latents: the states of latents that are known, int64 (N,) by node or name, -1 where a state is not: supervised
            and half-labelled learning of log p(x, known states). The state of a sum node is which of its child units is
            used; of an input node, which of its units. In an HMM both ``"emission3"`` and ``"transition2"`` are the
            state of step 3.
    """

    x: Rows
    observed: Rows | None = None
    weights: Tensor | np.ndarray | list[float] | None = None
    labels: Tensor | np.ndarray | list[int] | None = None
    latents: Mapping[str | Input | Sum, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class CheckedSamples:
    """Samples that fit a circuit, as tensors."""

    pc: CompiledCircuit
    x: Tensor | StoredRows
    observed: Tensor | StoredRows | None
    weights: Tensor | None
    labels: Tensor | None
    latents: tuple[KnownState, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, order: Tensor | None = None, processes: Processes = _ALONE, num_done: int = 0
    ) -> Iterator[Batch]:
        """Yield all samples in batches of nearly equal sizes, so that no last batch is too small to learn from.

        Of each batch only the part that is this process's; the first ``num_done`` batches are left out.
        """
        order = torch.arange(len(self.x)) if order is None else order
        for index in map(processes.share, order.tensor_split(self.num_batches(batch_size, len(order)))[num_done:]):
            x, observed, weights, labels = (
                None if tensor is None else tensor[index.to(tensor.device)].to(self.pc.device)
                for tensor in (self.x, self.observed, self.weights, self.labels)
            )
            assert x is not None
            evidence = Evidence.observe(x.to(torch.uint8) if x.dtype == torch.bool else x, observed)
            if labels is not None:
                evidence = evidence.with_class(labels)
            if self.latents:
                evidence = evidence.with_latents(latent_factors(self.pc, [known.rows(index) for known in self.latents]))
            yield Batch(evidence, weights)

    def num_batches(self, batch_size: int, num_samples: int | None = None) -> int:
        """Return how many batches there are of all samples, or of some."""
        return -(-(len(self) if num_samples is None else num_samples) // batch_size)

    def rows(self, index: Tensor) -> CheckedSamples:
        """Return some of the samples, in memory."""
        chosen: dict[str, Any] = {}
        for name in ("x", "observed", "weights", "labels"):
            part = getattr(self, name)
            chosen[name] = None if part is None else part[index.to(part.device)]
        return replace(self, **chosen, latents=tuple(known.rows(index) for known in self.latents))

    def digest(self) -> str:
        """Return a hash of everything that the samples say."""
        labels = [] if self.labels is None else [self.labels]
        order = {node: str(position) for position, node in enumerate(self.pc.circuit.nodes)} if self.latents else {}
        latents = [part for known in self.latents for part in (order[known.chooser], str(known.first), known.state)]
        return digest(self.x, self.observed, self.weights, *labels, *latents)


def checked_samples(pc: CompiledCircuit, name: str, data: Any, *, takes_labels: bool = True) -> CheckedSamples:
    """Return samples, or data without more, as tensors; raise ArgumentError unless they fit the circuit.

    A circuit with classes needs labels, but for those who do not ask the class: ``takes_labels`` is False.
    """
    check_compiled(pc)
    given = data if isinstance(data, Samples) else Samples(data)
    x = as_rows(name, given.x)
    num_vars = pc.circuit.num_vars
    is_number = x.dtype in (*_INTEGERS, torch.bool) or x.is_floating_point()
    if not is_number or x.dim() != 2 or x.shape[1] != num_vars:
        raise ArgumentError(
            f"{name}: expected integers of shape (num_samples, {num_vars}), or floating point with NaN for missing "
            f"values, got {x.dtype} {tuple(x.shape)}; convert it with .to(torch.int64)"
        )
    if not len(x):
        raise ArgumentError(f"{name}: expected at least one sample, got shape {tuple(x.shape)}")
    observed = None if given.observed is None else as_rows("observed", given.observed)
    if observed is not None and (observed.dtype != torch.bool or observed.shape != x.shape):
        raise ArgumentError(
            f"observed: expected bool of the shape of {name}, {tuple(x.shape)}, got {observed.dtype} "
            f"{tuple(observed.shape)}"
        )
    for start, part in parts(x):
        _check_values(pc, name, part, None if observed is None else observed[start : start + len(part)], start)
    return CheckedSamples(
        pc,
        x,
        observed,
        _checked_weights(given.weights, len(x)),
        _checked_labels(pc, name, given.labels, len(x)) if takes_labels else None,
        _checked_latents(pc, given.latents, len(x)),
    )


def _checked_weights(given: Any, num_samples: int) -> Tensor | None:
    if given is None:
        return None
    weights = as_tensor("sample_weights", given)
    is_valid = tuple(weights.shape) == (num_samples,) and weights.is_floating_point()
    if not is_valid or not bool(((weights >= 0) & (weights < torch.inf)).all()):
        raise ArgumentError(
            f"sample_weights: expected finite floating-point numbers >= 0 of shape ({num_samples},), got "
            f"{weights.dtype} {tuple(weights.shape)}"
        )
    return weights


def _checked_labels(pc: CompiledCircuit, name: str, given: Any, num_samples: int) -> Tensor | None:
    if given is None and pc.circuit.num_classes is None:
        return None
    argument = name.replace("data", "labels")
    return checked_labels(pc, argument, None if given is None else as_tensor(argument, given), num_samples)


def _checked_latents(pc: CompiledCircuit, latents: Any, num_samples: int) -> tuple[KnownState, ...]:
    if latents is None:
        return ()
    if not isinstance(latents, Mapping):
        raise ArgumentError(f"latents: expected states by node or its name, got {type(latents).__name__}")
    checked: dict[Input | Sum, Tensor] = {}
    for key, given in latents.items():
        node = pc.circuit.node(key) if isinstance(key, str) else key
        if not isinstance(node, (Input, Sum)):
            raise ArgumentError(f"latents: expected sum or input nodes, or their names, got {key!r}")
        pc.address(node)  # it belongs to the circuit
        num_states = node.num_units if isinstance(node, Input) else node.parameter_shape[1]
        state = as_tensor(f"latents[{key!r}]", given)
        is_valid = state.dtype in _INTEGERS and tuple(state.shape) == (num_samples,)
        if not is_valid or not bool(((state >= -1) & (state < num_states)).all()):
            raise ArgumentError(
                f"latents: expected integers of shape ({num_samples},), from -1 (unknown) to {num_states - 1}, for "
                f"{node}, got {state!r:.80}"
            )
        checked[node] = state.long()
    return known_states(pc.circuit, checked)


def _check_values(pc: CompiledCircuit, name: str, x: Tensor, observed: Tensor | None, first_sample: int) -> None:
    by_family: dict[Distribution, list[Tensor]] = {}
    for layer in pc.input_layers:
        by_family.setdefault(pc.families[layer.parameter_rows.bank], []).append(layer.variables.to(x.device))
    for family, of_layers in by_family.items():
        variables = torch.cat(of_layers)
        columns = slice(None) if len(by_family) == 1 else variables
        values = x[:, columns]
        outside = family.outside(values)
        if x.is_floating_point():
            outside &= ~values.isnan()
        if observed is not None:
            outside &= observed.to(x.device)[:, columns]
        if bool(outside.any()):
            sample, column = outside.nonzero()[0].tolist()
            var = column if len(by_family) == 1 else int(variables[column])
            raise ArgumentError(
                f"{name}: expected {family.domain} of variable {var}, got {x[sample, var].item()} in sample "
                f"{first_sample + sample}; mark unknown values as False in `observed`"
            )
