"""Learning weights by maximum likelihood: expected flows, the EM family, and one resumable loop for all fits."""

from circuits.learning.clusters import kmeans
from circuits.learning.distributed import join_processes
from circuits.learning.em import AnemoneState, anemone_step, em_step
from circuits.learning.fit import FitResult, fit
from circuits.learning.initialization import initialize_inputs
from circuits.learning.kmeans_start import initialize_by_kmeans
from circuits.learning.loop import EarlyStopping
from circuits.learning.optimizers import EM, Anemone, GradientDescent, MiniBatchEM, ViterbiEM
from circuits.learning.samples import Samples
from circuits.learning.selection import StructureChoice, StructureScore, choose_fitted, choose_structure
from circuits.queries.flows import ExpectedFlows, expected_flows, top_down_flows, viterbi_flows

__all__ = [
    "EM",
    "Anemone",
    "AnemoneState",
    "EarlyStopping",
    "ExpectedFlows",
    "FitResult",
    "GradientDescent",
    "MiniBatchEM",
    "Samples",
    "StructureChoice",
    "StructureScore",
    "ViterbiEM",
    "anemone_step",
    "choose_fitted",
    "choose_structure",
    "em_step",
    "expected_flows",
    "fit",
    "initialize_by_kmeans",
    "initialize_inputs",
    "join_processes",
    "kmeans",
    "top_down_flows",
    "viterbi_flows",
]
