"""Probabilistic circuits in PyTorch: build structures, compile them onto tensors, query them exactly, learn them."""

from typing import TYPE_CHECKING, Any

from circuits import interop, learning, plot, properties, queries, structures, testing, transforms, weights
from circuits.algebra import semirings
from circuits.algebra.semirings import Semiring
from circuits.constrained import ConstrainedDistribution
from circuits.distribution import CircuitDistribution
from circuits.engine.compile import CompiledCircuit, compile
from circuits.engine.weights import CircuitWeights
from circuits.errors import (
    ArgumentError,
    CheckpointError,
    ImpossibleEvidenceError,
    Interrupted,
    PropertyError,
    StorageError,
    StructureError,
    UnfactorError,
)
from circuits.evidence import Evidence
from circuits.families import (
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
from circuits.io import hub, load, save
from circuits.queries import evaluate
from circuits.randomness import RowGenerators
from circuits.region_graphs import RegionGraph
from circuits.symbolic import Circuit, Input, Node, Product, Sum, inputs, product, sum

if TYPE_CHECKING:
    from circuits import batteries
    from circuits.sklearn.density import CircuitDensity

__all__ = [
    "ArgumentError",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "CheckpointError",
    "Circuit",
    "CircuitDensity",
    "CircuitDistribution",
    "CircuitWeights",
    "CompiledCircuit",
    "ConstrainedDistribution",
    "DiscretizedLogistic",
    "Distribution",
    "EmbeddingCategorical",
    "Evidence",
    "Gaussian",
    "ImpossibleEvidenceError",
    "Input",
    "Interrupted",
    "Literal",
    "Node",
    "Poisson",
    "Product",
    "PropertyError",
    "RegionGraph",
    "RowGenerators",
    "Semiring",
    "StorageError",
    "StructureError",
    "Sum",
    "UnfactorError",
    "batteries",
    "compile",
    "evaluate",
    "hub",
    "inputs",
    "interop",
    "learning",
    "load",
    "plot",
    "product",
    "properties",
    "queries",
    "save",
    "semirings",
    "structures",
    "sum",
    "testing",
    "transforms",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "CircuitDensity":  # scikit-learn is optional, and takes a while to import
        from circuits.sklearn.density import CircuitDensity

        return CircuitDensity
    if name == "batteries":
        import circuits.batteries

        return circuits.batteries
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
