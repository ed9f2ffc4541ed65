"""Draw the pictures of structures and region graphs in ``docs/pictures``: ``python docs/draw_structures.py``."""

from pathlib import Path

import torch

import circuits as ct
from circuits import structures

TREE = [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]
FOLLOWS = [[True, True, False], [False, True, True], [True, False, True]]


def data():
    """Return rows in which variable i mostly copies variable (i - 1) // 2."""
    generator = torch.Generator().manual_seed(0)
    out = torch.randint(2, (2000, 6), generator=generator)
    for var in range(1, 6):
        copies = torch.rand(2000, generator=generator) < 0.7
        out[:, var] = torch.where(copies, out[:, (var - 1) // 2], out[:, var])
    return out


CIRCUITS = {
    "fully_factorized": lambda: structures.fully_factorized(4, 2),
    "mixture": lambda: structures.mixture(4, 2, 3),
    "mixture_of": lambda: structures.mixture_of([structures.hmm(3, 4, 2), structures.fully_factorized(3, 2)]),
    "block_mixture": lambda: structures.block_mixture([[0, 1], [2, 3]], 3, 2),
    "naive_bayes": lambda: structures.naive_bayes(4, 2, 3),
    "hmm": lambda: structures.hmm(4, 8, 5),
    "hmm_of_two_variables": lambda: structures.hmm(3, 8, [5, ct.Gaussian()]),
    "hmm_of_two_classes": lambda: structures.hmm(3, 8, 5, num_classes=2),
    "low_rank_hmm": lambda: structures.low_rank_hmm(4, 8, 5, 2),
    "monarch_hmm": lambda: structures.monarch_hmm(3, (2, 2), 5),
    "block_sparse_hmm": lambda: structures.block_sparse_hmm(3, [4, 4, 4], 5, FOLLOWS),
    "second_order_hmm": lambda: structures.second_order_hmm(4, 2, 5),
    "latent_tree": lambda: structures.latent_tree(TREE, 4, 2),
    "hclt": lambda: structures.hclt(data(), 4, 2),
    "hclt_mixture": lambda: structures.hclt(data()[:, :4], 4, 2, num_trees=2, seed=0),
    "rat_spn": lambda: structures.rat_spn(4, 2, 2, 2, 2, seed=0),
    "poon_domingos": lambda: structures.poon_domingos((1, 3), 1, 4, 2),
    "quad_tree": lambda: structures.quad_tree((2, 2), 4, 2),
    "quad_graph": lambda: structures.quad_graph((2, 2), 4, 2),
    "linear_tree": lambda: structures.linear_tree(4, 4, 2),
    "learn_spn": lambda: ct.batteries.learn_spn(data()[:300, :4], min_rows=150, seed=0),
}

REGION_GRAPHS = {
    "fully_factorized": lambda: ct.RegionGraph.fully_factorized(6),
    "linear_tree": lambda: ct.RegionGraph.linear_tree(5),
    "random_binary_tree": lambda: ct.RegionGraph.random_binary_tree(8, 3, 2, seed=0),
    "poon_domingos": lambda: ct.RegionGraph.poon_domingos((2, 3), 1),
    "quad_tree": lambda: ct.RegionGraph.quad_tree((4, 4)),
    "quad_graph": lambda: ct.RegionGraph.quad_graph((2, 4)),
    "chow_liu_tree": lambda: ct.RegionGraph.chow_liu_tree(data()),
}


def main() -> None:
    """Draw all of them."""
    folder = Path(__file__).parent / "pictures"
    for name, build in CIRCUITS.items():
        ct.plot.structure(build(), folder / f"{name}.png", engine="matplotlib")
    for name, build in REGION_GRAPHS.items():
        ct.plot.region_graph(build(), folder / f"region_graph_{name}.png", engine="matplotlib")


if __name__ == "__main__":
    main()
