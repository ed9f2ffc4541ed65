"""Conditioners: what makes a head depend on the noise level and on the context."""

from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.latent_potentials import LatentPotentials
from diffusion.conditioners.noise_calibration import NoiseCalibration

__all__ = ["Conditioned", "Conditioner", "LatentPotentials", "NoiseCalibration", "register"]
