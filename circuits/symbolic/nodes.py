"""The vocabulary of circuits: input, product and sum nodes, each a vector of units over one scope, checked when built.

Nodes are immutable. Children of a product have disjoint scopes (decomposable), children of a sum have the same scope
(smooth), and nodes that share parameters need parameters of one shape.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.families import Categorical, Distribution
from circuits.symbolic.flat import reduced
from circuits.symbolic.scopes import bit_of, format_scope, variables_of

ProductMode = Literal["elementwise", "outer"]


class Node:
    """A vector of ``num_units`` units over one scope. Build nodes with ``inputs``, ``product`` and ``sum``."""

    num_units: int
    children: tuple[Node, ...]
    name: str | None
    scope_bits: int
    """The scope as a bit set: bit ``v`` is set when variable ``v`` belongs to it."""

    def __setattr__(self, attribute: str, value: object) -> None:
        if getattr(self, "_is_built", False):
            raise AttributeError(f"nodes are immutable: cannot set {attribute!r} on {self}; build a new node instead")
        super().__setattr__(attribute, value)

    def __deepcopy__(self, memo: dict[int, object]) -> Node:
        """Return the node itself, for it never changes: a copied circuit knows the nodes of the first."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle flat records, not one node inside of the other: recursion would end long chains."""
        return reduced(self)

    @property
    def scope(self) -> frozenset[int]:
        """The variables that this node is a distribution over."""
        return frozenset(variables_of(self.scope_bits))

    def __repr__(self) -> str:
        label = f", name={self.name!r}" if self.name else ""
        return f"{type(self).__name__}(num_units={self.num_units}, scope={format_scope(self.scope_bits)}{label})"


class Input(Node):
    """Units that are univariate distributions of one family on one variable."""

    def __init__(
        self,
        var: int,
        num_units: int,
        distribution: Distribution,
        *,
        tied_to: Input | None,
        weights: Tensor | None,
        name: str | None,
    ) -> None:
        self.var, self.scope_bits = var, bit_of(var)
        self.num_units = checked_count("num_units", num_units)
        if not isinstance(distribution, Distribution):
            raise ArgumentError(
                f"distribution: expected an input family such as ct.Categorical(3), got {distribution!r}"
            )
        self.distribution = distribution
        self.children = ()
        self.name = _checked_name(name)
        self.parameter_shape = distribution.parameter_shape(num_units)
        self.tied_to = _checked_tie(self, tied_to)
        self.weights = _checked_weights(self, weights, normalised_axis=0)
        self._is_built = True


class Product(Node):
    """Units that multiply one unit of every child; the children's scopes are disjoint."""

    def __init__(self, children: Sequence[Node], mode: ProductMode, *, name: str | None) -> None:
        self.children = _checked_children("product", children)
        if mode not in ("elementwise", "outer"):
            raise ArgumentError(f"mode: expected 'elementwise' or 'outer', got {mode!r}")
        self.mode = mode
        self.name = _checked_name(name)
        self.scope_bits = 0
        for position, child in enumerate(self.children):
            if self.scope_bits & child.scope_bits:
                other = next(c for c in self.children[:position] if c.scope_bits & child.scope_bits)
                raise StructureError(
                    f"product is not decomposable: {other} and {child} share the variables "
                    f"{format_scope(other.scope_bits & child.scope_bits)}; expected disjoint scopes below a product"
                )
            self.scope_bits |= child.scope_bits
        if mode == "elementwise":
            self.num_units = self.children[0].num_units
            for child in self.children[1:]:
                if child.num_units != self.num_units:
                    raise StructureError(
                        f"unit mismatch in an elementwise product: {self.children[0]} has {self.num_units} units and "
                        f"{child} has {child.num_units}; give them as many units each, or use mode='outer'"
                    )
        else:
            self.num_units = math.prod(child.num_units for child in self.children)
        self._is_built = True


