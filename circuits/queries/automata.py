"""The probability that a sequence is accepted by a finite automaton, or is in order, under a chain circuit.

The product of a chain circuit (an HMM and its like) with an automaton is again a chain: a unit becomes a vector over
the automaton's states, and a leaf a transition between them (Vidal et al. 2005, "Probabilistic finite-state machines").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import checked_possible
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.queries.alignment import Part
from circuits.queries.common import dense_factors, query
from circuits.queries.structural import chain_breaker, front_to_back, rank_of_scopes
from circuits.symbolic import Input, Node, Product, Sum

StepFunction = Callable[[Tensor, Tensor], Tensor]
"""From a leaf's log-values (K, C, B) and what follows, (K, S, B), to the log-values before the leaf, (K, S, B)."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A finite automaton with S states that reads values 0 .. C - 1; log-weights, -inf where there is no transition.

    Attributes:
        log_transition: (S, C, S): from state, reading value, to state.
        log_start: (S,), the weight of beginning in a state.
        log_accept: (S,), the weight of ending in a state.

    Raises:
        ArgumentError: the shapes do not fit, or a weight is NaN or +inf.
    """

    log_transition: Tensor
    log_start: Tensor
    log_accept: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.log_transition.shape)
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
            raise ArgumentError(f"log_transition: expected shape (S, C, S), got {shape}")
        for name, value in (("log_start", self.log_start), ("log_accept", self.log_accept)):
            if tuple(value.shape) != shape[:1]:
                raise ArgumentError(f"{name}: expected shape ({shape[0]},), got {tuple(value.shape)}")
        for name, value in vars(self).items():
            if not value.is_floating_point() or not bool((value < torch.inf).all()):
                raise ArgumentError(f"{name}: expected log-weights below +inf, got {value.dtype} with NaN or +inf")

    @classmethod
    def deterministic(cls, transition: Tensor, accepting: Iterable[int], *, start: int = 0) -> Automaton:
        """Build an automaton from a table of next states.

        Args:
            transition: int64 (S, C), the next state after reading a value; -1: rejected.
            accepting: the accepting states.
            start: the state to begin in.

        Raises:
            ArgumentError: a state out of range, or a wrong shape or type.
        """
        if not isinstance(transition, Tensor) or transition.dtype != torch.int64 or transition.dim() != 2:
            raise ArgumentError(f"transition: expected an int64 tensor of shape (S, C), got {transition!r}")
        num_states, accepted = len(transition), sorted(set(accepting))
        if bool(((transition < -1) | (transition >= num_states)).any()):
            raise ArgumentError(f"transition: expected states from -1 to {num_states - 1}, got {transition.tolist()}")
        for name, state in (("start", start), *(("accepting", state) for state in accepted)):
            if not 0 <= state < num_states:
                raise ArgumentError(f"{name}: expected a state from 0 to {num_states - 1}, got {state}")
        states = torch.arange(num_states, device=transition.device)
        allowed = [transition.unsqueeze(2) == states, states == start, torch.isin(states, states.new_tensor(accepted))]
        return cls(*(torch.zeros(a.shape, device=a.device).masked_fill(~a, -torch.inf) for a in allowed))

    def reversed(self) -> Automaton:
        """Return the automaton that reads sequences backwards."""
        return Automaton(self.log_transition.transpose(0, 2), self.log_accept, self.log_start)


@query
def automaton_log_probability(pc: CompiledCircuit, automaton: Automaton, evidence: Evidence | None = None) -> Tensor:
    """Return the log-probability that x_0, x_1, ..., x_D-1 is accepted, ``log P(accepted | e)``.

    For a weighted automaton it is the log of the expected weight, summed over its runs. Needs a chain circuit in the
    order of the variables, forwards or backwards: every product splits off the first (or the last) variable. Exact,
    with S times the memory of a likelihood and S^2 times its leaves. Differentiable in weights, evidence and the
    automaton.

    Args:
        pc: a chain circuit, an HMM for instance.
        automaton: over at least as many values as any variable has.
        evidence: for B queries; None: no evidence, B = 1.

    Returns:
        (B,), in nats; -inf where no accepted sequence is possible.

    Raises:
        ArgumentError: the automaton reads too few values.
        PropertyError: the circuit is not a chain in this order; names the product.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    if not isinstance(automaton, Automaton):
        raise ArgumentError(f"automaton: expected a ct.queries.Automaton, got {type(automaton).__name__}")
    num_values = max(pc.circuit.num_categories)
    if automaton.log_transition.shape[1] < num_values:
        raise ArgumentError(
            f"automaton: expected one over at least {num_values} values, got {automaton.log_transition.shape[1]}"
        )
    order = reading_order(pc, "automaton_log_probability")
    read = automaton if order[0] <= order[-1] else automaton.reversed()
    tables = (read.log_transition, read.log_start, read.log_accept)
    transition, start, accept = (table.to(pc.device, pc.dtype) for table in tables)
    num_states = len(start)

    def step(leaf: Tensor, after: Tensor) -> Tensor:
        num_read = leaf.shape[1]
        arcs = transition[:, :num_read].transpose(1, 2).reshape(1, num_states * num_states, num_read)
        summed = log_matmul(arcs, leaf.transpose(0, 1).reshape(1, num_read, -1))[0]
        summed = summed.reshape(num_states, num_states, *leaf.shape[::2])  # (S, S', K, B)
        return _log_sum_exp(summed + after.transpose(0, 1).unsqueeze(0), 1).transpose(0, 1)

    factors = dense_factors(pc, evidence, "automaton_log_probability")
    after_all = accept.reshape(1, -1, 1)
    states = _chain(pc, factors, order, after_all, step)  # (1, S, B)
    log_z = checked_possible(pc.log_partition(Evidence.soft(factors)))
    return _log_sum_exp(states[0] + start.unsqueeze(1), 0) - log_z


