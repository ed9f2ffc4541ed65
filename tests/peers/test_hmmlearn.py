"""Hidden Markov models agree with hmmlearn: likelihood, Viterbi path, and posterior of the states, to 1e-8."""

import pytest
import torch

import circuits as ct

hmmlearn_hmm = pytest.importorskip("hmmlearn.hmm", reason="hmmlearn is not installed; it comes with the extra [peers]")

L, N, C = 12, 4, 5


def stochastic(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.05
    return draw / draw.sum(-1, keepdim=True)


@pytest.fixture
def tables():
    return {
        "initial": stochastic(N, seed=0),
        "transition": stochastic(N, N, seed=1),
        "emission": stochastic(N, C, seed=2),
    }


@pytest.fixture
def peer(tables):
    model = hmmlearn_hmm.CategoricalHMM(n_components=N)
    model.startprob_ = tables["initial"].numpy()
    model.transmat_ = tables["transition"].numpy()
    model.emissionprob_ = tables["emission"].numpy()
    return model


@pytest.fixture
def x():
    return torch.randint(C, (8, L), generator=torch.Generator().manual_seed(3))


def block_sparse(tables):
    """Return the model with its four states as groups of one and three, all of which may follow each other."""
    return ct.structures.block_sparse_hmm(L, [1, 3], C, [[True, True], [True, True]], **tables)


def low_rank(tables):
    """Return the model with the transition as the product of itself and the identity."""
    factors = (tables["transition"], torch.eye(N, dtype=torch.float64))
    return ct.structures.low_rank_hmm(L, N, C, N, **{**tables, "transition": factors})


def second_order(tables):
    """Return the model with a transition that does not look at the state before the last."""
    transition = tables["transition"].expand(N, N, N)
    first = tables["transition"]
    return ct.structures.second_order_hmm(L, N, C, **{**tables, "transition": transition}, first_transition=first)


@pytest.mark.parametrize(
    "build", [lambda tables: ct.structures.hmm(L, N, C, **tables), block_sparse, low_rank, second_order]
)
def test_likelihoods_agree(build, tables, peer, x):
    pc = ct.compile(build(tables), dtype=torch.float64)
    expected = torch.tensor([peer.score(row.reshape(-1, 1).numpy()) for row in x], dtype=torch.float64)
    torch.testing.assert_close(pc(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("build", [lambda tables: ct.structures.hmm(L, N, C, **tables), block_sparse, second_order])
def test_the_most_probable_explanation_has_the_score_of_the_viterbi_path(build, tables, peer, x):
    pc = ct.compile(build(tables), dtype=torch.float64)
    found = ct.queries.mpe(pc, ct.Evidence.observe(x))
    expected = torch.tensor([peer.decode(row.reshape(-1, 1).numpy())[0] for row in x], dtype=torch.float64)
    torch.testing.assert_close(found.log_score, expected, rtol=1e-8, atol=1e-8)


def test_the_viterbi_path_is_the_most_probable_one_of_states_made_visible(tables, peer, x):
    """A model that emits its state has the states as values; soft evidence then says what was observed."""
    visible = ct.structures.hmm(L, N, N, **{**tables, "emission": torch.eye(N, dtype=torch.float64)})
    pc = ct.compile(visible, dtype=torch.float64)
    evidence = ct.Evidence.soft(tables["emission"].log().t()[x])  # (B, L, N): log p(x_t | z_t)
    found = ct.queries.mpe(pc, evidence)
    for row, path, score in zip(x, found.assignment, found.log_score, strict=True):
        expected_score, expected_path = peer.decode(row.reshape(-1, 1).numpy())
        assert path.tolist() == expected_path.tolist()
        assert float(score) == pytest.approx(expected_score, rel=1e-8)


def test_the_posterior_of_the_states_agrees(tables, peer, x):
    visible = ct.structures.hmm(L, N, N, **{**tables, "emission": torch.eye(N, dtype=torch.float64)})
    pc = ct.compile(visible, dtype=torch.float64)
    posterior = ct.queries.marginals(pc, ct.Evidence.soft(tables["emission"].log().t()[x]))
    expected = torch.stack([torch.from_numpy(peer.predict_proba(row.reshape(-1, 1).numpy())) for row in x])
    torch.testing.assert_close(posterior, expected, rtol=1e-8, atol=1e-8)
