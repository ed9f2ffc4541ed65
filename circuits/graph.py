"""Symbolic circuits: immutable nodes, each a vector of units over one scope, checked when they are built.

A circuit is a directed acyclic graph of *input*, *product* and *sum* nodes (Choi, Vergari, Van den Broeck 2020,
"Probabilistic Circuits"). Children of a product have disjoint scopes (decomposable), children of a sum have the same
scope (smooth); both are enforced here, so every :class:`Circuit` admits exact marginals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from circuits.distributions import Categorical, Distribution
from circuits.errors import ArgumentError, StructureError

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

    @property
    def scope(self) -> frozenset[int]:
        """The variables that this node is a distribution over."""
        return frozenset(_variables_of(self.scope_bits))

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
        self.var = _checked_variable(var)
        self.num_units = _checked_count("num_units", num_units)
        if not isinstance(distribution, Distribution):
            raise ArgumentError(
                f"distribution: expected an input family such as ct.Categorical(3), got {distribution!r}"
            )
        self.distribution = distribution
        self.children = ()
        self.name = _checked_name(name)
        self.scope_bits = 1 << var
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
                    f"{format_scope(other.scope_bits & child.scope_bits)}; children of a product need disjoint scopes"
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
            self.num_units = 1
            for child in self.children:
                self.num_units *= child.num_units
        self._is_built = True


class Sum(Node):
    """Units that are mixtures of all units of all children; the children's scopes are the same."""

    def __init__(
        self,
        children: Sequence[Node],
        num_units: int,
        *,
        tied_to: Sum | None,
        weights: Tensor | None,
        name: str | None,
    ) -> None:
        self.children = _checked_children("sum", children)
        self.num_units = _checked_count("num_units", num_units)
        self.name = _checked_name(name)
        self.scope_bits = self.children[0].scope_bits
        for child in self.children[1:]:
            if child.scope_bits != self.scope_bits:
                raise StructureError(
                    f"sum is not smooth: {self.children[0]} and {child} have different scopes; "
                    "children of a sum need the same scope (multiply the smaller one with inputs on the missing "
                    "variables)"
                )
        self.parameter_shape = (num_units, _total_units(self.children))
        self.tied_to = _checked_tie(self, tied_to)
        self.weights = _checked_weights(self, weights, normalised_axis=1)
        self._is_built = True


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
    tied_to: Sum | None = None,
    weights: Tensor | None = None,
    name: str | None = None,
) -> Sum:
    """Build dense sum units: each is a mixture of all units of all children.

    Args:
        children: nodes with the same scope, I units together.
        num_units: K, how many mixtures.
        tied_to: another sum node whose parameters this one uses; its weights must have the same shape.
        weights: initial mixture weights, shape (K, I), rows sum to 1, zeros allowed; random when omitted.
        name: a label for messages and for access to parameters.

    Raises:
        StructureError: different scopes, or the parameters of ``tied_to`` do not fit.
    """
    return Sum(children, num_units, tied_to=tied_to, weights=weights, name=name)


