"""What the transformations share: building new nodes together with their weights, and compiling them.

A transformation visits the nodes children first and builds a new node for each. :class:`Rebuild` remembers the log
weights of the new nodes, ties those that came from tied nodes and still have the same weights, and writes all of them
into the new compiled circuit, which keeps device and dtype of the old one.
"""

from __future__ import annotations

import builtins
from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit, compile
from circuits.engine.weights import check_compiled
from circuits.errors import PropertyError
from circuits.families import Bernoulli, Categorical, Distribution, Finite
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Sum, inputs, parameter_owner, sum

AnyParametric = TypeVar("AnyParametric", Input, Sum)

TABLES = (Categorical, Bernoulli)
"""The input families whose parameters are one log-weight per value."""


class Rebuild:
    """Builds the nodes of a new circuit from those of ``pc``."""

    def __init__(self, pc: CompiledCircuit) -> None:
        check_compiled(pc)
        self.pc = pc
        self._parameters: dict[ParametricNode, Tensor] = {}
        self._heirs: dict[Hashable, list[ParametricNode]] = {}

    def log_weights(self, node: ParametricNode, *, wide: bool = True) -> Tensor:
        """Return the normalised log-weights of an old node, float64: sums (K, I), inputs of finite families (C, K).

        Those of sums are of all units of their children, see :func:`widened`, unless not ``wide``.
        """
        if isinstance(node, Input):
            check_is_finite(node, "this transformation")
        with torch.no_grad():
            log_weights = self.pc.log_weights(node).double()
        return widened(node, log_weights) if wide and isinstance(node, Sum) else log_weights

    def raw(self, node: ParametricNode) -> Tensor:
        """Return the parameters of an old node as they are stored, of any family."""
        bank, row = self.pc.bank_address(node)
        return self.pc.bank[bank].detach()[row]

    def input(self, old: Input, units: Tensor | None = None, *, var: int | None = None) -> Input:
        """Build some units (all if None, perhaps repeated) of ``old`` in its place, perhaps on another variable."""
        raw, family = self.raw(old), old.distribution
        if units is not None:
            family, raw = family.select_units(raw, units.to(raw.device))
        num_units = old.num_units if units is None else len(units)
        var, key = old.var if var is None else var, parameter_owner(old)
        return self.extra_input(var, family, raw, num_units=num_units, key=key, name=old.name)

    def table(self, old: Input, log_weights: Tensor, *, var: int | None = None) -> Input:
        """Build input units with this log-table (C, K') in the place of ``old``, whose family becomes a categorical."""
        var, family = old.var if var is None else var, table_family(old.distribution)
        return self.extra_input(var, family, log_weights, key=parameter_owner(old), name=old.name)

    def sum(self, old: Sum, children: Sequence[Node], log_weights: Tensor) -> Sum:
        """Build sum units with these log-weights (K', I'), of all child units or those that ``old`` mixes, for it."""
        is_wide = log_weights.shape[1] == builtins.sum(child.num_units for child in children)
        unit = None if is_wide else old.unit
        return self.extra_sum(children, log_weights, unit=unit, key=parameter_owner(old), name=old.name)

    def copy(
        self, old: ParametricNode, children: Sequence[Node], parameters: Tensor, tied_to: ParametricNode | None
    ) -> ParametricNode:
        """Build a node like ``old`` that is tied to ``tied_to``, or has parameters of its own if that is None."""
        if isinstance(old, Input):
            owner = tied_to if isinstance(tied_to, Input) else None
            leaf = inputs(old.var, old.num_units, old.distribution, tied_to=owner, name=old.name)
            return self._record(leaf, parameters)
        mixed = tied_to if isinstance(tied_to, Sum) else None
        new = sum(*children, num_units=old.num_units, unit=old.unit, tied_to=mixed, name=old.name)
        return self._record(new, parameters)

    def extra_input(
        self,
        var: int,
        distribution: Distribution,
        parameters: Tensor,
        *,
        num_units: int | None = None,
        key: Hashable = None,
        name: str | None = None,
    ) -> Input:
        """Build input units, by default one per column (..., K') of parameters or a log-table, as an additional node.

        The key is what the parameters were made of: nodes of one key that have the same ones are tied; of None none is.
        """
        num_units = parameters.shape[-1] if num_units is None else num_units
        owner = self._heir(Input, key, parameters, distribution)
        return self._record(inputs(var, num_units, distribution, tied_to=owner, name=name), parameters, key)

    def extra_sum(
        self,
        children: Sequence[Node],
        log_weights: Tensor,
        *,
        unit: int | None = None,
        key: Hashable = None,
        name: str | None = None,
    ) -> Sum:
        """Build sum units with these log-weights (K', I'), as an additional node; see :meth:`extra_input`."""
        owner = self._heir(Sum, key, log_weights)
        new = sum(*children, num_units=len(log_weights), unit=unit, tied_to=owner, name=name)
        return self._record(new, log_weights, key)

    def select(self, node: Node, units: Tensor | None) -> Node:
        """Return a node whose unit k is the unit ``units[k]`` of ``node``: a sum with one-hot weights, if needed."""
        if units is None or is_identity(units, node.num_units):
            return node
        weights = torch.full((len(units), node.num_units), -torch.inf, dtype=torch.float64)
        weights[torch.arange(len(units)), units.cpu()] = 0.0
        return self.extra_sum([node], weights)

    def mixture(self, node: Node, log_weights: Tensor) -> Sum:
        """Build sum units that mix those of ``node`` with log-weights (K', K); of a sum, mix its children instead."""
        if not isinstance(node, Sum) or node.unit is not None:
            return self.extra_sum([node], log_weights)
        inner = torch.log_softmax(self._parameters[parameter_owner(node)].to(log_weights), 1)
        multiplied = torch.logsumexp(log_weights.unsqueeze(2) + inner, 1)
        return self._record(sum(*node.children, num_units=len(multiplied), name=node.name), multiplied)

    def compile(self, root: Node, *, has_classes: bool | None = None) -> CompiledCircuit:
        """Compile what is below ``root``, with the recorded weights; by default with classes if the old circuit has."""
        if has_classes is None:
            has_classes = self.pc.circuit.num_classes is not None
        circuit = Circuit(root, num_classes=root.num_units if has_classes else None)
        new = compile(circuit, dtype=self.pc.dtype, device=self.pc.device, seed=0)
        with torch.no_grad():
            for node in circuit.nodes:
                if isinstance(node, ParametricNode):
                    bank, row = new.bank_address(node)
                    new.bank[bank][row] = self._parameters[parameter_owner(node)].to(new.device, new.dtype)
        return new

    def _heir(
        self, kind: type[AnyParametric], key: Hashable, parameters: Tensor, family: Distribution | None = None
    ) -> AnyParametric | None:
        for heir in self._heirs.get(key, []):
            known = self._parameters[heir]
            is_equal = known.dtype == parameters.dtype and torch.equal(known, parameters)
            if (
                is_equal
                and isinstance(heir, kind)
                and (family is None or getattr(heir, "distribution", None) == family)
            ):
                return heir
        return None

    def _record(self, node: AnyParametric, parameters: Tensor, key: Hashable = None) -> AnyParametric:
        if node.tied_to is None:
            self._parameters[node] = parameters
            if key is not None:
                self._heirs.setdefault(key, []).append(node)
        return node


