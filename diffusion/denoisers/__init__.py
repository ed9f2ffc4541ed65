"""Masked-token predictors: the protocol, and a small transformer."""

from diffusion.denoisers.base import Denoiser, DenoiserSpec, FeatureDenoiser
from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser

__all__ = ["Denoiser", "DenoiserSpec", "FeatureDenoiser", "TransformerConfig", "TransformerDenoiser"]
