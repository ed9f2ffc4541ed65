"""Denoisers that were trained here."""

from __future__ import annotations

from diffusion.denoisers.pretrained import Source
from diffusion.denoisers.transformer import TransformerDenoiser


def load(source: Source) -> TransformerDenoiser:
    """Return what ``TransformerDenoiser.save`` wrote."""
    model = TransformerDenoiser.load(source.folder, device=source.one_device)
    return model if source.dtype is None else model.to(source.dtype)
