"""Symbolic circuits: everything below one root, checked when it is built.

A circuit is a directed acyclic graph of *input*, *product* and *sum* nodes (Choi, Vergari, Van den Broeck 2020,
"Probabilistic Circuits"), see :mod:`circuits.symbolic.nodes`. Nodes are decomposable and smooth by construction, so
every :class:`Circuit` admits exact marginals.
"""

from __future__ import annotations

import builtins
import difflib
import math
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.symbolic.flat import below_first, copied
from circuits.symbolic.nodes import Input, Node, ParametricNode, Product, Sum, num_free_parameters, parameter_owner
from circuits.symbolic.scopes import format_scope, variables_of


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
        self.num_classes = None if num_classes is None else checked_count("num_classes", num_classes)
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
        self.nodes = tuple(below_first(root, attrgetter("children")))
        self.num_vars = root.scope_bits.bit_length() if num_vars is None else checked_count("num_vars", num_vars)
        self._named: dict[str, Node] = {}
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
        return builtins.sum(node.num_units for node in self.nodes)

    @cached_property
    def num_parameters(self) -> int:
        """How many weights the circuit has; tied ones are counted once."""
        owners = {parameter_owner(node) for node in self.nodes if isinstance(node, ParametricNode)}
        return builtins.sum(math.prod(owner.parameter_shape) for owner in owners)

    @cached_property
    def num_free_parameters(self) -> int:
        """How many numbers the circuit's distribution depends on, as AIC and BIC count them; tied ones once.

        Of weights that sum to 1 the last one follows from the others, and given weights of 0 stay 0.
        """
        owners = {parameter_owner(node) for node in self.nodes if isinstance(node, ParametricNode)}
        return builtins.sum(num_free_parameters(owner) for owner in owners)

    @property
    def is_smooth(self) -> bool:
        """Whether all children of every sum have its scope; holds for every circuit that could be built."""
        return all(child.scope_bits == node.scope_bits for node in self.sums for child in node.children)

    @property
    def is_decomposable(self) -> bool:
        """Whether the children of every product have disjoint scopes; holds for every circuit that could be built."""
        products = (node for node in self.nodes if isinstance(node, Product))
        return all(
            node.scope_bits.bit_count() == builtins.sum(child.scope_bits.bit_count() for child in node.children)
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
        """Whether products over the same scope decompose it in the same way, see :mod:`circuits.properties`.

        That is so exactly if no two scopes cross: of two that overlap one holds the other.
        """
        largest: list[int] = []  # disjoint scopes, of those seen so far
        for bits in sorted({node.scope_bits for node in self.nodes}, key=int.bit_count):
            inside = [other for other in largest if other & bits]
            if any(other & ~bits for other in inside):
                return False
            largest = [*(other for other in largest if not other & bits), bits]
        return True

    def node(self, name: str) -> Node:
        """Return the node of that name; raises ArgumentError, with the nearest names, if there is none."""
        if name in self._named:
            return self._named[name]
        near = difflib.get_close_matches(str(name), self._named, 3)
        known = (
            f"did you mean {', '.join(near)}?" if near else f"some are {', '.join(sorted(self._named)[:3]) or 'none'}"
        )
        raise ArgumentError(f"name: expected one of the {len(self._named)} names of nodes, got {name!r}; {known}")

    def with_prefix(self, prefix: str) -> Circuit:
        """Return the circuit with ``prefix`` before the name of every named node, all nodes being new ones.

        So circuits that use the same names, such as two HMMs, become parts of one. Ties between nodes stay; with other
        circuits the new one shares no parameters.

        Raises:
            ArgumentError: the prefix is no string.
        """
        if not isinstance(prefix, str):
            raise ArgumentError(f"prefix: expected a string, got {prefix!r}")
        root = copied(self.root, lambda name: prefix + name)
        return Circuit(root, num_vars=self.num_vars, num_classes=self.num_classes)

    def __repr__(self) -> str:
        """Python code that builds the circuit (given weights are left out)."""
        names = {node: f"n{i}" for i, node in enumerate(self.nodes)}
        first_users: dict[Node, str] = {}
        lines = ["import circuits as ct"]
        for node in self.nodes:
            options = f", name={node.name!r}" if node.name else ""
            if isinstance(node, ParametricNode):
                first_user = first_users.setdefault(parameter_owner(node), names[node])
                if first_user != names[node]:
                    options += f", tied_to={first_user}"
            lines.append(f"{names[node]} = ct.{_build_call(node, [names[child] for child in node.children], options)}")
        classes = "" if self.num_classes is None else f", num_classes={self.num_classes}"
        return "\n".join([*lines, f"circuit = ct.Circuit({names[self.root]}{classes})"])

    def __str__(self) -> str:
        return f"Circuit({self.num_vars} variables, {len(self.nodes)} nodes, {self.num_units} units)"

    def _check_variables(self) -> None:
        for var in variables_of(self.root.scope_bits):
            if var >= self.num_vars:
                node = next(n for n in self.inputs if n.var == var)
                raise StructureError(
                    f"unknown variable {var}: {node} is below {self.root}, but num_vars={self.num_vars} allows 0 to "
                    f"{self.num_vars - 1}"
                )
        missing = ((1 << self.num_vars) - 1) & ~self.root.scope_bits
        if missing:
            raise StructureError(
                f"unknown variables {format_scope(missing)}: expected all from 0 to {self.num_vars - 1}, got "
                f"{self.root}, which covers {format_scope(self.root.scope_bits)}; renumber the variables"
            )
        first: dict[int, Input] = {}
        for node in self.inputs:
            other = first.setdefault(node.var, node)
            if other.distribution.domain != node.distribution.domain:
                raise StructureError(
                    f"variable {node.var}: expected one kind of values, got {other.distribution.domain} in {other} and "
                    f"{node.distribution.domain} in {node}"
                )

    def _check_names(self) -> None:
        for node in self.nodes:
            if node.name is not None and self._named.setdefault(node.name, node) is not node:
                raise StructureError(
                    f"two nodes are called {node.name!r}: {self._named[node.name]} and {node}; names are unique, and "
                    "circuit.with_prefix(...) makes them so"
                )


def _build_call(node: Node, children: Sequence[str], options: str) -> str:
    if isinstance(node, Input):
        return f"inputs({node.var}, {node.num_units}, ct.{node.distribution!r}{options})"
    if isinstance(node, Product):
        mode = "" if node.mode == "elementwise" else f", mode={node.mode!r}"
        return f"product({', '.join(children)}{mode}{options})"
    unit = f", unit={node.unit}" if isinstance(node, Sum) and node.unit is not None else ""
    return f"sum({', '.join(children)}, num_units={node.num_units}{unit}{options})"


def _children_text(node: Node) -> str:
    return " and ".join(str(child) for child in node.children[:2]) or "no children"
