"""Conditioners: what makes a head depend on the noise level and on the context."""

from diffusion.conditioners.noise_calibration import NoiseCalibration

__all__ = ["NoiseCalibration"]
