"""Denoisers that were trained here."""

from __future__ import annotations

import torch

from diffusion.denoisers.pretrained import Source
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.errors import ArgumentError


def load(source: Source) -> TransformerDenoiser:
    """Return what ``TransformerDenoiser.save`` wrote."""
    if not isinstance(source.device, str | torch.device) or source.device == "auto":
        raise ArgumentError(f"device: expected one device for a small model, got {source.device!r}")
    model = TransformerDenoiser.load(source.folder, device=source.device)
    return model if source.dtype is None else model.to(source.dtype)