@query
def order_log_probability(pc: CompiledCircuit, evidence: Evidence | None = None, *, strict: bool = False) -> Tensor:
    """Return ``log P(x_0 <= x_1 <= ... <= x_D-1 | e)``, or with < in place of <=.

    The automaton whose state is the last value, in time linear in the number of values. Needs a chain circuit in the
    order of the variables, forwards or backwards. Differentiable in weights and evidence.

    Args:
        pc: a chain circuit; the order of the values is 0 < 1 < ... < C - 1.
        evidence: for B queries; None: no evidence, B = 1.
        strict: whether values must increase strictly.

    Returns:
        (B,), in nats; -inf where no such sequence is possible.

    Raises:
        PropertyError: the circuit is not a chain in this order; names the product.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    order = reading_order(pc, "order_log_probability")
    is_forward = order[0] <= order[-1]
    num_values = max(pc.circuit.num_categories)

    def step(leaf: Tensor, after: Tensor) -> Tensor:
        """State s: the next value is at least s read forwards, at most s - 1 read backwards; both have C + 1 states."""
        padded = torch.nn.functional.pad(leaf, (0, 0, 0, num_values - leaf.shape[1]), value=-torch.inf)  # (K, C, B)
        if is_forward:
            read = padded + (after[:, 1:] if strict else after[:, :-1])
            return torch.nn.functional.pad(_log_cumulative(read.flip(1)).flip(1), (0, 0, 0, 1), value=-torch.inf)
        read = padded + (after[:, :-1] if strict else after[:, 1:])
        return torch.nn.functional.pad(_log_cumulative(read), (0, 0, 1, 0), value=-torch.inf)

    factors = dense_factors(pc, evidence, "order_log_probability")
    after_all = factors.new_zeros(1, num_values + 1, 1)
    states = _chain(pc, factors, order, after_all, step)[0]
    log_z = checked_possible(pc.log_partition(Evidence.soft(factors)))
    return states[0 if is_forward else -1] - log_z


def reading_order(pc: CompiledCircuit, query: str) -> Sequence[int]:
    """Return the variables in the order in which the circuit's products split them off."""
    forwards = range(pc.circuit.num_vars)
    node = chain_breaker(pc.circuit, forwards)
    if node is None:
        return forwards
    if chain_breaker(pc.circuit, forwards[::-1]) is None:
        return forwards[::-1]
    raise PropertyError(
        f"{query}: expected a chain circuit in the order of the variables, in which every product pairs the first (or "
        f"the last) variable with the rest, got {node}"
    )


