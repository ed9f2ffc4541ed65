"""Hidden Markov models as circuits: dense, block-sparse, low-rank and Monarch transitions, first and second order.

Every circuit here is the backward recursion ``b_t(i) = sum_j p(z_t+1 = j | z_t = i) p(x_t+1 | j) b_t+1(j)``: the sum
node named ``transition{t}`` mixes the states of step t + 1, and the root, named ``initial``, those of step 0.

With M families a step emits M variables, independent given its state. Variable ``t M + m`` is the m-th of step t, so
series (B, L, M) are ``x.flatten(1)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.structures.options import checked_table
from circuits.structures.steps import Emission, Families, StepNodes, product_of, rooted
from circuits.symbolic import Circuit, Node, sum


def hmm(
    seq_length: int,
    num_states: int,
    num_categories: Families,
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    transition: Tensor | None = None,
    emission: Emission = None,
    num_classes: int | None = None,
) -> Circuit:
    """Build a hidden Markov model, ``p(x) = sum_z p(z_0) prod_t p(z_t | z_t-1) p(x_t | z_t)`` (Rabiner 1989).

    The circuit is the backward recursion: the sum node named ``transition{t}`` has one unit per state of step t and
    mixes the states of step t + 1; the root mixes the states of step 0. The input nodes are ``emission{t}``, or, where
    M families are given, ``emission{t}_{m}``.

    Args:
        seq_length: L >= 1, the number of steps.
        num_states: N >= 1.
        num_categories: C >= 1, or the input family of all steps; a list of M of them for M variables per step.
        homogeneous: whether all steps share one transition and one emission table.
        initial: (N,) initial probabilities p(z_0); random when omitted, like the others.
        transition: p(z_t = j | z_t-1 = i) at [i, j], (N, N), or (L - 1, N, N) when not homogeneous.
        emission: p(x_t = v | z_t = i) at [i, v], (N, C), or (L, N, C) when not homogeneous; of other families the
            parameters of every state, (N, S) or (L, N, S), means and standard deviations (N, 2) for instance. For M
            variables per step a list of M tables, None for those to be random.
        num_classes: R, for a class-conditional model: R such models, each with parameters of its own (given tables are
            where all of them start). The nodes of class r are called ``class{r}_...``, the root is ``class``.

    Raises:
        ArgumentError: an argument has a wrong type or value.
        StructureError: a given table has a wrong shape.
    """
    nodes = StepNodes(seq_length, num_states, num_categories, homogeneous, emission)
    transitions = checked_table("transition", transition, (num_states, num_states), seq_length - 1, homogeneous)
    every = slice(0, num_states)
    states = product_of(nodes.leaves(seq_length - 1, every))
    for step in reversed(range(seq_length - 1)):
        weights = None if transitions is None else transitions[step]
        mixed = nodes.sum("transition", [states], num_states, weights, name=f"transition{step}")
        states = product_of([*nodes.leaves(step, every), mixed])
    return rooted([states], num_states, initial, num_classes)


def low_rank_hmm(
    seq_length: int,
    num_states: int,
    num_categories: Families,
    rank: int,
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    transition: tuple[Tensor, Tensor] | None = None,
    emission: Emission = None,
    num_classes: int | None = None,
) -> Circuit:
    """Build a hidden Markov model whose transition is a product of two stochastic tables, (N, R) and (R, N).

    A step costs 2 N R multiplications instead of N^2 (Chiu, Deng, Rush 2021, "Low-Rank Constraints for Fast Inference
    in Structured Models"; Siddiqi, Boots, Gordon 2010). The sum node ``transition{t}`` (N units) mixes the R units of
    ``factor{t}``, which mixes the states of step t + 1.

    Arguments and errors are those of :func:`hmm`, but for:

    Args:
        rank: R >= 1.
        transition: (N, R) and (R, N), rows sum to 1, with a leading (L - 1) when not homogeneous.
    """
    checked_count("rank", rank)
    nodes = StepNodes(seq_length, num_states, num_categories, homogeneous, emission)
    shapes = (num_states, rank), (rank, num_states)
    left, right = _two_tables(transition, shapes, seq_length - 1, homogeneous)
    every = slice(0, num_states)
    states = product_of(nodes.leaves(seq_length - 1, every))
    for step in reversed(range(seq_length - 1)):
        weights = None if right is None else right[step]
        factor: Node = nodes.sum("factor", [states], rank, weights, name=f"factor{step}")
        weights = None if left is None else left[step]
        mixed = nodes.sum("transition", [factor], num_states, weights, name=f"transition{step}")
        states = product_of([*nodes.leaves(step, every), mixed])
    return rooted([states], num_states, initial, num_classes)


def block_sparse_hmm(
    seq_length: int,
    group_sizes: Sequence[int],
    num_categories: Families,
    follows: Tensor | Sequence[Sequence[bool]],
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    transition: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
    emission: Emission = None,
    num_classes: int | None = None,
    rank: int | None = None,
) -> Circuit:
    """Build a hidden Markov model whose states come in groups, and a pattern says which group may follow which.

    Only the allowed blocks of the transition table exist and cost anything (Dedieu, Gothoskar, Swingle, Lehrach,
    Lazaro-Gredilla, George 2019, "Learning higher-order sequential structure with cloned HMMs"; block-sparse circuits:
    Dang, Liu, Van den Broeck 2022). The sum node ``transition{t}_{g}`` has one unit per state of group g at step t, and
    ``emission{t}_{g}`` is its input node; groups of one size with equally many followers are evaluated in one tensor
    operation.

    With a rank, any state may follow any other as well, by ways that all groups share: ``W_ij + sum_r U_ir V_rj``, W as
    the pattern allows. The node ``factor{t}`` (R units) mixes the states of step t + 1. N states in groups of sqrt(N)
    that are followed by their own cost about N^1.5 + 2 N R multiplications a step, instead of N^2.

    Arguments and errors are those of :func:`hmm`, but for:

    Args:
        group_sizes: how many states each of the G groups has, N together; given tables have them group after group.
        follows: bool (G, G): whether group h may follow group g, at [g, h]; at least one in every row.
        transition: W, (N, N), zero outside of the pattern, or (L - 1, N, N) when not homogeneous. With a rank, W, U
            (N, R) and V (R, N); the rows of W and U together sum to 1, those of V too.
        rank: R >= 1, or None: no state follows outside of the pattern.
    """
    checked_count("seq_length", seq_length)
    if not isinstance(group_sizes, Sequence) or not group_sizes:
        raise ArgumentError(f"group_sizes: expected a sequence of integers >= 1, got {group_sizes!r}")
    for position, size in enumerate(group_sizes):
        checked_count(f"group_sizes[{position}]", size)
    followers = _followers_of(follows, len(group_sizes))
    starts = [int(start) for start in torch.tensor([0, *group_sizes]).cumsum(0)]
    groups = [slice(start, end) for start, end in itertools.pairwise(starts)]
    num_states = starts[-1]
    nodes = StepNodes(seq_length, num_states, num_categories, homogeneous, emission)
    transitions, left, right = _block_tables(transition, num_states, rank, seq_length - 1, homogeneous)
    if transitions is not None:
        _check_pattern(transitions, groups, followers)
    states = [product_of(nodes.leaves(seq_length - 1, group, f"_{g}")) for g, group in enumerate(groups)]
    for step in reversed(range(seq_length - 1)):
        mixed = []
        weights = None if right is None else right[step]
        shared = [] if rank is None else [nodes.sum("factor", states, rank, weights, name=f"factor{step}")]
        for g, group in enumerate(groups):
            weights = None
            if transitions is not None:
                blocks = [transitions[step, group, groups[h]] for h in followers[g]]
                weights = torch.cat(blocks if left is None else [*blocks, left[step, group]], 1)
            children = [*(states[h] for h in followers[g]), *shared]
            name = f"transition{step}_{g}"
            mixed.append(nodes.sum(("transition", g), children, group_sizes[g], weights, name=name))
        states = [product_of([*nodes.leaves(step, group, f"_{g}"), mixed[g]]) for g, group in enumerate(groups)]
    return rooted(states, num_states, initial, num_classes)


def monarch_hmm(
    seq_length: int,
    num_states: tuple[int, int],
    num_categories: Families,
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    transition: tuple[Tensor, Tensor] | None = None,
    emission: Emission = None,
    num_classes: int | None = None,
) -> Circuit:
    """Build a hidden Markov model whose states are pairs (a, b), and whose transition is a Monarch matrix.

    ``T[(a, b), (a', b')] = R_a[b, b'] L_b'[a, a']``: first b moves, as a says, then a moves, as the new b' says. Any
    state may follow any other, at A B^2 + B A^2 numbers and multiplications a step instead of (A B)^2 (Dao et al. 2022,
    "Monarch: Expressive structured matrices for efficient and accurate training"; as layers of circuits: Zhang, Dang,
    Liu, Van den Broeck 2025, "Scaling probabilistic circuits via Monarch matrices"). The Kronecker product of two
    chains' transitions is one, see ``ct.transforms.product_chain``.

    The sum node ``transition{t}_{a}`` has one unit per state (a, b) of step t and mixes unit a of the nodes
    ``factor{t}_{b'}``, whose units mix the states (a', b') of step t + 1. ``emission{t}_{a}`` are the input nodes.

    Arguments and errors are those of :func:`hmm`, but for:

    Args:
        num_states: (A, B), each >= 1. State (a, b) is number a B + b, in given tables too.
        transition: R, (A, B, B), and L, (B, A, A), rows sum to 1, with a leading (L - 1) when not homogeneous.
    """
    if not isinstance(num_states, (tuple, list)) or len(num_states) != 2:
        raise ArgumentError(f"num_states: expected two numbers, of the states a and b, got {num_states!r:.60}")
    num_a, num_b = (checked_count(f"num_states[{position}]", size) for position, size in enumerate(num_states))
    nodes = StepNodes(seq_length, num_a * num_b, num_categories, homogeneous, emission)
    shapes = (num_a, num_b, num_b), (num_b, num_a, num_a)
    right, left = _two_tables(transition, shapes, seq_length - 1, homogeneous)
    groups = [slice(a * num_b, (a + 1) * num_b) for a in range(num_a)]
    states = [product_of(nodes.leaves(seq_length - 1, group, f"_{a}")) for a, group in enumerate(groups)]
    for step in reversed(range(seq_length - 1)):
        factors = []
        for b in range(num_b):
            weights = None if left is None else left[step, b]
            name = f"factor{step}_{b}"
            factors.append(nodes.sum(("factor", b), states, num_a, weights, unit=b, name=name))
        mixed = []
        for a in range(num_a):
            weights = None if right is None else right[step, a]
            name = f"transition{step}_{a}"
            mixed.append(nodes.sum(("transition", a), factors, num_b, weights, unit=a, name=name))
        states = [product_of([*nodes.leaves(step, group, f"_{a}"), mixed[a]]) for a, group in enumerate(groups)]
    return rooted(states, num_a * num_b, initial, num_classes)


def second_order_hmm(
    seq_length: int,
    num_states: int,
    num_categories: Families,
    homogeneous: bool = True,
    *,
    initial: Tensor | None = None,
    first_transition: Tensor | None = None,
    transition: Tensor | None = None,
    emission: Emission = None,
    num_classes: int | None = None,
) -> Circuit:
    """Build a second-order hidden Markov model, ``p(z_t | z_t-1, z_t-2)`` (He 1988, "Extended Viterbi algorithm").

    The states are pairs: ``transition{t}_{i}_{j}`` is a sum node of one unit for (z_t-1, z_t) = (i, j) that mixes the
    pairs (j, k). So a step has N^2 sum and N^2 product nodes, folded into one tensor operation each, N^3
    multiplications, and N^3 B numbers in flight; building and compiling take time in proportion to L N^2 (measured on
    one core: L = 32 and N = 16 are 16,000 nodes and take under a second, N = 32 are 63,000 nodes and take four).

    Arguments and errors are those of :func:`hmm`, but for:

    Args:
        first_transition: (N, N), p(z_1 = j | z_0 = i) at [i, j].
        transition: p(z_t = k | z_t-2 = i, z_t-1 = j) at [i, j, k], (N, N, N), or (L - 2, N, N, N) when not homogeneous.
    """
    nodes = StepNodes(seq_length, num_states, num_categories, homogeneous, emission)
    first = checked_table("first_transition", first_transition, (num_states, num_states), 1, True)
    num_pairs = max(seq_length - 2, 0)
    transitions = checked_table("transition", transition, (num_states,) * 3, num_pairs, homogeneous)
    every = range(num_states)

    def joined(step: int, mixed: Sequence[Sequence[Node]] | None) -> list[list[Node]]:
        """Multiply the emissions of z_step = k into row j, column k; one row where nothing follows."""
        leaves = [nodes.leaves(step, slice(k, k + 1), f"_{k}") for k in every]
        if mixed is None:
            return [[product_of(own) for own in leaves]] * num_states
        return [[product_of([*leaves[k], row[k]]) for k in every] for row in mixed]

    pairs = joined(seq_length - 1, None)
    for step in reversed(range(1, seq_length - 1)):
        rows = []
        for i in every:
            weights = [None if transitions is None else transitions[step - 1, i, j][None] for j in every]
            rows.append(
                [
                    nodes.sum(("transition", i, j), pairs[j], 1, weights[j], name=f"transition{step}_{i}_{j}")
                    for j in every
                ]
            )
        pairs = joined(step, rows)
    if seq_length == 1:
        return rooted(pairs[0], num_states, initial, num_classes)
    starts = [
        sum(*pairs[i], num_units=1, weights=None if first is None else first[0, i][None], name=f"transition0_{i}")
        for i in every
    ]
    states = [product_of([*nodes.leaves(0, slice(i, i + 1), f"_{i}"), starts[i]]) for i in every]
    return rooted(states, num_states, initial, num_classes)


def _two_tables(
    transition: tuple[Tensor, Tensor] | None, shapes: Sequence[tuple[int, ...]], num_steps: int, homogeneous: bool
) -> list[Tensor | None]:
    """Return the two tables that a transition is made of, once per step."""
    if transition is not None and (not isinstance(transition, (tuple, list)) or len(transition) != 2):
        raise ArgumentError(
            f"transition: expected two tables, {shapes[0]} and {shapes[1]}, got {type(transition).__name__}"
        )
    given = (None, None) if transition is None else transition
    return [
        checked_table(f"transition[{number}]", table, shape, num_steps, homogeneous)
        for number, (table, shape) in enumerate(zip(given, shapes, strict=True))
    ]


def _followers_of(follows: Tensor | Sequence[Sequence[bool]], num_groups: int) -> list[list[int]]:
    try:
        pattern = torch.as_tensor(follows)
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, or rows of several lengths
        raise ArgumentError(
            f"follows: expected bool of shape {(num_groups, num_groups)}, one row and one column per group, got "
            f"{follows!r:.60}"
        ) from error
    if pattern.dtype != torch.bool or tuple(pattern.shape) != (num_groups, num_groups):
        raise ArgumentError(
            f"follows: expected bool of shape {(num_groups, num_groups)}, one row and one column per group, got "
            f"{pattern.dtype} {tuple(pattern.shape)}"
        )
    followers = [[h for h, allowed in enumerate(row) if allowed] for row in pattern.tolist()]
    for group, allowed in enumerate(followers):
        if not allowed:
            raise ArgumentError(
                f"follows: no group may follow group {group}, so no sequence could go on; allow one, at least itself"
            )
    return followers


def _block_tables(
    transition: Any, num_states: int, rank: int | None, num_steps: int, homogeneous: bool
) -> list[Tensor | None]:
    shapes = [(num_states, num_states)]
    if rank is not None:
        shapes += [(num_states, checked_count("rank", rank)), (rank, num_states)]
    if transition is None:
        return [None] * 3
    given = [transition] if rank is None else transition
    if not isinstance(given, (list, tuple)) or len(given) != len(shapes) or not all(torch.is_tensor(t) for t in given):
        raise ArgumentError(f"transition: expected a table, or W, U and V with a rank, got {transition!r:.60}")
    found = [checked_table("transition", *one, num_steps, homogeneous) for one in zip(given, shapes, strict=True)]
    return [*found, None, None][:3]


def _check_pattern(transitions: Tensor, groups: Sequence[slice], followers: Sequence[Sequence[int]]) -> None:
    outside = transitions.clone()
    for g, allowed in enumerate(followers):
        for h in allowed:
            outside[:, groups[g], groups[h]] = 0
    misplaced = outside.nonzero()
    if len(misplaced):
        _, source, target = misplaced[0].tolist()
        weight = float(outside[tuple(misplaced[0])])
        raise StructureError(
            f"transition: expected zeros outside of the pattern `follows`, got {weight:.6g} from state "
            f"{source} to state {target}; allow it in `follows`"
        )
