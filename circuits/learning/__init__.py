"""Learning weights by maximum likelihood: expected flows, the EM family, and a fit loop with checkpoints."""

from circuits.learning.clusters import kmeans
from circuits.learning.distillation import distill_latents, initialize_by_kmeans
from circuits.learning.distributed import join_processes
from circuits.learning.em import AnemoneState, ExpectedFlows, anemone_step, em_step, expected_flows, top_down_flows
from circuits.learning.fit import FitResult, fit
from circuits.learning.initialization import initialize_inputs

__all__ = [
    "AnemoneState",
    "ExpectedFlows",
    "FitResult",
    "anemone_step",
    "distill_latents",
    "em_step",
    "expected_flows",
    "fit",
    "initialize_by_kmeans",
    "initialize_inputs",
    "join_processes",
    "kmeans",
    "top_down_flows",
]