def _chain(pc: CompiledCircuit, factors: Tensor, order: Sequence[int], after_all: Tensor, step: StepFunction) -> Tensor:
    """Return the root's log-values by state before anything is read, (1, S, B)."""
    weights, rank = pc.weights(), rank_of_scopes(order)
    leaves: dict[Node, Tensor] = {}  # nodes of one variable: log-values with evidence, (K, C, B)
    states: dict[Node, Tensor] = {}  # nodes of all variables from some point on: (K, S, B)
    for node in pc.circuit.nodes:
        if isinstance(node, Input):
            table = pc.log_weights(node, weights).t().unsqueeze(2)
            leaves[node] = table + factors[:, node.var, : table.shape[1]].t()
        elif isinstance(node, Sum):
            tables = leaves if node.scope_bits in rank else states
            x = torch.cat([tables[child] for child in node.children]).flatten(1).unsqueeze(0)
            mixed = logspace.log_matmul(pc.log_weights(node, weights).unsqueeze(0), x)[0]
            tables[node] = mixed.reshape(len(mixed), *tables[node.children[0]].shape[1:])
        elif node.scope_bits in rank:
            leaves[node] = leaves[node.children[0]]
        else:
            assert isinstance(node, Product)
            states[node] = _product(node, leaves, states, rank, after_all, step)
    root = pc.circuit.root
    return states[root] if root in states else step(leaves[root], after_all)


def _product(
    node: Product,
    leaves: dict[Node, Tensor],
    states: dict[Node, Tensor],
    rank: Mapping[int, int],
    after_all: Tensor,
    step: StepFunction,
) -> Tensor:
    """Read the single variables of a product, from the last, after what follows them."""
    units = {part.node: chosen for part, chosen in Part(node).factors}
    after = after_all
    for child in reversed(front_to_back(node, rank)):
        chosen = units[child]
        if child in states:
            after = states[child] if chosen is None else states[child][chosen.to(after_all.device)]
        else:
            leaf = leaves[child] if chosen is None else leaves[child][chosen.to(after_all.device)]
            after = step(leaf, after)
    return after


def log_matmul(log_weights: Tensor, x: Tensor) -> Tensor:
    """Multiply in log space by weights that may exceed 1."""
    peak = log_weights.detach().amax(2, keepdim=True)
    peak = torch.where(peak > -torch.inf, peak, 0.0)
    return logspace.log_matmul(log_weights - peak, x) + peak


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Return logsumexp with gradient 0, not NaN, where all is -inf."""
    possible = (x > -torch.inf).any(dim, keepdim=True)
    return torch.where(possible.squeeze(dim), torch.where(possible, x, 0.0).logsumexp(dim), -torch.inf)


def _log_cumulative(x: Tensor) -> Tensor:
    """Return the running logsumexp along dimension 1, with gradient 0, not NaN, where all so far is -inf."""
    peak = x.detach().amax(1, keepdim=True)
    peak = torch.where(peak > -torch.inf, peak, 0.0)
    possible = x > -torch.inf
    lowest = torch.finfo(x.dtype).min / 4  # the backward pass of logcumsumexp has no -inf
    total = torch.logcumsumexp(torch.where(possible, x - peak, lowest), 1) + peak
    return torch.where(possible.cumsum(1) > 0, total, -torch.inf)
