"""Exact queries on compiled circuits, one file per topic; every function works on a batch of B queries at once."""

from circuits.queries.basic import (
    MAP,
    MPE,
    log_conditional,
    log_likelihood,
    log_marginal,
    log_partition,
    marginals,
    mpe,
    sample,
)
from circuits.queries.cumulative import log_cdf
from circuits.queries.expectations import covariance, expectation, mean, moments, variance
from circuits.queries.k_best import KBestAssignments, KBestExplanations, k_best
from circuits.queries.pairwise import mutual_information, pairwise_marginals
from circuits.queries.without_replacement import DistinctSamples, sample_without_replacement

__all__ = [
    "MAP",
    "MPE",
    "DistinctSamples",
    "KBestAssignments",
    "KBestExplanations",
    "covariance",
    "expectation",
    "k_best",
    "log_cdf",
    "log_conditional",
    "log_likelihood",
    "log_marginal",
    "log_partition",
    "marginals",
    "mean",
    "moments",
    "mpe",
    "mutual_information",
    "pairwise_marginals",
    "sample",
    "sample_without_replacement",
    "variance",
]
