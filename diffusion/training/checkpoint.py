"""How far a training run has come, and the file from which it continues after an interruption."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from circuits.files import replace_file
from diffusion.errors import CheckpointError

FORMAT = "unfactor-denoiser-training"
FORMAT_VERSION = 1


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
    """All that a run knows besides weights and optimizer; randomness derives from the seed and ``step``."""

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
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "identity": json.dumps(self.identity),
            "state": json.dumps(asdict(state)),
        }
        with replace_file(self.path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Load what ``write`` wrote into model and optimizer; without a file, leave them and return a fresh state.

        Raises:
            CheckpointError: the file is corrupt, or of another run.
        """
        if self.path is None or not self.path.exists():
            return TrainingState()
        try:
            # on the CPU: the optimizer moves each of its tensors to where it wants it
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the checkpoint {self.path}: {error}") from error
        self._check_identity(metadata)
        try:
            weights, optimizer_state = _unflatten(tensors)
            state = _state_from_json(metadata["state"])
            model.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint {self.path} is not complete: {error}") from error
        return state

    def _check_identity(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{self.path} is not a checkpoint of denoiser training")
        if metadata.get("format_version") != str(FORMAT_VERSION):
            raise CheckpointError(
                f"{self.path} has format version {metadata.get('format_version')}, this library reads {FORMAT_VERSION}"
            )
        try:
            found = json.loads(metadata["identity"])
            different = [name for name, value in self.identity.items() if found.get(name) != value]
        except (KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint {self.path} is not complete: {error}") from error
        if different:
            raise CheckpointError(
                f"the checkpoint {self.path} belongs to a run with another {' and '.join(different)}: "
                "delete it, name another file, or repeat the arguments of that run"
            )


def fingerprint(tensor: Tensor | None) -> str:
    """Return a short digest of a tensor's values."""
    if tensor is None:
        return "none"
    return hashlib.blake2b(tensor.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


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
    return TrainingState(step=int(content["step"]), losses=tuple(content["losses"]), curve=curve)
