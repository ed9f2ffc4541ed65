"""The further input families pass the conformance kit, with scipy as the oracle."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats

import circuits as ct

if not hasattr(ct, "Gaussian"):
    pytest.skip("this version has no further families", allow_module_level=True)

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