class Circuit:
    """A symbolic circuit: everything reachable from one root over the variables 0 .. ``num_vars`` - 1.

    Args:
        root: a node with one unit, or with ``num_classes`` units.
        num_vars: D; by default the largest variable plus one. Every variable must occur.
        num_classes: R, for a class-conditional model: unit r of the root is the distribution p(x | class r).

    Raises:
        StructureError: another number of root units, a variable that does not occur or is out of range, or input nodes
            that disagree on a variable's number of categories.
    """

    def __init__(self, root: Node, *, num_vars: int | None = None, num_classes: int | None = None) -> None:
        if not isinstance(root, Node):
            if isinstance(root, (list, tuple)):
                raise StructureError(f"no single root: got {len(root)} nodes {root[:2]}; join them with ct.sum(...)")
            raise ArgumentError(f"root: expected a node built with ct.inputs, ct.product or ct.sum, got {root!r}")
        self.num_classes = None if num_classes is None else _checked_count("num_classes", num_classes)
        if num_classes is not None and root.num_units != num_classes:
            raise StructureError(
                f"num_classes: {root} has {root.num_units} units, expected one per class, {num_classes}"
            )
        if num_classes is None and root.num_units != 1:
            raise StructureError(
                f"no single root: {root} has {root.num_units} units, over {_children_text(root)}; "
                "put ct.sum(root, num_units=1) on top, or say num_classes if each unit is the model of a class"
            )
        self.root = root
        self.nodes = tuple(_children_first(root))
        self.num_vars = root.scope_bits.bit_length() if num_vars is None else _checked_count("num_vars", num_vars)
        self._check_variables()
        self._check_names()

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """All input nodes, children first."""
        return tuple(node for node in self.nodes if isinstance(node, Input))

    @cached_property
    def sums(self) -> tuple[Sum, ...]:
        """All sum nodes, children first."""
        return tuple(node for node in self.nodes if isinstance(node, Sum))

    @cached_property
    def num_categories(self) -> tuple[int, ...]:
        """C of every variable; 0 where there are infinitely many values."""
        categories = {node.var: node.distribution.num_values for node in self.inputs}
        return tuple(categories[var] for var in range(self.num_vars))

    @cached_property
    def is_discrete(self) -> bool:
        """Whether all variables have whole numbers as values."""
        return all(node.distribution.is_discrete for node in self.inputs)

    @property
    def scope(self) -> frozenset[int]:
        """The variables of the circuit."""
        return self.root.scope

    @property
    def num_units(self) -> int:
        """How many units the circuit has, over all nodes."""
        return _total_units(self.nodes)

    @cached_property
    def num_parameters(self) -> int:
        """How many weights the circuit has; tied ones are counted once."""
        owners = {parameter_owner(node) for node in self.nodes if isinstance(node, ParametricNode)}
        return int(torch.tensor([rows * columns for rows, columns in (o.parameter_shape for o in owners)]).sum())

    @property
    def is_smooth(self) -> bool:
        """Whether all children of every sum have its scope; holds for every circuit that could be built."""
        return all(child.scope_bits == node.scope_bits for node in self.sums for child in node.children)

    @property
    def is_decomposable(self) -> bool:
        """Whether the children of every product have disjoint scopes; holds for every circuit that could be built."""
        products = (node for node in self.nodes if isinstance(node, Product))
        return all(
            node.scope_bits.bit_count() == _total(child.scope_bits.bit_count() for child in node.children)
            for node in products
        )

    @cached_property
    def is_deterministic(self) -> bool:
        """Whether every sum has one child unit only, so that no assignment has two explanations.

        This is a sufficient condition that the structure alone can show; weights are not looked at.
        """
        return all(node.parameter_shape[1] == 1 for node in self.sums)

    @cached_property
    def is_structured_decomposable(self) -> bool:
        """Whether products over the same scope decompose it in the same way, see :mod:`circuits.properties`."""
        from circuits import properties  # which builds on this module

        return properties.is_structured_decomposable(self)

    def node(self, name: str) -> Node:
        """Return the node of that name; raises ArgumentError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = sorted(node.name for node in self.nodes if node.name)
        raise ArgumentError(f"name: no node is called {name!r}; named nodes: {', '.join(known) or 'none'}")

    def __repr__(self) -> str:
        """Python code that builds the circuit (given weights are left out)."""
        return build_code(self)

    def __str__(self) -> str:
        return f"Circuit({self.num_vars} variables, {len(self.nodes)} nodes, {self.num_units} units)"

    def _check_variables(self) -> None:
        for var in _variables_of(self.root.scope_bits):
            if var >= self.num_vars:
                node = next(n for n in self.inputs if n.var == var)
                raise StructureError(
                    f"unknown variable {var}: {node} is below {self.root}, but num_vars={self.num_vars} allows 0 to "
                    f"{self.num_vars - 1}"
                )
        missing = ((1 << self.num_vars) - 1) & ~self.root.scope_bits
        if missing:
            raise StructureError(
                f"unknown variables {format_scope(missing)}: {self.root} covers "
                f"{format_scope(self.root.scope_bits)}, but "
                f"a circuit over num_vars={self.num_vars} needs every variable from 0; renumber the variables"
            )
        first: dict[int, Input] = {}
        for node in self.inputs:
            other = first.setdefault(node.var, node)
            if other.distribution.num_values != node.distribution.num_values:
                raise StructureError(
                    f"variable {node.var} has {other.distribution.num_values or 'infinitely many'} categories in "
                    f"{other} and {node.distribution.num_values or 'infinitely many'} in {node}; one variable has one "
                    "number of categories"
                )
            if other.distribution.domain != node.distribution.domain:
                raise StructureError(
                    f"variable {node.var} has {other.distribution.domain} as values in {other} and "
                    f"{node.distribution.domain} in {node}; one variable has one kind of values"
                )

    def _check_names(self) -> None:
        named: dict[str, Node] = {}
        for node in self.nodes:
            if node.name is not None and named.setdefault(node.name, node) is not node:
                raise StructureError(
                    f"two nodes are called {node.name!r}: {named[node.name]} and {node}; names are unique"
                )


def parameter_owner(node: ParametricNode) -> ParametricNode:
    """Return the node that the parameters of ``node`` belong to: itself, or the end of its chain of ties."""
    while node.tied_to is not None:
        node = node.tied_to
    return node


def format_scope(scope_bits: int, limit: int = 8) -> str:
    """Write a scope as ``{0, 1, 2}``, shortened when it has more than ``limit`` variables."""
    variables: list[str] = []
    for var in _variables_of(scope_bits):
        if len(variables) == limit:
            return "{" + ", ".join(variables) + f", ... {scope_bits.bit_count()} in all}}"
        variables.append(str(var))
    return "{" + ", ".join(variables) + "}"


def build_code(circuit: Circuit) -> str:
    """Write Python code that builds the circuit's structure, one line a node."""
    names = {node: f"n{i}" for i, node in enumerate(circuit.nodes)}
    first_users: dict[Node, str] = {}
    lines = ["import circuits as ct"]
    for node in circuit.nodes:
        options = f", name={node.name!r}" if node.name else ""
        if isinstance(node, ParametricNode):
            first_user = first_users.setdefault(parameter_owner(node), names[node])
            if first_user != names[node]:
                options += f", tied_to={first_user}"
        lines.append(f"{names[node]} = ct.{_build_call(node, [names[child] for child in node.children], options)}")
    classes = "" if circuit.num_classes is None else f", num_classes={circuit.num_classes}"
    lines.append(f"circuit = ct.Circuit({names[circuit.root]}{classes})")
    return "\n".join(lines)


