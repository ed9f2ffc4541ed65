"""What docs/coming-from.md says of hmmlearn: sequences of several lengths, tables, EM and its priors."""

import numpy as np
import pytest
import torch

import circuits as ct

hmmlearn_hmm = pytest.importorskip("hmmlearn.hmm", reason="hmmlearn is not installed; it comes with the extra [peers]")

L, N, C = 6, 3, 4
LENGTHS = [6, 1, 3, 5, 2, 6, 4]


def stochastic(*shape, seed):
    draw = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return draw / draw.sum(-1, keepdim=True)


TABLES = {
    "initial": stochastic(N, seed=0),
    "transition": stochastic(N, N, seed=1),
    "emission": stochastic(N, C, seed=2),
}
ROWS = torch.randint(C, (len(LENGTHS), L), generator=torch.Generator().manual_seed(3))
OBSERVED = torch.arange(L) < torch.tensor(LENGTHS).unsqueeze(1)
COMPLETE = torch.randint(C, (40, L), generator=torch.Generator().manual_seed(4))


def hmm(length=L, tables=TABLES):
    return ct.compile(ct.structures.hmm(length, N, C, **tables), dtype=torch.float64)


def peer_of(tables=TABLES, **options):
    model = hmmlearn_hmm.CategoricalHMM(n_components=N, init_params="", **options)
    model.startprob_ = tables["initial"].numpy().copy()
    model.transmat_ = tables["transition"].numpy().copy()
    model.emissionprob_ = tables["emission"].numpy().copy()
    return model


def column(x):
    return x.reshape(-1, 1).numpy()


def test_the_score_of_several_lengths_is_the_sum_of_the_marginals():
    expected = peer_of().score(column(ROWS[OBSERVED]), LENGTHS)
    assert ct.queries.log_marginal(hmm(), ROWS, OBSERVED).sum().item() == pytest.approx(expected, rel=1e-10)


def test_states_of_shorter_sequences_are_those_of_the_padded_rows():
    names = ["initial", *(f"transition{t}" for t in range(L - 1))]
    found = ct.queries.latent_marginals(hmm(), ct.Evidence.observe(ROWS, OBSERVED), names)
    found = torch.stack([found[name] for name in names], 1)[OBSERVED]  # (all symbols, N)
    expected = torch.from_numpy(peer_of().predict_proba(column(ROWS[OBSERVED]), LENGTHS))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_paths_of_padded_rows_are_those_of_the_sequences_alone():
    """`decode` gives score and path of each; behind the end of a sequence the path is -1."""
    found = ct.queries.viterbi(hmm(), ct.Evidence.observe(ROWS, OBSERVED))
    for row, length in enumerate(LENGTHS):
        sequence = ROWS[row, :length]
        score, path = peer_of().decode(column(sequence))
        assert found.log_score[row].item() == pytest.approx(score, rel=1e-10)
        assert found.path[row].tolist() == [*path, *[-1] * (L - length)]
        complete = ct.queries.mpe(hmm(length), ct.Evidence.observe(sequence.unsqueeze(0)))
        assert complete.log_score.item() == pytest.approx(score, rel=1e-10)


def test_the_posterior_and_the_path_of_a_long_series_agree():
    pc = ct.compile(ct.structures.hmm(1000, N, C, **TABLES), dtype=torch.float64)
    series = torch.randint(C, (1, 1000), generator=torch.Generator().manual_seed(5))
    evidence = ct.Evidence.observe(series)
    names = ["initial", *(f"transition{t}" for t in range(999))]
    states = ct.queries.latent_marginals(pc, evidence, names)
    expected = torch.from_numpy(peer_of().predict_proba(column(series)))
    torch.testing.assert_close(torch.cat([states[name] for name in names]), expected, rtol=1e-8, atol=1e-8)
    score, path = peer_of().decode(column(series))
    best = ct.queries.viterbi(pc, evidence)
    assert best.log_score.item() == pytest.approx(score, rel=1e-10)
    assert best.path[0].tolist() == path.tolist()


def learnt(pseudocount, num_epochs):
    pc = hmm()
    result = ct.learning.fit(
        pc, COMPLETE, optimizer="em", num_epochs=num_epochs, pseudocount=pseudocount, progress=False
    )
    return pc, result


def check_same_tables(pc, model):
    def table(name):
        return pc.log_weights(pc.circuit.node(name)).exp().detach()

    for found, expected in (
        (table("initial")[0], model.startprob_),
        (table("transition0"), model.transmat_),
        (table("emission0").t(), model.emissionprob_),
    ):
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


def test_em_takes_the_same_steps_and_its_history_is_that_of_the_mean():
    model = peer_of(n_iter=7, tol=-np.inf).fit(column(COMPLETE), [L] * len(COMPLETE))
    pc, result = learnt(pseudocount=0.0, num_epochs=7)
    check_same_tables(pc, model)
    history = [len(COMPLETE) * value for value in result.train_log_likelihood]
    assert history == pytest.approx(list(model.monitor_.history), rel=1e-8)


def test_a_pseudocount_is_a_prior_that_is_spread_over_the_row():
    a = 0.7
    priors = {"startprob_prior": 1 + a / N, "transmat_prior": 1 + a / N, "emissionprob_prior": 1 + a / C}
    model = peer_of(n_iter=4, tol=-np.inf, **priors).fit(column(COMPLETE), [L] * len(COMPLETE))
    check_same_tables(learnt(pseudocount=a, num_epochs=4)[0], model)


def test_poisson_emissions_agree():
    rates = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    pc = ct.compile(
        ct.structures.hmm(L, N, ct.Poisson(), **{**TABLES, "emission": rates.unsqueeze(1)}), dtype=torch.float64
    )
    model = hmmlearn_hmm.PoissonHMM(n_components=N)
    model.startprob_, model.transmat_ = TABLES["initial"].numpy(), TABLES["transition"].numpy()
    model.lambdas_ = rates.unsqueeze(1).numpy()
    expected = [model.score(column(row)) for row in COMPLETE]
    torch.testing.assert_close(pc(COMPLETE).detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_sampled_sequences_have_the_frequencies_of_theirs():
    """Of all pairs of neighbours: the law of hmmlearn's chain by its tables, and both samplers."""
    first = TABLES["initial"] @ TABLES["transition"]
    states = TABLES["initial"].unsqueeze(1) * TABLES["transition"]
    expected = TABLES["emission"].t() @ states @ TABLES["emission"]
    assert float((expected.sum(0) - first @ TABLES["emission"]).abs().max()) < 1e-12
    ours = ct.queries.sample(hmm(2), 20_000, generator=torch.Generator().manual_seed(0))
    model = peer_of()
    theirs = torch.from_numpy(np.stack([model.sample(2, random_state=seed)[0][:, 0] for seed in range(3_000)]))
    for draws in (ours, theirs):
        counts = torch.bincount(draws[:, 0] * C + draws[:, 1], minlength=C * C).double() / len(draws)
        error = (expected.flatten() * (1 - expected.flatten()) / len(draws)).sqrt()
        assert bool(((counts - expected.flatten()).abs() < 4.5 * error).all())
