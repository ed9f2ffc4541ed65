"""Exact queries on compiled circuits, one file per topic; every function works on a batch of B queries at once."""

from circuits.queries.automata import Automaton, automaton_log_probability, order_log_probability
from circuits.queries.basic import (
    log_conditional,
    log_likelihood,
    log_marginal,
    log_partition,
    marginals,
)
from circuits.queries.components import component_log_partition
from circuits.queries.cumulative import log_cdf
from circuits.queries.deterministic import DeterministicAutomaton
from circuits.queries.divergences import (
    cauchy_schwarz_divergence,
    cross_entropy,
    kl_divergence,
    log_inner_product,
    renyi_divergence,
)
from circuits.queries.entropy import EntropyBounds, entropy, entropy_bounds, latent_entropy
from circuits.queries.expectations import covariance, expectation, mean, moments, variance
from circuits.queries.explanations import MAP, MPE, mpe, sample
from circuits.queries.k_best import KBestAssignments, KBestExplanations, k_best
from circuits.queries.latents import LatentChoice, best_latents, class_posterior, latent_marginals, sample_latents
from circuits.queries.pairwise import mutual_information, pairwise_marginals
from circuits.queries.posterior import Posterior, listed_marginals, posterior
from circuits.queries.semiring import evaluate
from circuits.queries.viterbi import Viterbi, viterbi
from circuits.queries.without_replacement import DistinctSamples, sample_without_replacement

__all__ = [
    "MAP",
    "MPE",
    "Automaton",
    "DeterministicAutomaton",
    "DistinctSamples",
    "EntropyBounds",
    "KBestAssignments",
    "KBestExplanations",
    "LatentChoice",
    "Posterior",
    "Viterbi",
    "automaton_log_probability",
    "best_latents",
    "cauchy_schwarz_divergence",
    "class_posterior",
    "component_log_partition",
    "covariance",
    "cross_entropy",
    "entropy",
    "entropy_bounds",
    "evaluate",
    "expectation",
    "k_best",
    "kl_divergence",
    "latent_entropy",
    "latent_marginals",
    "listed_marginals",
    "log_cdf",
    "log_conditional",
    "log_inner_product",
    "log_likelihood",
    "log_marginal",
    "log_partition",
    "marginals",
    "mean",
    "moments",
    "mpe",
    "mutual_information",
    "order_log_probability",
    "pairwise_marginals",
    "posterior",
    "renyi_divergence",
    "sample",
    "sample_latents",
    "sample_without_replacement",
    "variance",
    "viterbi",
]
