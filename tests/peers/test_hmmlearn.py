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


@pytest.fixture
def gaussian_peer(tables):
    model = hmmlearn_hmm.GaussianHMM(n_components=N, covariance_type="diag")
    model.startprob_ = tables["initial"].numpy()
    model.transmat_ = tables["transition"].numpy()
    model.means_ = MEANS.reshape(-1, 1).numpy()
    model.covars_ = (STDS**2).reshape(-1, 1).numpy()
    return model


MEANS = torch.tensor([-1.5, 0.0, 0.7, 2.0], dtype=torch.float64)
STDS = torch.tensor([0.5, 1.2, 0.3, 0.8], dtype=torch.float64)


def gaussian_emissions(tables):
    return {**tables, "emission": torch.stack([MEANS, STDS], 1)}


@pytest.mark.parametrize(
    "build",
    [
        lambda tables: ct.structures.hmm(L, N, ct.Gaussian(), **tables),
        lambda tables: ct.structures.block_sparse_hmm(L, [1, 3], ct.Gaussian(), [[True, True], [True, True]], **tables),
        lambda tables: ct.structures.low_rank_hmm(
            L, N, ct.Gaussian(), N, **{**tables, "transition": (tables["transition"], torch.eye(N).double())}
        ),
        lambda tables: ct.structures.second_order_hmm(
            L,
            N,
            ct.Gaussian(),
            **{**tables, "transition": tables["transition"].expand(N, N, N)},
            first_transition=tables["transition"],
        ),
    ],
)
def test_likelihoods_of_gaussian_emissions_agree(build, tables, gaussian_peer):
    pc = ct.compile(build(gaussian_emissions(tables)), dtype=torch.float64)
    x = ct.queries.sample(pc, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([gaussian_peer.score(row.reshape(-1, 1).numpy()) for row in x], dtype=torch.float64)
    torch.testing.assert_close(pc(x), expected, rtol=1e-8, atol=1e-8)


def test_the_posterior_of_the_states_of_gaussian_emissions_agrees(tables, gaussian_peer):
    """The mean of a missing value mixes the states' means by their posterior; visible states give it itself."""
    pc = ct.compile(ct.structures.hmm(L, N, ct.Gaussian(), **gaussian_emissions(tables)), dtype=torch.float64)
    x = ct.queries.sample(pc, 6, generator=torch.Generator().manual_seed(0))
    states = torch.stack([torch.from_numpy(gaussian_peer.predict_proba(row.reshape(-1, 1).numpy())) for row in x])
    visible = {**tables, "emission": torch.eye(N, dtype=torch.float64)}
    of_states = ct.compile(ct.structures.hmm(L, N, N, **visible), dtype=torch.float64)
    log_factors = torch.distributions.Normal(MEANS, STDS).log_prob(x.unsqueeze(2))
    posterior = ct.queries.marginals(of_states, ct.Evidence.soft(log_factors))
    torch.testing.assert_close(posterior, states, rtol=1e-8, atol=1e-8)
    later = x.clone()
    later[:, -1] = torch.nan
    before = torch.stack([torch.from_numpy(gaussian_peer.predict_proba(r[:-1].reshape(-1, 1).numpy())[-1]) for r in x])
    last = before @ tables["transition"]
    found = ct.queries.mean(pc, ct.Evidence.observe(later))
    torch.testing.assert_close(found[:, -1], last @ MEANS, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[:, :-1], x[:, :-1], rtol=1e-8, atol=1e-8)
    spread = ct.queries.variance(pc, ct.Evidence.observe(later))[:, -1]
    torch.testing.assert_close(spread, last @ (MEANS**2 + STDS**2) - (last @ MEANS) ** 2, rtol=1e-8, atol=1e-8)
    bound = torch.full_like(later, torch.inf)
    bound[:, -1] = 0.5
    below = last @ torch.distributions.Normal(MEANS, STDS).cdf(torch.tensor(0.5).double())
    log_p = ct.queries.log_cdf(pc, bound, ct.Evidence.observe(later))
    torch.testing.assert_close(log_p.exp(), below, rtol=1e-8, atol=1e-8)
