"""Input families: the univariate distributions that input units are made of.

A new family is one subclass of :class:`Finite` (finitely many values: give its log-table) or of :class:`Direct` (give
its log-density); queries, learning and saving need nothing else.
"""

from circuits.families.base import FAMILIES, Direct, Distribution, Finite
from circuits.families.direct import Gaussian, Poisson
from circuits.families.finite import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretizedLogistic,
    EmbeddingCategorical,
    Literal,
)

__all__ = [
    "FAMILIES",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Direct",
    "DiscretizedLogistic",
    "Distribution",
    "EmbeddingCategorical",
    "Finite",
    "Gaussian",
    "Literal",
    "Poisson",
]
