"""Learning weights by maximum likelihood: expected flows, the EM family, and a fit loop with checkpoints."""

from circuits.learning.clusters import kmeans
from circuits.learning.continuous import ContinuousMixture, normal_points
from circuits.learning.distillation import distill_latents, initialize_by_kmeans
from circuits.learning.distributed import join_processes
from circuits.learning.em import AnemoneState, ExpectedFlows, anemone_step, em_step, expected_flows, top_down_flows
from circuits.learning.ensemble import convex_combination, convex_weights
from circuits.learning.fit import FitResult, fit
from circuits.learning.fit_continuous import ContinuousMixtureFit, fit_continuous_mixture
from circuits.learning.hard import viterbi_flows
from circuits.learning.initialization import initialize_inputs
from circuits.learning.smoothness import roughness

__all__ = [
    "AnemoneState",
    "ContinuousMixture",
    "ContinuousMixtureFit",
    "ExpectedFlows",
    "FitResult",
    "anemone_step",
    "convex_combination",
    "convex_weights",
    "distill_latents",
    "em_step",
    "expected_flows",
    "fit",
    "fit_continuous_mixture",
    "initialize_by_kmeans",
    "initialize_inputs",
    "join_processes",
    "kmeans",
    "normal_points",
    "roughness",
    "top_down_flows",
    "viterbi_flows",
]
