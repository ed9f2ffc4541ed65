"""Circuits as output layers of masked diffusion language models: train, decode, evaluate."""

from diffusion import evaluation
from diffusion.conditioners import Conditioned, Conditioner, LatentPotentials, NoiseCalibration
from diffusion.coupling import CoupledDistribution
from diffusion.decoding import constraints
from diffusion.decoding.generation import Generation, generate
from diffusion.decoding.step import DecodeOptions
from diffusion.denoisers import Denoiser, DenoiserSpec, FeatureDenoiser, TransformerConfig, TransformerDenoiser
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.training import masking
from diffusion.training.circuit import CircuitTraining, fit_coupled
from diffusion.training.denoiser import DenoiserTraining, train_denoiser
from diffusion.training.logit_cache import LogitCache, cache_logits

__all__ = [
    "CircuitTraining",
    "Conditioned",
    "Conditioner",
    "CoupledDistribution",
    "CoupledHead",
    "DecodeOptions",
    "Denoiser",
    "DenoiserSpec",
    "DenoiserTraining",
    "FeatureDenoiser",
    "Generation",
    "LatentPotentials",
    "LogitCache",
    "NoiseCalibration",
    "Prediction",
    "TransformerConfig",
    "TransformerDenoiser",
    "cache_logits",
    "constraints",
    "evaluation",
    "fit_coupled",
    "generate",
    "masking",
    "train_denoiser",
]
