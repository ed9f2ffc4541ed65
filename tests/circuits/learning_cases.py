"""Models, samples and optimizers that the tests of learning share."""

import torch

import circuits as ct

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def hmm(seed, *, seq_length=4, num_states=3, num_categories=4, **options):
    circuit = ct.structures.hmm(seq_length, num_states, num_categories, **options)
    return ct.compile(circuit, dtype=torch.float64, seed=seed)


def drawn(pc, num_samples, seed=0):
    return ct.queries.sample(pc, num_samples, generator=torch.Generator().manual_seed(seed))


def weights_of(pc):
    """Return copies of the parameters by bank."""
    return {name: parameter.detach().clone() for name, parameter in pc.bank.items()}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)
