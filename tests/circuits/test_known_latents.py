"""Learning with latent states that are known for some samples: EM by enumeration of the paths that agree with them."""

import pytest
import torch
from learning_cases import CLOSE, drawn, hmm

import circuits as ct
from circuits import learning

L, K, V, N = 4, 3, 3, 25


def em_by_enumeration(pc, x, observed, states, pseudocount):
    """Return initial, transition and emission tables after one step of EM; states are -1 where unknown.

    Steps after the last one that anything is known of are no data.
    """
    initial, transition, emission = (
        pc.log_weights(pc.circuit.node(name)).exp().detach() for name in ("initial", "transition0", "emission0")
    )
    counts = [torch.full((1, K), pseudocount / K), torch.full((K, K), pseudocount / K)]
    first, moves, seen = *counts, torch.full((V, K), pseudocount / V)
    first, moves, seen = first.double(), moves.double(), seen.double()
    paths = torch.cartesian_prod(*[torch.arange(K)] * L)
    for row, mask, known in zip(x, observed, states, strict=True):
        length = max(t for t in range(L) if mask[t] or known[t] >= 0) + 1
        weights = initial[0, paths[:, 0]] * transition[paths[:, :-1], paths[:, 1:]].prod(1)
        for t in range(L):
            if mask[t]:
                weights = weights * emission[row[t], paths[:, t]]
            if known[t] >= 0:
                weights = weights * (paths[:, t] == known[t])
        weights = weights / weights.sum()
        for path, weight in zip(paths, weights, strict=True):
            first[0, path[0]] += weight
            for t in range(length):
                if t:
                    moves[path[t - 1], path[t]] += weight
                if mask[t]:
                    seen[row[t], path[t]] += weight
    return first / first.sum(), moves / moves.sum(1, keepdim=True), seen / seen.sum(0)


def example():
    generator = torch.Generator().manual_seed(0)
    x = drawn(hmm(7, seq_length=L, num_states=K, num_categories=V), N)
    lengths = torch.randint(1, L + 1, (N, 1), generator=generator)
    observed = torch.arange(L) < lengths
    states = torch.randint(-1, K, (N, L), generator=generator)
    return x, observed, states.masked_fill(~observed, -1)


@pytest.mark.parametrize("by", ["emission", "sum"])
@pytest.mark.parametrize("batch_size", [7, 100])
def test_half_labelled_sequences_of_different_lengths(by, batch_size):
    x, observed, states = example()
    pc = hmm(1, seq_length=L, num_states=K, num_categories=V)
    expected = em_by_enumeration(pc, x, observed, states, 0.3)
    names = [f"emission{t}" if by == "emission" else "initial" if t == 0 else f"transition{t - 1}" for t in range(L)]
    samples = learning.Samples(x, observed, latents={name: states[:, t] for t, name in enumerate(names)})
    learning.fit(pc, samples, pseudocount=0.3, num_epochs=1, batch_size=batch_size, progress=False)
    for name, table in zip(("initial", "transition0", "emission0"), expected, strict=True):
        torch.testing.assert_close(pc.log_weights(pc.circuit.node(name)).exp(), table, **CLOSE)


@pytest.mark.parametrize("optimizer", ["em", "minibatch_em", "anemone", "viterbi_em", torch.optim.Adam])
def test_every_learner_hears_the_states(optimizer):
    """What they learn from known states is not what they learn without; the likelihood is that of both together."""
    x, observed, states = example()
    results = []
    for latents in (None, {f"emission{t}": states[:, t] for t in range(L)}):
        pc = hmm(1, seq_length=L, num_states=K, num_categories=V)
        samples = learning.Samples(x, observed, latents=latents)
        result = learning.fit(pc, samples, optimizer=optimizer, num_epochs=2, progress=False)
        results.append(result.train_log_likelihood)
    assert all(known < unknown for known, unknown in zip(*reversed(results), strict=True))


def test_all_states_known_is_counting():
    x, _, _ = example()
    states = torch.randint(K, (N, L), generator=torch.Generator().manual_seed(3))
    pc = hmm(1, seq_length=L, num_states=K, num_categories=V)
    samples = learning.Samples(x, latents={f"emission{t}": states[:, t] for t in range(L)})
    learning.fit(pc, samples, pseudocount=0.0, num_epochs=1, progress=False)
    first = torch.bincount(states[:, 0], minlength=K) / N
    torch.testing.assert_close(pc.log_weights(pc.circuit.root).exp()[0], first.double(), rtol=1e-6, atol=1e-6)


def test_known_states_are_part_of_the_run(tmp_path):
    x, _, states = example()

    def fit(states):
        pc = hmm(1, seq_length=L, num_states=K, num_categories=V)
        samples = learning.Samples(x, latents={"emission1": states})
        learning.fit(pc, samples, num_epochs=1, checkpoint_path=tmp_path / "run.safetensors", progress=False)

    fit(states[:, 1])
    with pytest.raises(ct.CheckpointError, match="with a different data"):
        fit(states[:, 2])


def test_units_that_no_sum_chooses_among_have_no_state():
    leaves = [ct.inputs(var, 2, ct.Categorical(2), name=f"x{var}") for var in range(2)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves, mode="outer"), num_units=1)), seed=0)
    samples = learning.Samples(torch.zeros(3, 2).long(), latents={"x0": torch.zeros(3).long()})
    with pytest.raises(ct.ArgumentError, match="no states that a sum chooses among"):
        learning.fit(pc, samples, progress=False)
