"""Random circuits with evidence, and their enumerated posteriors, for the tests of queries."""

import pytest
import torch
from hypothesis import strategies as st

import circuits as ct

RELATIVE = {"rtol": 1e-9, "atol": 1e-11}


@st.composite
def compiled_with_evidence(draw, *, batch_size=2, **options):
    circuit = draw(ct.testing.circuits(**options))
    pc = ct.compile(circuit, dtype=torch.float64, seed=draw(st.integers(0, 1000), label="seed"))
    return pc, draw(ct.testing.evidence(circuit, batch_size=batch_size))


def all_assignments(circuit):
    return torch.cartesian_prod(*(torch.arange(c) for c in circuit.num_categories)).reshape(-1, circuit.num_vars)


def evidence_scores(circuit, evidence):
    """Return sum_i log e_i(x_i) of every assignment: (B, all assignments)."""
    factors = evidence.dense(max(circuit.num_categories), torch.float64)
    return factors[:, torch.arange(circuit.num_vars), all_assignments(circuit)].sum(-1)


def log_posterior(pc, evidence):
    """Return (log p(x | e) of every assignment (B, A), log Z (B,)) by enumeration; NaN rows for impossible evidence."""
    scores = ct.testing.enumerate_joint(pc).flatten() + evidence_scores(pc.circuit, evidence)
    log_z = torch.logsumexp(scores, 1)
    return scores - log_z.unsqueeze(1), log_z


def posterior_or_error(pc, evidence, query):
    """Return p(x | e) of every assignment, (B, A); None, after checking that ``query`` raises, where impossible."""
    log_p, log_z = log_posterior(pc, evidence)
    if bool((log_z == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            query()
        return None
    return log_p.exp()


def soft_function(pc, query):
    """Return a function of log-factors for gradcheck: a query of soft evidence."""
    return lambda factors: query(pc, ct.Evidence.soft(factors))


@st.composite
def chains(draw):
    """Draw a chain: each node pairs one or two single variables with the rest; sums, outer products, shared leaves."""
    num_vars = draw(st.integers(1, 4))
    categories = [draw(st.integers(1, 3)) for _ in range(num_vars)]

    def leaf(var, num_units):
        node = ct.inputs(var, num_units, ct.Categorical(categories[var]))
        return ct.sum(node, num_units=num_units) if draw(st.booleans()) else node

    order = list(range(num_vars))
    if draw(st.booleans()):
        order.reverse()
    units = draw(st.integers(1, 3))
    rest = leaf(order.pop(), units)
    while order:
        outer = draw(st.booleans())
        count = draw(st.integers(1, 2)) if outer else rest.num_units
        front = [leaf(order.pop(), count) for _ in range(min(len(order), draw(st.integers(1, 2))))]
        parts = draw(st.permutations([*front, rest]))
        rest = ct.product(*parts, mode="outer" if outer else "elementwise")
        if draw(st.booleans()):
            rest = ct.sum(rest, num_units=draw(st.integers(1, 3)))
    circuit = ct.Circuit(ct.sum(rest, num_units=1))
    pc = ct.compile(circuit, dtype=torch.float64, seed=draw(st.integers(0, 1000)))
    return pc, draw(ct.testing.evidence(circuit))


def run_weight(automaton, sequence):
    """Return the log-weight of all runs of the automaton on a sequence."""
    weights = automaton.log_start.double().exp()
    for value in sequence:
        weights = weights @ automaton.log_transition[:, value].double().exp()
    return (weights @ automaton.log_accept.double().exp()).log()
