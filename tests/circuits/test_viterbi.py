"""Viterbi: the best latents with the variables summed out, in chains of any length, trees, and mixtures."""

import itertools

import numpy as np
import pytest
import torch

import circuits as ct
from circuits.chains import finding as schedules
from circuits.chains import recurrence

START = torch.tensor([0.6, 0.4])
TRANSITION = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
EMISSION = torch.tensor([[0.1, 0.4, 0.5], [0.6, 0.3, 0.1]])
TABLES = {"initial": START, "transition": TRANSITION, "emission": EMISSION}


def by_hand(start, transition, log_emission):
    """Return path and log-score of one sequence by max-product in numpy, from log p(x_t | z_t), (L, N)."""
    score, back = np.log(start) + log_emission[0], []
    for row in log_emission[1:]:
        scores = score[:, None] + np.log(transition)
        back.append(scores.argmax(0))
        score = scores.max(0) + row
    path = [int(score.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1], score.max()


def test_a_padded_row_has_the_path_of_the_sequence_alone():
    """hmmlearn's decode of [0, 1, 2] gives -4.3095 and [1, 0, 0]."""
    padded, observed = torch.tensor([[0, 1, 2, 0, 0]]), (torch.arange(5) < 3).unsqueeze(0)
    for length in (3, 5):
        pc = ct.compile(ct.structures.hmm(length, 2, 3, **TABLES), dtype=torch.float64)
        best = ct.queries.viterbi(pc, ct.Evidence.observe(padded[:, :length], observed[:, :length]))
        assert best.log_score.item() == pytest.approx(-4.3095, abs=1e-4)
        assert best.path.tolist() == [[1, 0, 0, -1, -1][:length]]
        assert best.states["initial"].item() == 1


@pytest.mark.parametrize("way", ["steps", "blocks", "device", "layers"])
@pytest.mark.parametrize(("length", "num_states", "batch_size"), [(1, 3, 2), (9, 2, 20), (60, 5, 3)])
def test_paths_of_sequences_with_gaps_are_those_by_hand(monkeypatch, way, length, num_states, batch_size):
    monkeypatch.setattr(schedules, "_SHORTEST", 1000 if way == "layers" else 4)
    monkeypatch.setattr(recurrence, "_FEW_PRODUCTS", 0 if way == "steps" else 1 << 30)
    monkeypatch.setattr(recurrence, "_MANY_STEPS", 1)
    monkeypatch.setattr(recurrence, "_block_length", lambda states: 3)
    monkeypatch.setattr(recurrence, "_SMALL_MAXIMUM", 0 if way == "device" else 1 << 30)
    pc = ct.compile(ct.structures.hmm(length, num_states, 4), seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, (batch_size, length), generator=generator)
    observed = torch.rand(x.shape, generator=generator) < 0.7
    observed[:, -1] = True
    best = ct.queries.viterbi(pc, ct.Evidence.observe(x, observed))
    start = pc.log_weights("initial").exp()[0].detach().numpy()
    transition = pc.log_weights("transition0").exp().detach().numpy() if length > 1 else None
    emission = pc.log_weights("emission0").detach()
    for row in range(batch_size):
        log_emission = torch.where(observed[row, :, None], emission[x[row]], 0.0).numpy()
        _, score = by_hand(start, transition, log_emission)
        path = best.path[row].numpy()  # paths through gaps may be equally good
        steps = [transition[i, j] for i, j in itertools.pairwise(path)]
        scored = np.log([start[path[0]], *steps]).sum() + log_emission[np.arange(length), path].sum()
        assert scored == pytest.approx(score, rel=1e-10)
        assert best.log_score[row].item() == pytest.approx(score, rel=1e-10)


@pytest.mark.parametrize(("num_states", "batch_size"), [(3, 2), (24, 1)])
def test_the_score_of_a_long_best_path_is_exact_in_float32(num_states, batch_size):
    circuit = ct.structures.hmm(3000, num_states, 4)
    x = torch.randint(4, (batch_size, 3000), generator=torch.Generator().manual_seed(0))
    pc = ct.compile(circuit, seed=0)
    best = ct.queries.viterbi(pc, ct.Evidence.observe(x))
    tables = [pc.parameters_of(name).double().detach().numpy() for name in ("initial", "transition0", "emission0")]
    for row in range(batch_size):
        path = best.path[row].numpy()
        _, score = by_hand(tables[0][0], tables[1], np.log(tables[2][x[row]]))
        steps = [tables[0][0, path[0]], *(tables[1][i, j] for i, j in itertools.pairwise(path))]
        scored = np.log(steps).sum() + np.log(tables[2][x[row], path]).sum()
        assert best.log_score[row].item() == pytest.approx(score, rel=2e-7)
        assert scored == pytest.approx(score, rel=1e-8)
    names = ["initial", *(f"transition{step}" for step in range(2999))]
    assert set(best.states) == set(names)
    assert torch.equal(torch.stack([best.states[name] for name in names], 1), best.path)


def test_states_of_a_tree_are_enumerated_ones():
    """z0 chooses z1 and z2; z1 emits x0 and x1, z2 emits x2, which is missing: only z0, z1 are maximised."""
    rng = np.random.default_rng(0)
    top, first, second = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(2), 3), rng.dirichlet(np.ones(2), 3)
    leaves = [rng.dirichlet(np.ones(4), 2) for _ in range(3)]
    nodes = [ct.inputs(v, 2, ct.Categorical(4), weights=torch.tensor(t.T)) for v, t in enumerate(leaves)]
    z1 = ct.sum(ct.product(nodes[0], nodes[1]), num_units=3, weights=torch.tensor(first), name="z1")
    z2 = ct.sum(nodes[2], num_units=3, weights=torch.tensor(second), name="z2")
    root = ct.sum(ct.product(z1, z2), num_units=1, weights=torch.tensor(top)[None], name="z0")
    pc = ct.compile(ct.Circuit(root), dtype=torch.float64)
    for x in itertools.product(range(4), repeat=3):
        for known in ([True, True, True], [True, True, False], [True, False, True]):
            evidence = ct.Evidence.observe(torch.tensor([x]), torch.tensor([known]))
            best = ct.queries.viterbi(pc, evidence)
            scores = {}
            for i, j, k in itertools.product(range(3), range(2), range(2)):
                p = top[i] * first[i, j] * leaves[0][j, x[0]] * (leaves[1][j, x[1]] if known[1] else 1.0)
                scores[i, j, k if known[2] else -1] = p * (second[i, k] * leaves[2][k, x[2]] if known[2] else 1.0)
            expected = max(scores, key=scores.get)
            assert tuple(best.states[name].item() for name in ("z0", "z1", "z2")) == expected
            assert best.log_score.item() == pytest.approx(np.log(scores[expected]))
            assert best.path is None


