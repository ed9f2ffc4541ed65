"""The coupled output layer: a circuit, and when and how it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from circuits.files import file_hash, not_finite, read_folder, read_tensors, replace_folder, write_tensors
from diffusion.conditioners.noise_calibration import NoiseCalibration
from diffusion.coupling import CoupledDistribution, Normalization
from diffusion.errors import ArgumentError, CheckpointError

FORMAT = "unfactor-coupled-head"
FORMAT_VERSION = 2  # 1 had no hash of what the file holds
_FILE = "head.safetensors"
_WAY_OUT = "save the head again"


class CoupledHead(nn.Module):
    """A compiled circuit as the output layer of a masked-token predictor.

    Args:
        pc: a circuit over the L positions of a block, V categories each; its parameters are this module's.
        activation_threshold: gamma; the circuit is used for sequences whose share of masked positions in the block is
            below it (at very high noise a static circuit can hurt), for all sequences when it is 1 or more.
        temperature: tau >= 0 of the tokens' distribution in decoding: log q / tau; 0 takes the best token.
        normalization: "global" or "local", see :mod:`diffusion.coupling`; training and decoding share it.
        top_k: evidence on the k best tokens only; None: on all.
        calibration: what becomes of the prediction before the circuit multiplies it, see
            :class:`~diffusion.conditioners.noise_calibration.NoiseCalibration`; its parameters are this module's too.
            None: the plain product.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        pc: CompiledCircuit,
        activation_threshold: float = 0.7,
        temperature: float = 1.0,
        *,
        normalization: Normalization = "global",
        top_k: int | None = None,
        calibration: NoiseCalibration | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pc, CompiledCircuit):
            raise ArgumentError(f"pc: expected a compiled circuit, ct.compile(circuit), got {type(pc).__name__}")
        if not activation_threshold >= 0:
            raise ArgumentError(f"activation_threshold: expected a number >= 0, got {activation_threshold!r}")
        if normalization not in get_args(Normalization):
            raise ArgumentError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
        check_temperature(temperature)
        if calibration is not None and {calibration.bias.shape[1]} != set(pc.circuit.num_categories):
            raise ArgumentError(
                f"calibration: it is for {calibration.bias.shape[1]} tokens, and the circuit has "
                f"{sorted(set(pc.circuit.num_categories))} categories"
            )
        self.pc = pc
        self.activation_threshold = activation_threshold
        self.temperature = temperature
        self.normalization = normalization
        self.top_k = top_k
        self.calibration = calibration

    @property
    def block_length(self) -> int:
        """L, the number of positions the circuit is over."""
        return self.pc.circuit.num_vars

    def forward(self, logits: Tensor, tokens: Tensor, masked: Tensor) -> CoupledDistribution:
        """Return the joint distribution of a block; see :class:`~diffusion.coupling.CoupledDistribution`."""
        return self.distribution(logits, tokens, masked)

    def distribution(
        self, logits: Tensor, tokens: Tensor, masked: Tensor, *, include: Tensor | None = None
    ) -> CoupledDistribution:
        """Return the joint distribution of a block: logits (B, L, V), tokens (B, L), masked (B, L)."""
        factors = self.calibrated(logits, masked)
        return CoupledDistribution(
            self.pc, factors, tokens, masked, normalization=self.normalization, top_k=self.top_k, include=include
        )

    def calibrated(self, logits: Tensor, masked: Tensor, values: Tensor | None = None) -> Tensor:
        """Return the log-factors that the circuit is multiplied with, in the shape of ``logits``.

        Args:
            logits: of all tokens, (B, L, V), or of the listed ``values``, (B, L, k).
            masked: bool (B, L).
            values: int64 (B, L, k); None: all tokens.
        """
        return logits if self.calibration is None else self.calibration(logits, masked, values)

    def conditional_log_likelihood(self, logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return ``CLL = log p_hat(x_M | x_O)`` of the true tokens ``targets``, int64 (B, L): (B,), in nats."""
        return self.distribution(logits, targets, masked, include=targets).log_prob(targets)

    def is_active(self, masked: Tensor) -> Tensor:
        """Return which sequences the circuit is used for, by their own mask ratio: bool (B, L) to bool (B,)."""
        ratio = masked.float().mean(-1)
        return (ratio < self.activation_threshold) | (self.activation_threshold >= 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder: the circuit in ``circuit/``, settings and calibration in ``head.safetensors``; no pickle.

        The folder is swapped in as a whole: whoever loads it, at any time, gets the version before or this one.

        Raises:
            ArgumentError: ``path`` holds something else, or a weight is NaN or infinite.
        """
        tensors = {} if self.calibration is None else self.calibration.state_dict()
        bad = not_finite(tensors)
        if bad is not None:
            raise ArgumentError(f"head: {bad} has NaN or infinite numbers; such a head cannot be saved")
        with replace_folder(path, ("circuit", _FILE), kind="a saved head") as folder:
            ct.save(self.pc, folder / "circuit")
            settings = {name: getattr(self, name) for name in _SETTINGS}
            metadata = {"settings": json.dumps(settings), "circuit_sha256": _circuit_hash(folder)}
            write_tensors(folder / _FILE, tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> CoupledHead:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: a file is missing, corrupt, of a newer format, or does not belong to the others.
        """
        return read_folder(path, cls._loaded).to(device)

    @classmethod
    def _loaded(cls, folder: Path) -> CoupledHead:
        metadata, tensors = read_tensors(folder / _FILE, format=FORMAT, versions=(1, FORMAT_VERSION), way_out=_WAY_OUT)
        if metadata.get("circuit_sha256") != _circuit_hash(folder):
            raise CheckpointError(f"{folder}: {_FILE} belongs to another circuit; {_WAY_OUT}")
        bad = not_finite(tensors)
        if bad is not None:
            raise CheckpointError(f"{folder / _FILE}: {bad} has NaN or infinite numbers; {_WAY_OUT}")
        try:
            settings = json.loads(metadata["settings"])
            calibration = None
            if tensors:
                num_knots, num_tokens = tensors["bias"].shape
                calibration = NoiseCalibration(num_tokens, num_knots)
                calibration.load_state_dict(tensors)
            return cls(ct.load(folder / "circuit"), **settings, calibration=calibration)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder / _FILE} is corrupt: {error}; {_WAY_OUT}") from error


_SETTINGS = ("activation_threshold", "temperature", "normalization", "top_k")


def _circuit_hash(folder: Path) -> str:
    """Return a hash of the circuit's structure file, which holds the hash of the weights."""
    try:
        return file_hash(folder / "circuit" / "structure.json")
    except OSError as error:
        raise CheckpointError(f"{folder} holds no circuit: {error}; {_WAY_OUT}") from error


def check_temperature(temperature: float) -> None:
    """Raise ArgumentError unless ``temperature`` is a finite number >= 0."""
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature: expected a finite number >= 0, got {temperature!r}")
