"""Property-testing a structure of one's own: supply a constructor and an oracle, inherit the tests.

Run: pytest examples/test_your_structure.py
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


class TestComb(ct.testing.StructureTestCase):
    """Inherits a test of every query, gradient, learning step, save and load, and numeric limit."""

    max_examples = 10  # per test; leave it out to let the Hypothesis profile decide

    def circuit(self, draw):
        """Say how a small comb is built; Hypothesis draws the sizes, and shrinks them when a test fails."""
        return comb(draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))

    def log_joint(self, pc):
        """Optional oracle: the comb's own formula in plain tensors (without it the circuit is enumerated)."""
        leaves = sorted(pc.circuit.inputs, key=lambda leaf: leaf.var)
        joint = pc.log_weights(leaves[0]).t()  # (K, C): one row per unit, then one more dimension per variable
        for tooth, mixture in zip(leaves[1:], pc.circuit.sums, strict=False):
            table = (
                pc.log_weights(tooth).t().reshape(-1, *[1] * (joint.dim() - 1), pc.circuit.num_categories[tooth.var])
            )
            products = joint.unsqueeze(-1) + table
            weights = pc.log_weights(mixture)
            joint = torch.logsumexp(weights.reshape(*weights.shape, *[1] * (products.dim() - 1)) + products, 1)
        root = pc.log_weights(pc.circuit.root)[0]
        return torch.logsumexp(root.reshape(-1, *[1] * (joint.dim() - 1)) + joint, 0).detach()


@settings(deadline=None, max_examples=20)
@given(ct.testing.circuits(max_vars=3))  # a property of one's own, of all circuits
def test_any_circuit_is_normalised(circuit):
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    nothing = ct.Evidence.nothing(1, circuit.num_vars)
    assert torch.allclose(ct.queries.log_partition(pc, nothing), torch.zeros(1, dtype=torch.float64))