def widened(node: Sum, log_weights: Tensor) -> Tensor:
    """Return log-weights of a sum (K, I) as those of all units of its children: -inf for units that it does not mix."""
    if node.unit is None:
        return log_weights
    wide = log_weights.new_full((*log_weights.shape, node.children[0].num_units), -torch.inf)
    wide[..., node.unit] = log_weights
    return wide.flatten(1)


def is_identity(units: Tensor, num_units: int) -> bool:
    """Whether ``units`` is 0 .. ``num_units`` - 1."""
    return len(units) == num_units and bool((units.cpu() == torch.arange(num_units)).all())


def check_is_table(node: Input, operation: str) -> None:
    """Raise PropertyError unless the units of ``node`` are tables of weights, one per value."""
    if not isinstance(node.distribution, TABLES):
        raise PropertyError(
            f"{operation}: expected input units with one weight per value (ct.Categorical, ct.Bernoulli), got {node}, "
            f"which is {node.distribution!r}"
        )


def check_is_finite(node: Input, operation: str) -> None:
    """Raise PropertyError unless the variable of ``node`` has finitely many values."""
    if not isinstance(node.distribution, Finite):
        raise PropertyError(
            f"{operation}: expected variables with finitely many values, got {node}, which is {node.distribution!r}"
        )


def table_family(distribution: Distribution) -> Distribution:
    """Return the family that takes any table over the values of a finite one."""
    return distribution if isinstance(distribution, TABLES) else Categorical(distribution.num_values)


def normalise(log_weights: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return log-weights that sum to 1 along ``axis``, and the logarithm of what they summed to.

    Where all weights are zero, they become equal: such a unit is never reached, and its log-total of -inf says so.
    """
    totals = torch.logsumexp(log_weights, axis, keepdim=True)
    is_impossible = totals == -torch.inf
    normalised = (log_weights - totals.masked_fill(is_impossible, 0.0)).masked_fill(is_impossible, 0.0)
    return torch.log_softmax(normalised, axis), totals.squeeze(axis)


def add_columns(log_weights: Tensor, units: Tensor, num_units: int) -> Tensor:
    """Add up the weights of columns that become one, (K, I) to (K, I'): i goes to ``units[i]``, at -1 nowhere."""
    if is_identity(units, num_units):
        return log_weights
    is_kept = units >= 0
    columns, kept = units[is_kept].to(log_weights.device), log_weights[:, is_kept.to(log_weights.device)]
    peak = log_weights.new_full((len(log_weights), num_units), -torch.inf)
    peak = peak.scatter_reduce(1, columns.expand_as(kept), kept, "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    totals = torch.zeros_like(peak).index_add_(1, columns, (kept - peak[:, columns]).exp())
    return totals.log() + peak
