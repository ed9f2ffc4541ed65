"""Hidden Markov models as circuits."""

from __future__ import annotations

from torch import Tensor

from circuits.distributions import Categorical
from circuits.errors import ArgumentError
from circuits.graph import Circuit, Input, Node, Sum, inputs, product, sum


def hmm(
    seq_length: int,
    num_states: int,
    num_categories: int,
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    transition: Tensor | None = None,
    emission: Tensor | None = None,
) -> Circuit:
    """Build a hidden Markov model, ``p(x) = sum_z p(z_0) prod_t p(z_t | z_t-1) p(x_t | z_t)`` (Rabiner 1989).

    The circuit is the backward recursion: the sum node named ``transition{t}`` has one unit per state of step t and
    mixes the states of step t + 1; the root mixes the states of step 0.

    Args:
        seq_length: L >= 1, the number of variables.
        num_states: N >= 1.
        num_categories: C >= 1.
        homogeneous: whether all steps share one transition and one emission table.
        initial: (N,) initial probabilities p(z_0); random when omitted, like the others.
        transition: p(z_t = j | z_t-1 = i) at [i, j], (N, N), or (L - 1, N, N) when not homogeneous.
        emission: p(x_t = v | z_t = i) at [i, v], (N, C), or (L, N, C) when not homogeneous.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: a given table has a wrong shape.
    """
    for name, value in (("seq_length", seq_length), ("num_states", num_states), ("num_categories", num_categories)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}: expected an integer >= 1, got {value!r}")
    first_emission: Input | None = None
    first_transition: Sum | None = None
    states: Node | None = None
    for step in reversed(range(seq_length)):
        leaf = inputs(
            step,
            num_states,
            Categorical(num_categories),
            tied_to=first_emission if homogeneous else None,
            weights=None if homogeneous and first_emission else _emission_of(emission, step, homogeneous),
            name=f"emission{step}",
        )
        first_emission = first_emission or leaf
        if states is None:
            states = leaf
            continue
        mixed = sum(
            states,
            num_units=num_states,
            tied_to=first_transition if homogeneous else None,
            weights=None if homogeneous and first_transition else _table_of(transition, step, homogeneous),
            name=f"transition{step}",
        )
        first_transition = first_transition or mixed
        states = product(leaf, mixed)
    assert states is not None
    return Circuit(
        sum(states, num_units=1, weights=None if initial is None else initial.reshape(1, -1), name="initial")
    )


def _table_of(tables: Tensor | None, step: int, homogeneous: bool) -> Tensor | None:
    if tables is None:
        return None
    return tables if homogeneous or tables.dim() == 2 else tables[step]


def _emission_of(emission: Tensor | None, step: int, homogeneous: bool) -> Tensor | None:
    table = _table_of(emission, step, homogeneous)
    return None if table is None else table.t()
