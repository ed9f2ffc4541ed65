"""Circuits as output layers of masked diffusion language models: train, decode, evaluate."""

from diffusion import codd, compat, evaluation, testing
from diffusion.conditioners import (
    CircuitAlone,
    Conditioned,
    Conditioner,
    LatentPotentials,
    LowRankTransitions,
    MarginalMatching,
    MixtureWeights,
    NoiseCalibration,
    TransitionGates,
)
from diffusion.coupling import CoupledDistribution
from diffusion.decoding import baselines, constraints, controls
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.generation import Generation, generate, infill
from diffusion.decoding.head_mixture import HeadMixture
from diffusion.decoding.joint import JointHead
from diffusion.decoding.plans import Anywhere, Blocks, DynamicWindows
from diffusion.denoisers import (
    CachingDenoiser,
    Denoiser,
    DenoiserSpec,
    FeatureDenoiser,
    TransformerConfig,
    TransformerDenoiser,
)
from diffusion.denoisers.masked_lm import MaskedLMDenoiser
from diffusion.denoisers.pretrained import load_denoiser
from diffusion.evaluation.likelihood import log_likelihood
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.text.hub_tokenizer import HubTokenizer, load_tokenizer
from diffusion.training import masking
from diffusion.training.circuit import CircuitTraining, fit_coupled
from diffusion.training.denoiser import DenoiserTraining, train_denoiser
from diffusion.training.joint import JointTraining, fit_jointly
from diffusion.training.logit_cache import LogitCache, cache_logits

__all__ = [
    "Anywhere",
    "Blocks",
    "CachingDenoiser",
    "CircuitAlone",
    "CircuitTraining",
    "Conditioned",
    "Conditioner",
    "CoupledDistribution",
    "CoupledHead",
    "DecodingConfig",
    "Denoiser",
    "DenoiserSpec",
    "DenoiserTraining",
    "DynamicWindows",
    "FeatureDenoiser",
    "Generation",
    "HeadMixture",
    "HubTokenizer",
    "JointHead",
    "JointTraining",
    "LatentPotentials",
    "LogitCache",
    "LowRankTransitions",
    "MarginalMatching",
    "MaskedLMDenoiser",
    "MixtureWeights",
    "NoiseCalibration",
    "Prediction",
    "TransformerConfig",
    "TransformerDenoiser",
    "TransitionGates",
    "baselines",
    "cache_logits",
    "codd",
    "compat",
    "constraints",
    "controls",
    "evaluation",
    "fit_coupled",
    "fit_jointly",
    "generate",
    "infill",
    "load_denoiser",
    "load_tokenizer",
    "log_likelihood",
    "masking",
    "testing",
    "train_denoiser",
]
