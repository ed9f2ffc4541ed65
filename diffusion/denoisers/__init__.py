"""Masked-token predictors: the protocol, and a small transformer."""

from diffusion.denoisers.base import CachingDenoiser, Denoiser, DenoiserSpec, FeatureDenoiser
from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser

__all__ = ["CachingDenoiser", "Denoiser", "DenoiserSpec", "FeatureDenoiser", "TransformerConfig", "TransformerDenoiser"]
