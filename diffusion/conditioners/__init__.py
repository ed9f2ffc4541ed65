"""Conditioners: what makes a head depend on the noise level and on the context."""

from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.circuit_alone import CircuitAlone
from diffusion.conditioners.latent_potentials import LatentPotentials
from diffusion.conditioners.low_rank_transitions import LowRankTransitions
from diffusion.conditioners.marginal_matching import MarginalMatching
from diffusion.conditioners.mixture_weights import MixtureWeights
from diffusion.conditioners.noise_calibration import NoiseCalibration
from diffusion.conditioners.transition_gates import TransitionGates

__all__ = [
    "CircuitAlone",
    "Conditioned",
    "Conditioner",
    "LatentPotentials",
    "LowRankTransitions",
    "MarginalMatching",
    "MixtureWeights",
    "NoiseCalibration",
    "TransitionGates",
    "register",
]