def _build_call(node: Node, children: Sequence[str], options: str) -> str:
    if isinstance(node, Input):
        return f"inputs({node.var}, {node.num_units}, ct.{node.distribution!r}{options})"
    if isinstance(node, Product):
        mode = "" if node.mode == "elementwise" else f", mode={node.mode!r}"
        return f"product({', '.join(children)}{mode}{options})"
    return f"sum({', '.join(children)}, num_units={node.num_units}{options})"


def _children_first(root: Node) -> Iterator[Node]:
    """Yield every node below ``root`` once, each after its children, without recursion (chains can be long)."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        if node in done:
            continue
        if children_done:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((child, False) for child in reversed(node.children) if child not in done)


def _variables_of(scope_bits: int) -> Iterator[int]:
    while scope_bits:
        lowest = scope_bits & -scope_bits
        yield lowest.bit_length() - 1
        scope_bits ^= lowest


def _total(numbers: Iterable[int]) -> int:
    total = 0
    for number in numbers:
        total += number
    return total


def _total_units(nodes: Iterable[Node]) -> int:
    return _total(node.num_units for node in nodes)


def _children_text(node: Node) -> str:
    return " and ".join(str(child) for child in node.children[:2]) or "no children"


def _checked_variable(var: int) -> int:
    if not isinstance(var, int) or isinstance(var, bool) or var < 0:
        raise StructureError(f"unknown variable {var!r}: variables are the integers from 0")
    return var


def _checked_count(argument: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{argument}: expected an integer >= 1, got {value!r}")
    return value


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
            f"shape mismatch of tied parameters: {node} needs weights of shape {node.parameter_shape}, and {tied_to} "
            "has "
            f"{tied_to.parameter_shape}"
        )
    if isinstance(node, Input) and isinstance(tied_to, Input) and node.distribution != tied_to.distribution:
        raise StructureError(
            f"tied_to: {node} is {node.distribution!r} and {tied_to} is {tied_to.distribution!r}; families must be "
            "the same"
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
            f"shape mismatch of weights: {node} needs floating-point weights of shape {node.parameter_shape}, got "
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
            f"weights: {node} needs weights >= 0 that sum to 1 along axis {normalised_axis}; the least weight is "
            f"{float(weights.min()):.6g} and sums lie in [{float(totals.min()):.6g}, {float(totals.max()):.6g}]"
        )
    return weights


__all__ = ["Categorical", "Circuit", "Input", "Node", "Product", "Sum", "inputs", "parameter_owner", "product", "sum"]
