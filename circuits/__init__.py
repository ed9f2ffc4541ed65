"""Probabilistic circuits in PyTorch: build structures, compile them onto tensors, query them exactly, learn them."""

from circuits import learning, plot, properties, queries, structures, testing
from circuits.compile import CompiledCircuit, compile
from circuits.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretizedLogistic,
    Distribution,
    EmbeddingCategorical,
    Gaussian,
    Literal,
    Poisson,
)
from circuits.errors import (
    ArgumentError,
    CheckpointError,
    ImpossibleEvidenceError,
    PropertyError,
    StructureError,
    UnfactorError,
)
from circuits.evidence import Evidence
from circuits.graph import Circuit, Input, Node, Product, Sum, inputs, product, sum
from circuits.io import load, save
from circuits.region_graphs import RegionGraph

__all__ = [
    "ArgumentError",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "CheckpointError",
    "Circuit",
    "CompiledCircuit",
    "DiscretizedLogistic",
    "Distribution",
    "EmbeddingCategorical",
    "Evidence",
    "Gaussian",
    "ImpossibleEvidenceError",
    "Input",
    "Literal",
    "Node",
    "Poisson",
    "Product",
    "PropertyError",
    "RegionGraph",
    "StructureError",
    "Sum",
    "UnfactorError",
    "compile",
    "inputs",
    "learning",
    "load",
    "plot",
    "product",
    "properties",
    "queries",
    "save",
    "structures",
    "sum",
    "testing",
]
