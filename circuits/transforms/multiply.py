"""The product of two circuits with a common structure, as a circuit (Vergari et al. 2021, "A Compositional Atlas")."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.families import Gaussian
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, ParametricNode, Product, Sum, format_scope, parameter_owner, product
from circuits.symbolic.flat import below_first
from circuits.transforms.rebuild import Rebuild, check_is_finite, normalise, table_family


class NormalizedProduct(NamedTuple):
    """The product of two distributions."""

    pc: CompiledCircuit
    """p(x) q(x) / Z"""
    log_partition: Tensor
    """log Z = log sum_x p(x) q(x), float64, in nats: a scalar, or one per class, (R,)."""


@own_precision
def multiply(pc: CompiledCircuit, other: CompiledCircuit) -> NormalizedProduct:
    """Multiply two compatible circuits over the same variables: ``p(x) q(x) / Z``, and log Z.

    Compatible means that wherever two product units meet, they split their variables in the same way, or one splits
    them more finely than the other. Every pair of units that meet becomes one unit, so the result has up to the product
    of both numbers of units. A circuit is compatible with itself only if it is *structured-decomposable*.

    Products of tied input nodes stay tied. Those of tied sums do only where they have the same weights, because every
    unit is normalised by what follows it; :class:`TiedProduct` keeps all ties, and p's parameters. Nodes keep their
    names; where two differ, the product of nodes named ``one`` and ``other`` is named ``one*other``.

    If one circuit has classes the result has them too: ``p(x | class) q(x) / Z_class``. If both do, these are the same
    classes: ``p(x | class) q(x | class) / Z_class``.

    Args:
        pc: the first circuit; the result has its device and dtype.
        other: the second circuit, over as many variables with as many categories.

    Returns:
        ``(pc, log_partition)``.

    Raises:
        ArgumentError: the circuits' variables, or their numbers of classes, differ.
        PropertyError: the circuits are not compatible, or variables have infinitely many values and are not Gaussian.
        ImpossibleEvidenceError: Z = 0, no assignment is possible under both, of some class.
    """
    check_compiled(pc)
    check_compiled(other, "other")
    if pc.circuit.num_categories != other.circuit.num_categories:
        raise ArgumentError(
            f"other: expected variables with the categories of pc, {pc.circuit.num_categories}, got "
            f"{other.circuit.num_categories}"
        )
    num_classes = {circuit.num_classes for circuit in (pc.circuit, other.circuit)} - {None}
    if len(num_classes) == 2:
        raise ArgumentError(
            f"other: expected the classes of pc, {pc.circuit.num_classes}, or none, got {other.circuit.num_classes}"
        )
    multiplication = _Multiplication(pc, other)
    root = multiplication.pair(pc.circuit.root, other.circuit.root)
    if bool((root.log_partition == -torch.inf).any()):
        raise ImpossibleEvidenceError(
            "other: no assignment is possible under both circuits, their product is zero"
            + (" for a class" if num_classes else "")
        )
    log_partition = root.log_partition if num_classes else root.log_partition[0]
    return NormalizedProduct(multiplication.compile(root, has_classes=bool(num_classes)), log_partition)


class _Pair(NamedTuple):
    """The product of nodes with K and M units; unit (k, m) is the unit ``units[k M + m]`` of ``node``.

    Of two roots with R classes it has the R units (r, r).
    """

    node: Node
    units: Tensor | None
    """int64 (K M,); None: in order."""
    log_partition: Tensor
    """float64 (K M,), on the CPU."""


class _Multiplication:
    def __init__(self, pc: CompiledCircuit, other: CompiledCircuit) -> None:
        self.left, self.right = Rebuild(pc), Rebuild(other)
        self.pairs: dict[tuple[Node, Node], _Pair] = {}
        self.groups: dict[tuple[object, ...], Node] = {}
        self.names: set[str] = set()

    def origin(self, left: Node, right: Node) -> dict[str, Any]:
        """Return the key under which equal weights of products of tied nodes are tied, and a name that is still free.

        A name that both have, or that only one has, stays; of two names, ``one`` and ``other``, one is made.
        """
        owners = (parameter_owner(node) if isinstance(node, ParametricNode) else None for node in (left, right))
        names = dict.fromkeys(name for name in (left.name, right.name) if name is not None)
        name = "*".join(names)
        if not names or name in self.names:
            return {"key": tuple(owners), "name": None}
        self.names.add(name)
        return {"key": tuple(owners), "name": name}

    def compile(self, root: _Pair, *, has_classes: bool) -> CompiledCircuit:
        return self.left.compile(self.left.select(root.node, root.units), has_classes=has_classes)

    def pair(self, left: Node, right: Node) -> _Pair:
        """Multiply two nodes, without recursion: chains can be deeper than Python's recursion."""
        for key in below_first((left, right), lambda key: [] if key in self.pairs else self._needs(*key)[::-1]):
            if key not in self.pairs:
                self.pairs[key] = self._multiplied(*key)
        return self.pairs[left, right]

    def _needs(self, left: Node, right: Node) -> list[tuple[Node, Node]]:
        """Return the pairs of nodes whose products the product of this pair is made of."""
        if isinstance(left, Sum) or isinstance(right, Sum):
            return [(one, two) for one in _terms(left) for two in _terms(right)]
        if isinstance(left, Input) and isinstance(right, Input):
            return []
        return [(one, two) for one, two, _, _ in self._factors(left, right)]

    def _multiplied(self, left: Node, right: Node) -> _Pair:
        if isinstance(left, Sum) or isinstance(right, Sum):
            return self._sum(left, right)
        if isinstance(left, Input) and isinstance(right, Input):
            return self._input(left, right)
        return self._product(left, right)

    def _kept(self, left: Node, right: Node) -> slice:
        """Return which of the K M pairs of units become units: of roots that both have classes (r, r) only."""
        circuits = self.left.pc.circuit, self.right.pc.circuit
        are_classes = None not in {circuit.num_classes for circuit in circuits}
        is_root = (left, right) == (circuits[0].root, circuits[1].root)
        return slice(None, None, left.num_units + 1) if are_classes and is_root else slice(None)

    def _input(self, left: Input, right: Input) -> _Pair:
        if isinstance(left.distribution, Gaussian) and isinstance(right.distribution, Gaussian):
            return self._gaussians(left, left.distribution, right, right.distribution)
        for node in (left, right):
            check_is_finite(node, "multiplying circuits")
        one, two = (side.log_weights(n).cpu() for side, n in ((self.left, left), (self.right, right)))
        pairs = (one.unsqueeze(2) + two.unsqueeze(1)).flatten(1)[:, self._kept(left, right)]
        log_weights, log_partition = normalise(pairs, 0)
        origin = self.origin(left, right)
        node = self.left.extra_input(left.var, table_family(left.distribution), log_weights, **origin)
        return _Pair(node, None, log_partition)

    def _gaussians(self, left: Input, one: Gaussian, right: Input, two: Gaussian) -> _Pair:
        """Multiply normal densities, which gives multiples of normal densities."""
        means, stds = one.read(self.left.raw(left).double().cpu()).unsqueeze(2)  # (K, 1)
        other_means, other_stds = two.read(self.right.raw(right).double().cpu())  # (M,)
        parameters, log_partition = one.times_normal((means, stds), other_means, other_stds)
        family = Gaussian(min(one.min_std, two.min_std) / 2)  # a product is narrower, by at most the root of 2
        kept = self._kept(left, right)
        raw = family.raw(torch.stack([part.flatten()[kept] for part in parameters]))
        node = self.left.extra_input(left.var, family, raw, **self.origin(left, right))
        return _Pair(node, None, log_partition.flatten()[kept])

    def _sum(self, left: Node, right: Node) -> _Pair:
        """Multiply mixtures: ``sum_ij w_ki v_mj c_i d_j``; a node that is no sum is a mixture of itself."""
        units = torch.arange(left.num_units * right.num_units)[self._kept(left, right)]
        one = _mixture_weights(self.left, left)[units // right.num_units]
        two = _mixture_weights(self.right, right)[units % right.num_units]
        weights: list[Tensor] = []
        nodes: list[Node] = []
        for part, child in zip(one.split([c.num_units for c in _terms(left)], 1), _terms(left), strict=True):
            for other_part, other in zip(
                two.split([c.num_units for c in _terms(right)], 1), _terms(right), strict=True
            ):
                pair = self.pairs[child, other]
                columns = (part.unsqueeze(2) + other_part.unsqueeze(1)).flatten(1) + pair.log_partition  # (K M, I J)
                nodes.append(pair.node)
                weights.append(_placed(columns, pair))
        log_weights, totals = normalise(torch.cat(weights, 1), 1)
        return _Pair(self.left.extra_sum(nodes, log_weights, **self.origin(left, right)), None, totals)

    def _product(self, left: Node, right: Node) -> _Pair:
        factors = self._factors(left, right)
        kept = self._kept(left, right)
        pairs: list[_Pair] = []
        choices: list[Tensor] = []
        log_partition = torch.zeros(left.num_units * right.num_units, dtype=torch.float64)[kept]
        for one, two, left_units, right_units in factors:
            pair = self.pairs[one, two]
            choice = (left_units.unsqueeze(1) * two.num_units + right_units).flatten()[kept]  # (K M,)
            log_partition = log_partition + pair.log_partition[choice]
            pairs.append(pair)
            choices.append(choice if pair.units is None else pair.units[choice])
        if len(pairs) == 1:
            return _Pair(pairs[0].node, choices[0], log_partition)
        if all(isinstance(node, Product) and node.mode == "outer" for node in (left, right)):
            units = torch.zeros_like(choices[0])
            for pair, choice in zip(pairs, choices, strict=True):
                units = units * pair.node.num_units + choice
            return _Pair(product(*(pair.node for pair in pairs), mode="outer"), units, log_partition)
        selected = [self.left.select(pair.node, choice) for pair, choice in zip(pairs, choices, strict=True)]
        return _Pair(product(*selected), None, log_partition)

    def _factors(self, left: Node, right: Node) -> list[tuple[Node, Node, Tensor, Tensor]]:
        """Split two products over the same variables alike: per factor both nodes, and which units of them are used."""
        factors = []
        ones, twos = list(_factor_nodes(left)), list(_factor_nodes(right))
        while ones:
            group, others = [ones.pop(0)], []
            scope = left_scope = group[0].scope_bits
            right_scope = 0
            while left_scope != right_scope:
                if left_scope & ~right_scope:
                    more = [node for node in twos if node.scope_bits & scope]
                    others += more
                    twos = [node for node in twos if node not in more]
                    right_scope |= _scope_of(more)
                else:
                    more = [node for node in ones if node.scope_bits & right_scope]
                    group += more
                    ones = [node for node in ones if node not in more]
                    left_scope |= _scope_of(more)
                scope = left_scope | right_scope
            if len(group) > 1 and len(others) > 1:
                raise PropertyError(
                    "other: expected a compatible circuit, whose products split their variables in the same way, got "
                    f"one that is not compatible: {left} splits {format_scope(scope)} into {_scopes_text(group)} and "
                    f"{right} into {_scopes_text(others)}"
                )
            one, left_units = self._grouped(left, group)
            two, right_units = self._grouped(right, others)
            factors.append((one, two, left_units, right_units))
        return factors

    def _grouped(self, parent: Node, group: list[Node]) -> tuple[Node, Tensor]:
        """Return the product of some factors of a node, and which unit of it every unit of the node uses."""
        units = torch.arange(parent.num_units)
        if not isinstance(parent, Product):
            return parent, units
        node = group[0]
        if len(group) > 1:
            group = [child for child in parent.children if child in group]
            key = (parent.mode, *group)
            node = self.groups.setdefault(key, product(*group, mode=parent.mode))
        if parent.mode == "elementwise":
            return node, units
        choices = torch.unravel_index(units, [child.num_units for child in parent.children])
        chosen = torch.zeros_like(units)
        for child, choice in zip(parent.children, choices, strict=True):
            if child in group:
                chosen = chosen * child.num_units + choice
        return node, chosen


def _terms(node: Node) -> tuple[Node, ...]:
    return node.children if isinstance(node, Sum) else (node,)


def _factor_nodes(node: Node) -> tuple[Node, ...]:
    return node.children if isinstance(node, Product) else (node,)


def _mixture_weights(side: Rebuild, node: Node) -> Tensor:
    if isinstance(node, Sum):
        return side.log_weights(node).cpu()
    return torch.eye(node.num_units, dtype=torch.float64).log()


def _placed(columns: Tensor, pair: _Pair) -> Tensor:
    """Move columns to the units of the pair's node that they belong to; units that are not in the pair get none."""
    if pair.units is None:
        return columns
    placed = columns.new_full((len(columns), pair.node.num_units), -torch.inf)
    placed[:, pair.units] = columns
    return placed


def _scope_of(nodes: list[Node]) -> int:
    scope = 0
    for node in nodes:
        scope |= node.scope_bits
    return scope


def _scopes_text(nodes: list[Node]) -> str:
    return ", ".join(format_scope(node.scope_bits) for node in nodes)
