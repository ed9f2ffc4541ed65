"""The structures of the library pass the conformance kit, at small sizes."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

import circuits as ct

FEW = None if settings.default.max_examples >= 1000 else 2
SEED = st.integers(0, 100)


class TestNaiveBayes(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        categories = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        return ct.structures.naive_bayes(len(categories), categories, draw(st.integers(1, 3)))


class TestLatentTree(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        tree = draw(st.sampled_from([[(0, 1), (1, 2)], [(0, 1), (0, 2)], [("z", 0), ("z", 1), ("z", 2)]]))
        return ct.structures.latent_tree(tree, draw(st.integers(1, 2)), 2)


class TestHCLT(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        data = torch.randint(2, (12, 3), generator=torch.Generator().manual_seed(draw(SEED)))
        return ct.structures.hclt(data, draw(st.integers(1, 2)), 2)


class TestLearnSPN(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        seed = draw(SEED)
        data = torch.randint(2, (40, 3), generator=torch.Generator().manual_seed(seed))
        data[:, 1] = data[:, 0]
        return ct.batteries.learn_spn(data, num_categories=2, min_rows=20, seed=seed)


class TestLowRankHMM(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.low_rank_hmm(draw(st.integers(1, 3)), 2, 2, draw(st.integers(1, 2)))


class TestBlockSparseHMM(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.block_sparse_hmm(draw(st.integers(1, 3)), [1, 1], 2, [[True, True], [False, True]])


class TestMonarchHMM(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.monarch_hmm(draw(st.integers(1, 3)), (2, draw(st.integers(1, 2))), 2)


class TestSecondOrderHMM(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.second_order_hmm(draw(st.integers(1, 3)), 2, 2)


class TestRatSPN(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.rat_spn(3, 1, draw(st.integers(1, 2)), 2, 2, seed=draw(SEED))


class TestPoonDomingos(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.poon_domingos(draw(st.sampled_from([(1, 2), (2, 2), (1, 3)])), 1, 1, 2)


class TestQuadTree(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.quad_tree((2, 2), draw(st.integers(1, 2)), 2, num_splits=draw(st.sampled_from([2, 4])))


class TestQuadGraph(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.quad_graph(draw(st.sampled_from([(1, 2), (2, 2)])), 1, 2)


class TestLinearTree(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        return ct.structures.linear_tree(draw(st.integers(1, 3)), 2, 2)


class TestTucker(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        graph = ct.RegionGraph.linear_tree(draw(st.integers(2, 3)))
        return ct.structures.from_region_graph(
            graph, 2, 2, num_input_units=draw(st.integers(1, 2)), sum_product="tucker"
        )


class TestSharedCP(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        graph = ct.RegionGraph.linear_tree(draw(st.integers(2, 3)))
        return ct.structures.from_region_graph(graph, draw(st.integers(1, 2)), 2, sum_product="cp_shared")
