"""A semiring of one's own in 20 lines: how many explanations do a circuit and evidence leave?

An explanation is a value of every variable with a choice of every latent, and it counts if its probability is positive.
Run: python examples/own_semiring.py
"""

import itertools

import torch

import circuits as ct


class Counting(ct.Semiring):
    """Numbers of explanations: plus and times are those of numbers, and whatever is possible counts 1."""

    def lift(self, log_values):
        return (log_values > -torch.inf).double()

    def times(self, left, right):
        return left * right

    def contract(self, log_weights, x, *, weights=None):  # (F, O, I) and (F, I, B) to (F, O, B)
        return torch.matmul(self.lift(log_weights), x)


# A hidden Markov model of 6 steps and 3 states that never go back, each of which says one or two of 4 words.
forward_only = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
words = torch.tensor([[0.7, 0.0, 0.0], [0.3, 0.5, 0.0], [0.0, 0.5, 0.4], [0.0, 0.0, 0.6]])  # by word and state
pc = ct.compile(ct.structures.hmm(6, 3, 4), seed=0)
for node in pc.circuit.sums:
    if node.num_units == 3:
        pc.set_weights(node, forward_only)
for leaf in pc.circuit.inputs:
    pc.set_weights(leaf, words)

# All values of all variables are asked about; a variable that is left out would be the constant 1, whatever it says.
evidence = torch.zeros(2, 6, 4)
evidence[1, 2, :3] = -torch.inf  # in the second query the third word is known to be the last of the four
found = ct.evaluate(pc, Counting(), ct.Evidence.soft(evidence)).tolist()
print(f"explanations: {found[0]:.0f}, and {found[1]:.0f} of them say the fourth word third")

counted = [0, 0]
for states in itertools.product(range(3), repeat=6):
    is_path = all(forward_only[a, b] > 0 for a, b in itertools.pairwise(states))
    for said in itertools.product(range(4), repeat=6):
        if is_path and all(words[word, state] > 0 for word, state in zip(said, states, strict=True)):
            counted[0] += 1
            counted[1] += said[2] == 3
print(f"by enumeration: {counted[0]}, and {counted[1]}")
assert found == counted
