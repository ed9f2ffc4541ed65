"""Symbolic circuits: nodes, what is below one root, and scopes."""

from circuits.symbolic.circuit import Circuit
from circuits.symbolic.nodes import (
    Input,
    Node,
    ParametricNode,
    Product,
    ProductMode,
    Sum,
    inputs,
    num_free_parameters,
    parameter_owner,
    product,
    sum,
)
from circuits.symbolic.scopes import format_scope

__all__ = [
    "Circuit",
    "Input",
    "Node",
    "ParametricNode",
    "Product",
    "ProductMode",
    "Sum",
    "format_scope",
    "inputs",
    "num_free_parameters",
    "parameter_owner",
    "product",
    "sum",
]
