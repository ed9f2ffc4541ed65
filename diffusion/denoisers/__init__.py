"""Masked-token predictors: the protocol, and a small transformer."""

from diffusion.denoisers.base import Denoiser, DenoiserSpec
from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser

__all__ = ["Denoiser", "DenoiserSpec", "TransformerConfig", "TransformerDenoiser"]