class Sum(Node):
    """Units that are mixtures of all units of all children, or of one unit of each; the children's scopes are equal."""

    def __init__(
        self,
        children: Sequence[Node],
        num_units: int,
        *,
        unit: int | None,
        tied_to: Sum | None,
        weights: Tensor | None,
        name: str | None,
    ) -> None:
        self.children = _checked_children("sum", children)
        self.num_units = checked_count("num_units", num_units)
        self.name = _checked_name(name)
        self.scope_bits = self.children[0].scope_bits
        for child in self.children[1:]:
            if child.scope_bits != self.scope_bits:
                raise StructureError(
                    f"sum is not smooth: {self.children[0]} and {child} have different scopes; expected "
                    "the same scope below a sum (multiply the smaller one with inputs on the missing variables)"
                )
        sizes = [child.num_units for child in self.children]
        if unit is not None and (len(set(sizes)) > 1 or checked_count("unit", unit, 0) >= sizes[0]):
            raise StructureError(f"unit: expected one that all children have, of equally many, got {unit} of {sizes}")
        self.unit = unit
        self.parameter_shape = (num_units, builtins.sum(sizes) if unit is None else len(sizes))
        self.tied_to = _checked_tie(self, tied_to)
        self.weights = _checked_weights(self, weights, normalised_axis=1)
        self._is_built = True

    def mixed(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Put what the children's units have, along ``dim``, side by side; of those units that are mixed."""
        own = parts if self.unit is None else [part.narrow(dim, self.unit, 1) for part in parts]
        return torch.cat(list(own), dim)


ParametricNode = Input | Sum


def inputs(
    var: int,
    num_units: int,
    distribution: Distribution,
    *,
    tied_to: Input | None = None,
    weights: Tensor | None = None,
    name: str | None = None,
) -> Input:
    """Build a vector of input units on one variable.

    Args:
        var: the variable, an integer >= 0.
        num_units: K, how many units.
        distribution: the input family, for instance ``ct.Categorical(3)``.
        tied_to: another input node whose parameters this one uses; families and units must be the same.
        weights: initial parameters; for categorical families probabilities of shape (C, K), every column sums to 1;
            for others see the family; random when omitted.
        name: a label for messages and for access to parameters.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: the parameters of ``tied_to`` do not fit, or the variable is not a valid one.
    """
    return Input(var, num_units, distribution, tied_to=tied_to, weights=weights, name=name)


def product(*children: Node, mode: ProductMode = "elementwise", name: str | None = None) -> Product:
    """Build product units: unit k multiplies unit k of every child, or every combination with ``mode="outer"``.

    Args:
        children: two or more nodes (one is allowed) with disjoint scopes.
        mode: "elementwise" needs children with equally many units, K of them; "outer" makes all combinations, the last
            child's units varying fastest.
        name: a label for messages.

    Raises:
        StructureError: overlapping scopes, or unequal numbers of units in an elementwise product.
    """
    return Product(children, mode, name=name)


def sum(
    *children: Node,
    num_units: int,
    unit: int | None = None,
    tied_to: Sum | None = None,
    weights: Tensor | None = None,
    name: str | None = None,
) -> Sum:
    """Build dense sum units: each is a mixture of all units of all children, or of one unit of each child.

    Args:
        children: nodes with the same scope, I units together.
        num_units: K, how many mixtures.
        unit: mix only this unit of every child: I is the number of children, which have equally many units.
        tied_to: another sum node whose parameters this one uses; its weights must have the same shape.
        weights: initial mixture weights, shape (K, I), rows sum to 1, zeros allowed; random when omitted.
        name: a label for messages and for access to parameters.

    Raises:
        StructureError: different scopes, the parameters of ``tied_to`` do not fit, or the children have no such unit.
    """
    return Sum(children, num_units, unit=unit, tied_to=tied_to, weights=weights, name=name)


def parameter_owner(node: ParametricNode) -> ParametricNode:
    """Return the node that the parameters of ``node`` belong to: itself, or the end of its chain of ties."""
    while node.tied_to is not None:
        node = node.tied_to
    return node


def num_free_parameters(node: ParametricNode, raw: Tensor | None = None) -> int:
    """Return how many numbers the units of a node depend on: with these raw parameters, or those it was given."""
    if raw is None and node.weights is not None:
        raw = node.distribution.raw(node.weights) if isinstance(node, Input) else node.weights.log()
    if isinstance(node, Input):
        return node.distribution.num_free_parameters(node.num_units, raw)
    num_weights = math.prod(node.parameter_shape) if raw is None else int((raw > -torch.inf).sum())
    return num_weights - node.num_units


def _checked_name(name: str | None) -> str | None:
    if name is not None and (not isinstance(name, str) or not name):
        raise ArgumentError(f"name: expected a non-empty string or None, got {name!r}")
    return name


def _checked_children(kind: str, children: Sequence[Node]) -> tuple[Node, ...]:
    if not children:
        raise ArgumentError(f"{kind}: expected at least one child node, got none")
    for child in children:
        if not isinstance(child, Node):
            raise ArgumentError(f"{kind}: expected nodes as children, got {child!r}; pass them as separate arguments")
    return tuple(children)


def _checked_tie(node: ParametricNode, tied_to: ParametricNode | None) -> ParametricNode | None:
    if tied_to is None:
        return None
    if type(tied_to) is not type(node):
        raise StructureError(f"tied_to: {node} can only use the parameters of its own kind of node, got {tied_to!r}")
    if tied_to.parameter_shape != node.parameter_shape:
        raise StructureError(
            f"tied_to: expected weights of shape {node.parameter_shape} for {node}, got {tied_to.parameter_shape} of "
            f"{tied_to}"
        )
    if isinstance(node, Input) and isinstance(tied_to, Input) and node.distribution != tied_to.distribution:
        raise StructureError(
            f"tied_to: expected the family of {node}, {node.distribution!r}, got {tied_to.distribution!r} of {tied_to}"
        )
    return tied_to


def _checked_weights(node: ParametricNode, weights: Tensor | None, normalised_axis: int) -> Tensor | None:
    if weights is None:
        return None
    if node.tied_to is not None:
        raise ArgumentError(f"weights: {node} is tied to {node.tied_to}; give the weights to that node")
    weights = torch.as_tensor(weights).detach().clone()
    if not weights.is_floating_point() or tuple(weights.shape) != node.parameter_shape:
        raise StructureError(
            f"weights: expected floating-point weights of shape {node.parameter_shape} for {node}, got "
            f"{tuple(weights.shape)} of {weights.dtype}"
        )
    if isinstance(node, Input) and not isinstance(node.distribution.stored_as, Categorical):
        problem = node.distribution.problem(weights)
        if problem:
            raise ArgumentError(f"weights: {problem}, for {node} of {node.distribution}")
        return weights
    totals = weights.double().sum(normalised_axis)
    if bool((weights < 0).any()) or not torch.allclose(totals, torch.ones_like(totals), atol=1e-4):
        raise ArgumentError(
            f"weights: expected weights >= 0 that sum to 1 along axis {normalised_axis} for {node}; the least weight "
            "is "
            f"{float(weights.min()):.6g} and sums lie in [{float(totals.min()):.6g}, {float(totals.max()):.6g}]"
        )
    return weights
