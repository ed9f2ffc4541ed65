"""From a plan to the layers that are evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.engine.addressing import ParameterRows
from circuits.engine.input_layers import DirectLayer, InputLayer, TableLayer
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.engine.plan import Plan
from circuits.families import Direct
from circuits.symbolic import Input, Node, ParametricNode, Product, Sum, parameter_owner


def built_layer(
    plan: Plan, nodes: Sequence[Node], num_vars: int, dtype: torch.dtype
) -> InputLayer | ProductLayer | SumLayer:
    """Return the layer of nodes that a plan evaluates together."""
    first = nodes[0]
    children = [[plan.addresses[child] for child in node.children] for node in nodes]
    child_units = [child.num_units for child in first.children]
    if isinstance(first, Product):
        return ProductLayer(children, child_units, first.mode)
    owners = [plan.bank_addresses[parameter_owner(node)] for node in nodes if isinstance(node, ParametricNode)]
    parameters = ParameterRows(owners[0][0], [row for _, row in owners])
    if isinstance(first, Sum):
        num_siblings = len(nodes) // len({node.children for node in nodes})
        position = plan.addresses[first][0]
        return SumLayer(children, child_units, parameters, position=position, num_siblings=num_siblings)
    variables = [node.var for node in nodes if isinstance(node, Input)]
    family = plan.families[parameters.bank]
    if isinstance(family, Direct):
        return DirectLayer(variables, parameters, num_vars, family, dtype)
    return TableLayer(variables, parameters, num_vars)
