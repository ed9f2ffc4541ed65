"""The library's own structures, families and semirings pass the conformance kit, and broken ones do not."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

import circuits as ct
from circuits.algebra.semirings import LogSemiring, MaxSemiring

IS_THOROUGH = settings.default.max_examples >= 1000
FEW = None if IS_THOROUGH else 8


class TestRandomCircuits(ct.testing.StructureTestCase):
    max_examples = None if IS_THOROUGH else 20

    def circuit(self, draw):
        return draw(ct.testing.circuits(max_vars=3, max_units=2, max_categories=3))


class TestHMM(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        sizes = [draw(st.integers(1, largest)) for largest in (4, 2, 3)]
        return ct.structures.hmm(*sizes, homogeneous=draw(st.booleans()))

    def log_joint(self, pc):
        """The forward algorithm, one assignment at a time."""
        length = pc.circuit.num_vars
        emission = [pc.log_weights(pc.circuit.node(f"emission{step}")) for step in range(length)]
        transition = [pc.log_weights(pc.circuit.node(f"transition{step}")) for step in range(length - 1)]
        table = torch.empty(pc.circuit.num_categories, dtype=torch.float64)
        for x in torch.cartesian_prod(*(torch.arange(count) for count in table.shape)).reshape(-1, length).tolist():
            state = pc.log_weights(pc.circuit.node("initial"))[0] + emission[0][x[0]]
            for step in range(1, length):
                state = torch.logsumexp(state.unsqueeze(1) + transition[step - 1], 0) + emission[step][x[step]]
            table[tuple(x)] = torch.logsumexp(state, 0).detach()
        return table


class TestMixture(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        categories = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        return ct.structures.mixture(len(categories), categories, draw(st.integers(1, 3)))


class TestFullyFactorized(ct.testing.StructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        categories = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        return ct.structures.fully_factorized(len(categories), categories)

    def log_joint(self, pc):
        """The outer product of the variables' tables."""
        table = torch.zeros((), dtype=torch.float64)
        for leaf in sorted(pc.circuit.inputs, key=lambda leaf: leaf.var):
            table = table.unsqueeze(-1) + pc.log_weights(leaf)[:, 0].detach()
        return table


class TestCategorical(ct.testing.FamilyTestCase):
    max_examples = FEW

    def distribution(self, draw):
        return ct.Categorical(draw(st.integers(1, 4)))

    def log_prob(self, distribution, parameters, values):
        return torch.distributions.Categorical(probs=parameters).log_prob(values)


class TestBernoulli(ct.testing.FamilyTestCase):
    max_examples = FEW

    def distribution(self, draw):
        return ct.Bernoulli()

    def log_prob(self, distribution, parameters, values):
        return torch.distributions.Bernoulli(probs=parameters[1]).log_prob(values.double())


class TestLogSemiring(ct.testing.SemiringTestCase):
    def semiring(self):
        return LogSemiring()

    def plus(self, left, right):
        return torch.logaddexp(left, right)

    def times(self, left, right):
        return left + right


class TestMaxSemiring(ct.testing.SemiringTestCase):
    def semiring(self):
        return MaxSemiring()

    def plus(self, left, right):
        return torch.maximum(left, right)

    def times(self, left, right):
        return left + right


class TestRandomClasses(ct.testing.ClassStructureTestCase):
    max_examples = None if IS_THOROUGH else 20

    def circuit(self, draw):
        return draw(ct.testing.circuits(max_vars=3, max_units=2, max_categories=3, max_classes=3))


class TestRatSPNWithClasses(ct.testing.ClassStructureTestCase):
    max_examples = FEW

    def circuit(self, draw):
        depth, repetitions, classes = (draw(st.integers(1, 2)) for _ in range(3))
        return ct.structures.rat_spn(3, depth, repetitions, 2, 2, num_classes=classes, seed=draw(st.integers(0, 9)))
