"""The further input families pass the conformance kit, with scipy as the oracle."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats

import circuits as ct

FEW = None if settings.default.max_examples >= 1000 else 8


class TestBinomial(ct.testing.FamilyTestCase):
    max_examples = FEW

    def distribution(self, draw):
        return ct.Binomial(draw(st.integers(1, 4)))

    def log_prob(self, distribution, parameters, values):
        return torch.as_tensor(stats.binom.logpmf(values, distribution.num_trials, parameters[0]))


class TestDiscretizedLogistic(ct.testing.FamilyTestCase):
    max_examples = FEW
    has_exact_m_step = False

    def distribution(self, draw):
        return ct.DiscretizedLogistic(draw(st.integers(2, 4)))


class TestLiteral(ct.testing.FamilyTestCase):
    max_examples = FEW
    has_exact_m_step = False

    def distribution(self, draw):
        return ct.Literal(3, (draw(st.integers(0, 2)),))

    def circuit(self, draw):
        """A mixture of products of single literals, since a literal names its units' values."""
        components = [ct.product(*(ct.inputs(var, 1, self.distribution(draw)) for var in range(2))) for _ in range(2)]
        return ct.Circuit(ct.sum(*components, num_units=1))


class TestEmbeddingCategorical(ct.testing.FamilyTestCase):
    max_examples = FEW
    has_exact_m_step = False

    def distribution(self, draw):
        return ct.EmbeddingCategorical(draw(st.integers(1, 4)), draw(st.integers(1, 2)))


class TestPoisson(ct.testing.DirectFamilyTestCase):
    max_examples = FEW

    def distribution(self, draw):
        return ct.Poisson()

    def log_prob(self, distribution, parameters, values):
        return torch.as_tensor(stats.poisson.logpmf(values, parameters[0]))


class TestGaussian(ct.testing.DirectFamilyTestCase):
    max_examples = FEW

    def distribution(self, draw):
        return ct.Gaussian()

    def log_prob(self, distribution, parameters, values):
        return torch.as_tensor(stats.norm.logpdf(values, parameters[0], parameters[1]))
