"""The nodes of models whose states follow each other step by step, and emit variables."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError
from circuits.families import Distribution
from circuits.structures.options import checked_table, family_of
from circuits.symbolic import Circuit, Input, Node, Sum, inputs, product, sum

Families = int | Distribution | Sequence[int | Distribution]
"""Of what a step emits: one, a number of categories standing for a categorical one, or one for each of M variables."""
Emission = Tensor | Sequence[Tensor | None] | None
"""The table of the one family, or one table, or None, for each of several."""


class StepNodes:
    """Builds the nodes of one model: all steps share their parameters, or, when not homogeneous, have their own.

    Step t emits the variables t M .. t M + M - 1, one of each of M families.
    """

    def __init__(
        self, seq_length: int, num_states: int, families: Families, homogeneous: bool, emission: Emission
    ) -> None:
        checked_count("seq_length", seq_length)
        checked_count("num_states", num_states)
        self._homogeneous = homogeneous
        self._sums: dict[Hashable, Sum] = {}
        self._inputs: dict[Hashable, Input] = {}
        self._is_single = not isinstance(families, (list, tuple))
        listed: Sequence[Any] = families if isinstance(families, (list, tuple)) else [families]
        self._families = [family_of("num_categories", each) for each in listed]
        given = [emission] if self._is_single else [None] * len(listed) if emission is None else emission
        if not self._families or not isinstance(given, (list, tuple)) or len(given) != len(self._families):
            raise ArgumentError(
                f"emission: expected one table or None for each of the {len(self._families)} variables of a step "
                f"(at least one, see num_categories), got {type(emission).__name__}"
            )
        self._tables = [
            _emission_table(table, family, num_states, seq_length, homogeneous)
            for table, family in zip(given, self._families, strict=True)
        ]

    def sum(
        self,
        key: Hashable,
        children: Sequence[Node],
        num_units: int,
        weights: Tensor | None,
        *,
        name: str,
        unit: int | None = None,
    ) -> Sum:
        """Return a sum node; those of one key share their weights."""
        owner = self._sums.get(key) if self._homogeneous else None
        weights = None if owner else weights
        node = sum(*children, num_units=num_units, unit=unit, tied_to=owner, weights=weights, name=name)
        self._sums.setdefault(key, node)
        return node

    def leaves(self, step: int, states: slice, group: str = "") -> list[Node]:
        """Return the input nodes of what some of the states emit at a step, one per variable."""
        leaves: list[Node] = []
        for position, (family, table) in enumerate(zip(self._families, self._tables, strict=True)):
            owner = self._inputs.get((group, position)) if self._homogeneous else None
            node = inputs(
                step * len(self._families) + position,
                states.stop - states.start,
                family,
                tied_to=owner,
                weights=None if table is None or owner else table[step, states].t(),
                name=f"emission{step}{group}" + ("" if self._is_single else f"_{position}"),
            )
            self._inputs.setdefault((group, position), node)
            leaves.append(node)
        return leaves


def product_of(factors: Sequence[Node]) -> Node:
    """Return the product of some nodes; of one, the node itself."""
    return factors[0] if len(factors) == 1 else product(*factors)


def _emission_table(
    table: Tensor | None, family: Distribution, num_states: int, seq_length: int, homogeneous: bool
) -> Tensor | None:
    if table is None:
        return None
    rows, columns = family.parameter_shape(num_states)
    if columns != num_states or not rows:
        raise ArgumentError(
            f"emission: expected a family with parameters per state, got {family!r}; leave the table out"
        )
    return checked_table("emission", table, (num_states, rows), seq_length, homogeneous)


def rooted(states: Sequence[Node], num_states: int, initial: Tensor | None, num_classes: int | None) -> Circuit:
    """Return the circuit of the states of step 0, or of one such model per class."""
    weights = checked_table("initial", initial, (num_states,), 1, True)
    circuit = Circuit(sum(*states, num_units=1, weights=weights, name="initial"))
    if num_classes is None:
        return circuit
    models = [circuit.with_prefix(f"class{label}_") for label in range(checked_count("num_classes", num_classes))]
    roots = [model.root for model in models]
    return Circuit(
        sum(*roots, num_units=num_classes, weights=torch.eye(num_classes), name="class"), num_classes=num_classes
    )
