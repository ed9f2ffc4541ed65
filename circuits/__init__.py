"""Probabilistic circuits in PyTorch: build structures, compile them onto tensors, query them exactly, learn them."""

from circuits import hub, interop, learning, queries, structures, testing, transforms
from circuits.compile import CompiledCircuit, compile
from circuits.distributions import Bernoulli, Categorical
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
from circuits.torch_distribution import CircuitDistribution

__all__ = [
    "ArgumentError",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "Circuit",
    "CircuitDistribution",
    "CompiledCircuit",
    "Evidence",
    "ImpossibleEvidenceError",
    "Input",
    "Node",
    "Product",
    "PropertyError",
    "StructureError",
    "Sum",
    "UnfactorError",
    "compile",
    "hub",
    "inputs",
    "interop",
    "learning",
    "load",
    "product",
    "queries",
    "save",
    "structures",
    "sum",
    "testing",
    "transforms",
]
