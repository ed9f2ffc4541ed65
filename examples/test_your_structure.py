"""Property-testing a structure of one's own: every query against brute-force enumeration.

Run: pytest examples/test_your_structure.py (or: python examples/test_your_structure.py)
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct


def comb(num_vars: int, num_units: int, num_categories: int) -> ct.Circuit:
    """The structure under test: variables join a growing mixture one by one, like the teeth of a comb."""
    node = ct.inputs(0, num_units, ct.Categorical(num_categories))
    for var in range(1, num_vars):
        tooth = ct.inputs(var, num_units, ct.Categorical(num_categories))
        node = ct.sum(ct.product(node, tooth), num_units=num_units)
    return ct.Circuit(ct.sum(node, num_units=1))


@st.composite
def cases(draw):
    """Draw a size, weights, and evidence of any kind: hard, missing, soft, mixed, sparse."""
    circuit = comb(draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    pc = ct.compile(circuit, dtype=torch.float64, seed=draw(st.integers(0, 999)))
    return pc, draw(ct.testing.evidence(circuit))


@settings(deadline=None, max_examples=50)
@given(cases())
def test_the_comb_answers_like_its_enumerated_joint(case):
    pc, evidence = case
    joint = ct.testing.enumerate_joint(pc)  # the oracle: a table of all assignments
    assert torch.allclose(joint.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    log_z = ct.queries.log_partition(pc, evidence)
    torch.testing.assert_close(log_z, ct.testing.enumerated_log_partition(joint, evidence), rtol=1e-9, atol=1e-9)
    marginals = ct.queries.marginals(pc, evidence)
    torch.testing.assert_close(marginals, ct.testing.enumerated_marginals(joint, evidence), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(ct.testing.circuits(max_vars=3))  # or let the strategy draw the structures too
def test_any_circuit_is_normalised(circuit):
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    nothing = ct.Evidence.nothing(1, circuit.num_vars)
    assert torch.allclose(ct.queries.log_partition(pc, nothing), torch.zeros(1, dtype=torch.float64))


if __name__ == "__main__":
    test_the_comb_answers_like_its_enumerated_joint()
    test_any_circuit_is_normalised()
    print("100 random cases agree with enumeration")