def test_gaussian_emissions_and_several_variables_per_step_decode():
    means = torch.tensor([[-2.0, 1.0], [2.0, 1.0]])
    bits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    circuit = ct.structures.hmm(
        6, 2, [ct.Gaussian(), ct.Bernoulli()], initial=START, transition=TRANSITION, emission=[means, bits]
    )
    pc = ct.compile(circuit, dtype=torch.float64)
    x = torch.tensor([[-1.0, 1.0], [1.5, 0.0], [0.1, 0.0], [-3.0, 1.0], [torch.nan, 1.0], [2.0, torch.nan]])
    best = ct.queries.viterbi(pc, ct.Evidence.observe(x.double().flatten().unsqueeze(0)))
    normal = torch.distributions.Normal(means[:, 0], means[:, 1]).log_prob(x[:, :1].nan_to_num()).double()
    heads = torch.distributions.Bernoulli(bits[:, 1]).log_prob(x[:, 1:].nan_to_num()).double()
    log_emission = torch.where(x[:, :1].isnan(), 0.0, normal) + torch.where(x[:, 1:].isnan(), 0.0, heads)
    path, score = by_hand(START.double().numpy(), TRANSITION.double().numpy(), log_emission.numpy())
    assert best.path[0].tolist() == path
    assert best.log_score.item() == pytest.approx(score, rel=1e-6)


def test_of_a_model_per_class_the_path_is_that_of_the_class():
    pc = ct.compile(ct.structures.hmm(6, 2, 3, num_classes=2), seed=0, dtype=torch.float64)
    x = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(0))
    named = [ct.queries.viterbi(pc, ct.Evidence.observe(x).with_class(torch.full((4,), label))) for label in range(2)]
    for label, best in enumerate(named):
        alone = ct.compile(ct.structures.hmm(6, 2, 3), dtype=torch.float64)
        for node in ("initial", "transition0", "emission0"):
            alone.set_weights(node, pc.parameters_of(f"class{label}_{node}").detach())
        expected = ct.queries.viterbi(alone, ct.Evidence.observe(x))
        assert torch.equal(best.path, expected.path)
        assert torch.equal(best.states["class"], torch.full((4,), label))
        torch.testing.assert_close(best.log_score, expected.log_score)
    mixed = ct.queries.viterbi(pc, ct.Evidence.observe(x).with_class_prior(torch.tensor([0.5, 0.5]).log()))
    scores = torch.stack([best.log_score for best in named])
    torch.testing.assert_close(mixed.log_score, scores.amax(0) + np.log(0.5))
    assert torch.equal(mixed.states["class"], scores.argmax(0))
    assert torch.equal(mixed.path, torch.stack([best.path for best in named])[scores.argmax(0), torch.arange(4)])


def test_a_factored_transition_has_the_path_of_its_product():
    left, right = torch.rand(3, 2).softmax(1), torch.rand(2, 3).softmax(1)
    pc = ct.compile(ct.structures.low_rank_hmm(5, 3, 4, 2, transition=(left, right)), seed=0)
    best = ct.queries.viterbi(pc, ct.Evidence.observe(torch.tensor([[0, 1, 2, 3, 0]])))
    assert best.path.shape == (1, 5)
    assert best.path[0, 3].item() == best.states["factor2"].item()
    second_order = ct.compile(ct.structures.second_order_hmm(4, 2, 3), seed=0)
    assert ct.queries.viterbi(second_order, ct.Evidence.observe(torch.tensor([[0, 1, 2, 0]]))).path is None


def test_impossible_evidence_has_no_path():
    pc = ct.compile(ct.structures.hmm(5, 2, 3, **{**TABLES, "emission": torch.tensor([[0.5, 0.5, 0]] * 2)}))
    with pytest.raises(ct.ImpossibleEvidenceError, match="probability zero"):
        ct.queries.viterbi(pc, ct.Evidence.observe(torch.tensor([[0, 1, 2, 0, 0]])))


@pytest.mark.parametrize("length", [40, 200, 600])
def test_no_queries_have_no_path(length):
    pc = ct.compile(ct.structures.hmm(length, 2, 3), seed=0)
    found = ct.queries.viterbi(pc, ct.Evidence.observe(torch.zeros(0, length, dtype=torch.int64)))
    assert found.path.shape == (0, length)
    assert found.log_score.shape == (0,)
