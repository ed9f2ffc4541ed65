"""What learning does not need: continuous mixtures, LearnSPN, distillation, ensembles, a prior of smoothness.

``import circuits`` does not load it; ``ct.batteries`` does.
"""

from circuits.batteries.continuous import ContinuousMixture, normal_points
from circuits.batteries.distillation import distill_latents
from circuits.batteries.ensemble import convex_combination, convex_weights
from circuits.batteries.fit_continuous import (
    ContinuousMixtureFit,
    MixtureNetwork,
    MixtureTraining,
    fit_continuous_mixture,
)
from circuits.batteries.learnspn import learn_spn
from circuits.batteries.smoothness import roughness

__all__ = [
    "ContinuousMixture",
    "ContinuousMixtureFit",
    "MixtureNetwork",
    "MixtureTraining",
    "convex_combination",
    "convex_weights",
    "distill_latents",
    "fit_continuous_mixture",
    "learn_spn",
    "normal_points",
    "roughness",
]
