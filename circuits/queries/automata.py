"""The probability that a sequence is accepted by a finite automaton, or is in order, under a chain circuit.

The product of a chain circuit (an HMM and its like) with an automaton is again a chain: a unit becomes a vector over
the automaton's states, and a leaf a transition between them (Vidal et al. 2005, "Probabilistic finite-state machines").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring
from circuits.arguments import checked_possible
from circuits.chains import VectorSemiring, joined, padded
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.queries.common import dense_factors, query
from circuits.queries.structural import chain_breaker
from circuits.randomness import Source
from circuits.symbolic import Node, Product

ReadFunction = Callable[[Tensor, Tensor], Tensor]
"""From a variable's log-values (..., M) and what follows, (..., S), to what begins with it, (..., S)."""


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

    def read_one(single: Tensor, after: Tensor) -> Tensor:
        num_read = min(single.shape[-1], transition.shape[1])
        arcs = transition[:, :num_read].transpose(1, 2).reshape(1, num_states * num_states, num_read)
        summed = log_matmul(arcs, single[..., :num_read].flatten(0, -2).t().unsqueeze(0))[0].t()
        summed = summed.reshape(*single.shape[:-1], num_states, num_states)  # (..., S, S')
        return _log_sum_exp(summed + after[..., :num_states].unsqueeze(-2), -1)

    factors = dense_factors(pc, evidence, "automaton_log_probability")
    states = _by_state(pc, factors, order, accept.unsqueeze(0), read_one)
    log_z = checked_possible(pc.log_partition(Evidence.soft(factors)))
    return _log_sum_exp(states[:, :num_states] + start, 1) - log_z


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

    def read_one(single: Tensor, after: Tensor) -> Tensor:
        """State s: the next value is at least s read forwards, at most s - 1 read backwards; both have C + 1 states."""
        values = padded(single, num_values)
        if is_forward:
            read = values + (after[..., 1:] if strict else after[..., :-1])
            return padded(_log_cumulative(read.flip(-1)).flip(-1), num_values + 1)
        read = values + (after[..., :-1] if strict else after[..., 1:])
        return torch.nn.functional.pad(_log_cumulative(read), (1, 0), value=-torch.inf)

    factors = dense_factors(pc, evidence, "order_log_probability")
    states = _by_state(pc, factors, order, factors.new_zeros(1, num_values + 1), read_one)
    log_z = checked_possible(pc.log_partition(Evidence.soft(factors)))
    return states[:, 0 if is_forward else -1] - log_z


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


def _by_state(
    pc: CompiledCircuit, factors: Tensor, order: Sequence[int], after_all: Tensor, read: ReadFunction
) -> Tensor:
    """Return the root's log-values under factors (B, D, C), by state before anything is read, (B, S)."""
    weights, semiring = pc.weights(), StateSemiring(LogSemiring(), order, read)
    by_value = []
    for layer in pc.input_layers:
        table = layer.parameter_rows.select(weights.own[layer.parameter_rows.bank].log).mT  # (F, K, C)
        own = factors[:, layer.variables, : table.shape[2]].transpose(0, 1)  # (F, B, C)
        by_value.append(table.unsqueeze(2) + own.unsqueeze(1))
    question = Question(pc, Evidence.soft(factors), weights)
    return question.with_inputs(semiring.inputs(pc, by_value, after_all)).root(semiring)


class StateSemiring(VectorSemiring):
    """A chain circuit times an automaton: units are vectors over what is read, or over states before all is read.

    Over states are nodes that hold the last variable: their values are those of everything from their first variable
    on, where the automaton is in a state before that is read. All others are single variables, by what is read. Sums
    mix vectors as they mix numbers, and products read single variables, from the last, before what follows them (the
    intersection of an automaton with a hidden Markov model; Vidal et al. 2005, Zhang et al. 2023).

    Args:
        entries: plus, log-sum-exp or maximum, and times of single entries.
        order: :func:`reading_order`.
        read: from single variables by what is read, (..., M), and what follows by state, (..., S), to what begins with
            them by state; either may have more entries than that, which it does not look at.
    """

    def __init__(self, entries: ChoosingSemiring, order: Sequence[int], read: ReadFunction) -> None:
        self.entries, self.is_linear, self.read = entries, entries.is_linear, read
        self.last, self.is_backwards = order[-1], order[0] > order[-1]

    def lift(self, log_values: Tensor) -> Tensor:
        """Return vectors of one entry."""
        return log_values.unsqueeze(-1)

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Mix entry by entry."""
        return self.entries.contract(log_weights, x.flatten(2), weights=weights).unflatten(2, x.shape[2:])

    def choose(self, scores: Tensor, generator: Source) -> Tensor:
        """Choose one index per row."""
        return self.entries.choose(scores, generator)

    def multiply(self, nodes: Sequence[Node], factors: Sequence[Tensor]) -> Tensor:
        """Read the single variables of products before what follows them."""
        is_outer = isinstance(nodes[0], Product) and nodes[0].mode == "outer"
        if is_outer:  # a dimension for the units of each child
            ones = [1] * len(factors)
            factors = [x.unflatten(1, [*ones[:i], x.shape[1], *ones[i + 1 :]]) for i, x in enumerate(factors)]
        parts, orders = [], self.orders(nodes)
        for order, rows in orders.items():
            *front, after = (factors[child] if len(orders) == 1 else factors[child][rows] for child in order)
            parts.append(functools.reduce(lambda after, single: self.read(single, after), reversed(front), after))
        product = joined(parts, 0)
        if len(orders) > 1:
            rearranged = torch.tensor([row for rows in orders.values() for row in rows], device=product.device)
            product = product.index_select(0, rearranged.argsort())
        return product.flatten(1, len(factors)) if is_outer else product

    def orders(self, nodes: Sequence[Node]) -> dict[tuple[int, ...], list[int]]:
        """Return the reading orders in which products take their children, each with those of the products."""
        orders: dict[tuple[int, ...], list[int]] = {}
        for row, node in enumerate(nodes):
            firsts = [child.scope_bits & -child.scope_bits for child in node.children]
            order = sorted(range(len(firsts)), key=firsts.__getitem__, reverse=self.is_backwards)
            orders.setdefault(tuple(order), []).append(row)
        return orders

    def inputs(self, pc: CompiledCircuit, by_value: Sequence[Tensor], after_all: Tensor) -> list[Tensor]:
        """Return the values of input units, from those by what is read, (F, K, B, M) per layer.

        Args:
            pc: the circuit.
            by_value: of all input units, also of the last variable.
            after_all: the weight of every state after it, (B, S) or (1, S).
        """
        values = []
        for layer, singles in zip(pc.input_layers, by_value, strict=True):
            rows = (layer.variables == self.last).nonzero().flatten()
            if len(rows):
                states = self.read(singles[rows], after_all)
                length = max(singles.shape[3], states.shape[3])
                singles = padded(singles, length).index_copy(0, rows, padded(states, length))
            values.append(singles)
        return values


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
    """Return the running logsumexp along the last dimension, with gradient 0, not NaN, where all so far is -inf."""
    peak = x.detach().amax(-1, keepdim=True)
    peak = torch.where(peak > -torch.inf, peak, 0.0)
    possible = x > -torch.inf
    lowest = torch.finfo(x.dtype).min / 4  # the backward pass of logcumsumexp has no -inf
    total = torch.logcumsumexp(torch.where(possible, x - peak, lowest), -1) + peak
    return torch.where(possible.cumsum(-1) > 0, total, -torch.inf)
