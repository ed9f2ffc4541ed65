"""MDLM (Sahoo et al. 2024, arXiv 2406.07524): a diffusion transformer over GPT-2's tokens and a mask."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion.denoisers.adapters.backbone import BackboneDenoiser
from diffusion.denoisers.adapters.dit import DiT, DiTConfig, dit_names
from diffusion.denoisers.adapters.vocabulary import Specials, fingerprint_of, spec_of
from diffusion.denoisers.base import DenoiserSpec
from diffusion.denoisers.checkpoints import load_weights
from diffusion.denoisers.pretrained import Source

Model = TypeVar("Model", bound=BackboneDenoiser)
END_OF_TEXT = 50256
"""Of GPT-2, whose vocabulary the published models have; the mask follows it."""
IMPOSSIBLE = -1e6
"""The published models' logarithm of 0."""
_LEAST_CLEAN = 1e-3


class SubstitutionDenoiser(BackboneDenoiser):
    """A backbone whose logits are substituted: the mask is impossible, and a token that is there stays there.

    The backbone is a :class:`DiT`; unless it is ``timed``, trained with the noise level, it is told 0.
    """

    def __init__(self, spec: DenoiserSpec, backbone: nn.Module, head: nn.Module, *, timed: bool = False) -> None:
        super().__init__(spec, backbone, head)
        self.timed = timed

    def _conditions(self, tokens: Tensor, valid: Tensor, t: Tensor | None) -> dict[str, Any]:
        """Return the total noise of the log-linear schedule at ``t``, or at the share of masks, where it is wanted."""
        if not self.timed:
            return {}
        if t is None:
            masks = (tokens == self.spec.mask_id) & valid
            t = masks.sum(1) / valid.sum(1).clamp_min(1)
        return {"sigma": -torch.log1p(-(1 - _LEAST_CLEAN) * t.float())}

    def _finished(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return substituted(logits, tokens, self.spec.mask_id)


def substituted(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Return logits (B, L, V) of which the mask's is impossible, and all others where a token (B, L) is known."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.masked_fill(ids == mask_id, IMPOSSIBLE)
    known = (tokens != mask_id).unsqueeze(-1)
    carried = torch.full_like(logits, IMPOSSIBLE).masked_fill(ids == tokens.unsqueeze(-1), 0.0)
    return torch.where(known, carried, logits)


def load(source: Source) -> SubstitutionDenoiser:
    """Return MDLM or a model of its architecture and layout."""
    spec, config = described(source)
    backbone, head = skeleton(config)
    model = SubstitutionDenoiser(spec, backbone, head, timed=bool(source.config.get("time_conditioning", False)))
    return filled(model, source)


def described(source: Source) -> tuple[DenoiserSpec, DiTConfig]:
    """Return the facts about a model and the shape of its transformer."""
    table = source.number("vocab_size")
    specials = Specials(masks=("[MASK]",), mask_id=table - 1, end_ids=(END_OF_TEXT,))
    spec = spec_of(source, specials, vocab_size=table, max_length=source.number("model_length"))
    config = DiTConfig(
        vocab_size=table,
        width=source.number("hidden_dim"),
        num_layers=source.number("n_blocks"),
        num_heads=source.number("n_heads"),
        noise_width=source.number("cond_dim"),
        modulated=bool(source.config.get("adaln", True)),
    )
    return spec, config


def skeleton(config: DiTConfig) -> tuple[DiT, nn.Linear]:
    """Return transformer and output layer without memory for their weights."""
    with torch.device("meta"):
        return DiT(config), nn.Linear(config.width, config.vocab_size)


def filled(model: Model, source: Source) -> Model:
    """Load a denoiser's weights, in the dtype and onto the device of the source, for evaluation."""
    load_weights(model, source.folder, names=dit_names, dtype=source.dtype, device=source.one_device)
    model.tokenizer_fingerprint = fingerprint_of(source.folder)
    model.eval()
    return model
