"""Hidden Markov blocks times a prediction, by enumeration of all texts and hidden states."""

import itertools

import numpy as np
import torch

import circuits as ct

L, N, V = 3, 2, 4
TEXTS = list(itertools.product(range(V), repeat=L))
STATES = list(itertools.product(range(N), repeat=L))


def hmm(seed=0):
    return ct.compile(ct.structures.hmm(L, N, V, homogeneous=False), dtype=torch.float64, seed=seed)


def tables(pc):
    """Return initial (N,), transitions (L - 1, N, N) and emissions (L, N, V) as probabilities."""
    initial = pc.log_weights(pc.sum_node("initial")).detach().exp().numpy()[0]
    steps = [pc.log_weights(pc.sum_node(f"transition{t}")).detach().exp().numpy() for t in range(L - 1)]
    leaves = {leaf.var: pc.log_weights(leaf).detach().exp().numpy().T for leaf in pc.circuit.inputs}
    return initial, np.stack(steps), np.stack([leaves[var] for var in range(L)])


def joint(tables, q, tokens, masked, normalization, potentials=None):
    """Return p_hat(x, z) of one block up to a constant, over all texts and states: (V ** L, N ** L).

    ``q`` (L, V) are factors; those of observed positions are not looked at. ``potentials`` (L, N) multiply states.
    """
    initial, transitions, emissions = tables
    out = np.zeros((len(TEXTS), len(STATES)))
    for i, text in enumerate(TEXTS):
        if any(not masked[t] and text[t] != tokens[t] for t in range(L)):
            continue
        for j, states in enumerate(STATES):
            p = initial[states[0]]
            for t in range(L):
                p *= transitions[t - 1][states[t - 1], states[t]] if t else 1.0
                p *= emissions[t][states[t], text[t]]
                p *= 1.0 if potentials is None else potentials[t, states[t]]
                if masked[t]:
                    p *= q[t, text[t]]
                    p /= emissions[t][states[t]] @ q[t] if normalization == "local" else 1.0
            out[i, j] = p
    return out


def joints(pc, q, tokens, masked, normalization, potentials=None):
    """Return :func:`joint` of every block, normalised: (B, V ** L, N ** L)."""
    each = []
    for b in range(len(tokens)):
        weights = None if potentials is None else potentials[b]
        one = joint(tables(pc), q[b], tokens[b].tolist(), masked[b].tolist(), normalization, weights)
        each.append(one / one.sum())
    return np.stack(each)


def texts(batch_size):
    """Return all texts for every block, int64 (V ** L, B, L)."""
    return torch.tensor(TEXTS).unsqueeze(1).expand(-1, batch_size, -1)


def truncated(q, top_k, include=None):
    """Return q with all but the k best tokens, and those to include, at 0."""
    if top_k is None:
        return q
    kept = np.zeros_like(q, dtype=bool)
    np.put_along_axis(kept, np.argsort(-q, -1)[..., :top_k], True, -1)
    if include is not None:
        np.put_along_axis(kept, include.numpy()[..., None], True, -1)
    return np.where(kept, q, 0.0)
