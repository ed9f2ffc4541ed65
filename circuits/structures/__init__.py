"""Well-known circuit structures: functions that return a :class:`~circuits.symbolic.Circuit`."""

from circuits.region_graphs.chow_liu import empirical_mutual_information, maximum_spanning_tree
from circuits.structures.basic import fully_factorized, mixture, mixture_of, naive_bayes
from circuits.structures.blocks import block_mixture, correlated_blocks
from circuits.structures.hmm import block_sparse_hmm, hmm, low_rank_hmm, monarch_hmm, second_order_hmm
from circuits.structures.latent_tree import hclt, latent_tree
from circuits.structures.regions import from_region_graph, linear_tree, poon_domingos, quad_graph, quad_tree, rat_spn

__all__ = [
    "block_mixture",
    "block_sparse_hmm",
    "correlated_blocks",
    "empirical_mutual_information",
    "from_region_graph",
    "fully_factorized",
    "hclt",
    "hmm",
    "latent_tree",
    "linear_tree",
    "low_rank_hmm",
    "maximum_spanning_tree",
    "mixture",
    "mixture_of",
    "monarch_hmm",
    "naive_bayes",
    "poon_domingos",
    "quad_graph",
    "quad_tree",
    "rat_spn",
    "second_order_hmm",
]
