"""Blocks join what shares most information, and a block mixture is the mixture of products of tables that it says."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.structures import block_mixture, correlated_blocks

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@st.composite
def partitions(draw):
    num_vars = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, 2), min_size=num_vars, max_size=num_vars))
    categories = draw(st.lists(st.integers(1, 3), min_size=num_vars, max_size=num_vars))
    order = draw(st.permutations(range(num_vars)))
    blocks = [[var for var in order if labels[var] == label] for label in sorted(set(labels))]
    return blocks, categories


@given(partitions(), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=15)
def test_density_is_the_mixture_of_products_of_tables(partition, num_components, seed):
    blocks, categories = partition
    pc = ct.compile(block_mixture(blocks, num_components, categories), dtype=torch.float64, seed=seed)
    shares = pc.log_weights(pc.circuit.node("components"))[0].exp()
    expected = torch.zeros(*categories, dtype=torch.float64)
    for values in itertools.product(*(range(count) for count in categories)):
        factors = shares.clone()
        for position, block in enumerate(blocks):
            column = 0
            for var in block:
                column = column * categories[var] + values[var]
            factors *= pc.log_weights(pc.circuit.node(f"table{position}"))[:, column].exp()
        expected[values] = factors.sum()
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), expected, **CLOSE)


class TestBlockMixture(ct.testing.StructureTestCase):
    max_examples = 6

    def circuit(self, draw):
        categories = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        size = draw(st.integers(1, 3))
        blocks = [range(start, min(start + size, len(categories))) for start in range(0, len(categories), size)]
        return block_mixture(blocks, draw(st.integers(1, 3)), categories)


def greedy_blocks(information, values, max_values):
    """Merge the best pair again and again, looking at all pairs every time."""
    blocks = [[var] for var in range(len(information))]

    def size(block):
        return torch.tensor([values[var] for var in block]).prod()

    def shared(pair):
        return float(information[pair[0]][:, pair[1]].sum())

    while True:
        pairs = [p for p in itertools.combinations(blocks, 2) if size(p[0]) * size(p[1]) <= max_values]
        if not pairs:
            return sorted(tuple(sorted(block)) for block in blocks)
        best = max(pairs, key=shared)
        blocks = [block for block in blocks if block not in best] + [best[0] + best[1]]


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=50)
def test_blocks_are_those_of_the_exhaustive_greedy_search(num_vars, max_values, seed):
    generator = torch.Generator().manual_seed(seed)
    information = torch.rand(num_vars, num_vars, generator=generator, dtype=torch.float64)
    information = information + information.t()
    categories = torch.randint(1, 4, (num_vars,), generator=generator).tolist()
    blocks = correlated_blocks(information, categories, max_values=max_values)
    assert blocks == greedy_blocks(information, categories, max_values)


def test_blocks_of_data_join_copies():
    x = torch.randint(0, 2, (400, 3), generator=torch.Generator().manual_seed(0))
    data = torch.cat([x, x.flip(1)], 1)
    information = ct.structures.empirical_mutual_information(data)
    assert correlated_blocks(information, 2, max_values=4) == [(0, 5), (1, 4), (2, 3)]


def test_arguments_are_checked():
    with pytest.raises(ct.StructureError, match="exactly one block"):
        block_mixture([[0, 1], [1]], 2, 2)
    with pytest.raises(ct.StructureError, match="exactly one block"):
        block_mixture([[0, 2]], 2, 2)
    with pytest.raises(ct.ArgumentError, match="num_components"):
        block_mixture([[0]], 0, 2)
    with pytest.raises(ct.ArgumentError, match="num_categories"):
        block_mixture([[0], [1]], 1, [2, 2, 2])
    with pytest.raises(ct.ArgumentError, match="information"):
        correlated_blocks(torch.zeros(2, 3), 2)
    with pytest.raises(ct.ArgumentError, match="max_values"):
        correlated_blocks(torch.zeros(2, 2), 2, max_values=0)
