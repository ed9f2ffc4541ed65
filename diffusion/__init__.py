"""Circuits as output layers of masked diffusion language models: train, decode, evaluate."""

from diffusion import evaluation, masking
from diffusion.calibration import NoiseCalibration
from diffusion.circuit_training import CircuitTraining, fit_coupled
from diffusion.coupling import CoupledDistribution
from diffusion.decoding import DecodeOptions
from diffusion.denoiser_training import DenoiserTraining, train_denoiser
from diffusion.denoisers import Denoiser, DenoiserSpec, TransformerConfig, TransformerDenoiser
from diffusion.generation import Generation, generate
from diffusion.head import CoupledHead
from diffusion.logit_cache import LogitCache, cache_logits

__all__ = [
    "CircuitTraining",
    "CoupledDistribution",
    "CoupledHead",
    "DecodeOptions",
    "Denoiser",
    "DenoiserSpec",
    "DenoiserTraining",
    "Generation",
    "LogitCache",
    "NoiseCalibration",
    "TransformerConfig",
    "TransformerDenoiser",
    "cache_logits",
    "evaluation",
    "fit_coupled",
    "generate",
    "masking",
    "train_denoiser",
]
