"""How far a training run has come, and the file from which it continues after an interruption."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits.digests import named_digest
from circuits.files import read_tensors, write_tensors
from diffusion.errors import CheckpointError

FORMAT = "unfactor-denoiser-training"
FORMAT_VERSION = 2  # 1 did not know what a run started from
_WAY_OUT = "delete it, or name another file"


@dataclass(frozen=True)
class TrainingCurve:
    """What was measured after ``steps[i]`` updates, in nats per block token.

    Attributes:
        steps: numbers of updates done.
        train: mean training loss of the updates since the entry before.
        held_out: ``held_out_loss``; NaN where there was no held-out text.
    """

    steps: tuple[int, ...] = ()
    train: tuple[float, ...] = ()
    held_out: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainingState:
    """All that a run knows besides weights and optimizer; randomness derives from the seed and ``step``.

    ``start`` is a hash of the weights that it started from.
    """

    start: str
    step: int = 0
    losses: tuple[float, ...] = ()
    curve: TrainingCurve = TrainingCurve()

    def after_update(self, loss: float) -> TrainingState:
        """Return the state after one more update with this loss."""
        return replace(self, step=self.step + 1, losses=(*self.losses, loss))

    def after_validation(self, held_out_loss: float) -> TrainingState:
        """Return the state with one more entry in its curve."""
        mean_loss = sum(self.losses) / len(self.losses)
        curve = TrainingCurve(
            (*self.curve.steps, self.step), (*self.curve.train, mean_loss), (*self.curve.held_out, held_out_loss)
        )
        return replace(self, losses=(), curve=curve)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One safetensors file: the tensors of model and optimizer, and as metadata the state and the run's identity.

    Attributes:
        path: the file, or None for a run that keeps none.
        identity: names of what the run depends on, with a value that changes whenever that does.
    """

    path: Path | None
    identity: dict[str, str]

    def write(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Replace the file; a reader finds the old one or the new one, never a part."""
        if self.path is None:
            return
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()}
        metadata = {"identity": json.dumps(self.identity), "state": json.dumps(asdict(state))}
        write_tensors(self.path, tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Load what ``write`` wrote into model and optimizer; without a file, leave them and return a fresh state.

        Raises:
            CheckpointError: the file is corrupt, or of another run, or of one that started from other weights than the
                model's, which are not in the file either.
        """
        if self.path is None:
            return TrainingState(start="")
        start = named_digest(model.state_dict())
        if not self.path.exists():
            return TrainingState(start=start)
        # on the CPU: the optimizer moves each of its tensors to where it wants it
        metadata, tensors = read_tensors(self.path, format=FORMAT, versions=(FORMAT_VERSION,), way_out=_WAY_OUT)
        try:
            self._check_identity(json.loads(metadata["identity"]))
            weights, optimizer_state = _unflatten(tensors)
            state = _state_from_json(metadata["state"])
            if start not in (state.start, named_digest(weights)):
                raise CheckpointError(
                    f"the checkpoint {self.path} belongs to a run that started elsewhere: expected the weights that it "
                    f"started from, or those in it, got others; make the model as for its first call, or {_WAY_OUT}"
                )
            model.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the checkpoint {self.path} is not complete: {error}; {_WAY_OUT}") from error
        return state

    def _check_identity(self, found: dict[str, str]) -> None:
        different = [name for name, value in self.identity.items() if found.get(name) != value]
        if different:
            raise CheckpointError(
                f"the checkpoint {self.path} belongs to a run with another {' and '.join(different)}: "
                f"{_WAY_OUT}, or repeat the arguments of that run"
            )


def _unflatten(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    weights: dict[str, Tensor] = {}
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner == "model":
            weights[name] = tensor
        else:
            index, _, entry = name.partition(".")
            optimizer_state.setdefault(int(index), {})[entry] = tensor
    return weights, optimizer_state


def _state_from_json(text: str) -> TrainingState:
    content: dict[str, Any] = json.loads(text)
    curve = TrainingCurve(**{name: tuple(values) for name, values in content["curve"].items()})
    return TrainingState(
        start=str(content["start"]), step=int(content["step"]), losses=tuple(content["losses"]), curve=curve
    )
