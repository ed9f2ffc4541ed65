"""What CoDD publishes (Li et al. 2026, arXiv 2603.00045): circuits that PyJuice wrote, with ``codd_config.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch

from circuits.interop import find_jpc
from circuits.reading import MAX_SMALL_JSON, Range, read_json, record_of
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.controls import Guidance
from diffusion.decoding.names import strategy_named
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.head import CoupledHead
from diffusion.hub import fetch

__all__ = ["CoddConfig", "CoddModel", "load"]

CONFIG = "codd_config.json"
_WAY_OUT = "give the file that CoDD wrote"
_Count = Annotated[int, Range(0, 1 << 53)]
_Share = Annotated[float, Range(0.0, 1e9)]


@dataclass(frozen=True, kw_only=True)
class CoddConfig:
    """The settings of a repository; defaults are CoDD's.

    Attributes:
        base_model_id: the denoiser's name on the hub.
        pc_model_id: that of the circuit.
        base_model_type: "llada" or "dream".
        mask_id: the denoiser's mask.
        vocab_size: the denoiser's vocabulary.
        num_steps: denoiser calls in all.
        gen_length: new tokens.
        block_length: positions of a block.
        temperature: of the draws of tokens; 0 takes the best.
        cfg_scale: classifier-free guidance.
        remasking: the strategy, by CoDD's name.
        pc_temperature: tau, see :attr:`decoding`.
        pc_frac: gamma, the share of masks below which the circuit is used.
        reverse_frac: whether it is used above it.
    """

    base_model_id: str = ""
    pc_model_id: str = ""
    base_model_type: str = "llada"
    mask_id: _Count = 126336
    vocab_size: _Count = 126464
    num_steps: _Count = 64
    gen_length: _Count = 256
    block_length: _Count = 32
    temperature: _Share = 0.0
    cfg_scale: _Share = 0.0
    remasking: str = "low_confidence"
    pc_temperature: _Share = 0.1
    pc_frac: _Share = 0.7
    reverse_frac: bool = False

    @property
    def decoding(self) -> DecodingConfig:
        """How to decode, as near to CoDD's decoder as this library's laws are.

        CoDD sharpens the denoiser's part by ``pc_temperature``, draws the circuit's latents, and takes the best tokens
        given them, or draws them at ``temperature``. Here one temperature tempers latents and tokens together, mode
        ``latent``: ``temperature`` where that is not 0, else ``pc_temperature``, of which CoDD ignores 0 and all from
        1 on (1 here). Windows without the circuit are decoded at the same temperature, and there greedily.
        """
        tau = self.pc_temperature if 0 < self.pc_temperature < 1 else 1.0
        return DecodingConfig(
            decode="latent",
            strategy=strategy_named(self.remasking),  # type: ignore[arg-type]
            temperature=self.temperature or tau,
            activation_threshold=self.pc_frac,
            reverse_activation=self.reverse_frac,
        )

    @property
    def options(self) -> dict[str, Any]:
        """All of it as arguments of :func:`~diffusion.decoding.generation.generate`."""
        return {
            "num_steps": self.num_steps,
            "gen_length": self.gen_length,
            "block_length": self.block_length,
            "config": self.decoding,
            "controls": [Guidance(self.cfg_scale)] if self.cfg_scale else [],
        }

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> CoddConfig:
        """Read ``codd_config.json``.

        Raises CheckpointError if it is missing or corrupt, or has a setting of another name or type.
        """
        found = read_json(path, limit=MAX_SMALL_JSON, way_out=_WAY_OUT)
        try:
            return record_of(cls, found, "settings")
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from error


class CoddModel(NamedTuple):
    """What a repository holds.

    Attributes:
        head: the circuit as an output layer.
        config: its settings.
    """

    head: CoupledHead
    config: CoddConfig


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> CoddModel:
    """Load a repository of CoDD: the head, and how it is decoded with. Nothing in it is executed.

    ``df.generate(df.load_denoiser(config.base_model_id), prompt, head=head, **config.options)`` then decodes.

    Args:
        path_or_repo: a folder, or the name of a repository on the hub.
        device: where the circuit goes.
        dtype: of the circuit, torch.float32 or torch.float64.
        revision: branch, tag or commit of the repository.

    Raises:
        ArgumentError: there is no such folder or repository, or it has no ``codd_config.json``.
        CheckpointError: a file is corrupt or hostile, or circuit and settings do not fit.
    """
    folder = fetch(path_or_repo, (CONFIG, "*.jpc"), revision=revision)
    if not (folder / CONFIG).exists():
        raise ArgumentError(
            f"path_or_repo: expected a folder or repository with {CONFIG}, got {os.fspath(path_or_repo)!r}; "
            "df.CoupledHead.from_jpc reads a circuit alone"
        )
    config, path = CoddConfig.read(folder / CONFIG), find_jpc(folder)
    head = CoupledHead.from_jpc(path, device=device, dtype=dtype)
    if head.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: expected a circuit of at most {config.vocab_size} tokens, as {CONFIG} says, got {head.vocab_size}"
            "; give the file that belongs to it"
        )
    decoding = config.decoding
    head.temperature, head.activation_threshold = decoding.temperature, config.pc_frac
    return CoddModel(head, config)
