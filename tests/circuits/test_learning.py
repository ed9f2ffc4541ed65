"""Flows are gradients of the enumerated likelihood, EM is the textbook's, and a fit survives whatever happens to it."""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_cases import CLOSE, adam, drawn, hmm, weights_of
from query_cases import compiled_with_evidence

import circuits as ct
from circuits import learning
from circuits.learning import learners as _learners
from circuits.learning import samples as _samples

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def mean_log_likelihood(pc, x):
    return float(pc(x).mean())


def equal_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def zeros_of(pc):
    return {name: weights.log == -torch.inf for name, weights in pc.weights().own.items()}


OPTIMIZERS = {"em": "em", "minibatch_em": "minibatch_em", "anemone": "anemone", "adam": adam}


# Flows and steps --------------------------------------------------------------------------------------------------


@given(compiled_with_evidence(batch_size=3, max_vars=3), st.data())
def test_flows_are_the_gradient_of_the_enumerated_likelihood(case, data):
    pc, evidence = case
    flows, log_likelihood = learning.expected_flows(pc, evidence)

    def enumerated():
        return ct.testing.enumerated_log_partition(ct.testing.enumerate_joint(pc), evidence)

    before = enumerated()
    possible = before > -torch.inf
    torch.testing.assert_close(log_likelihood, before, **CLOSE)
    name = data.draw(st.sampled_from(sorted(name for name in pc.bank if pc.bank[name].numel())))
    parameter = pc.bank[name]
    place = tuple(data.draw(st.integers(0, size - 1)) for size in parameter.shape)
    if parameter[place] == -torch.inf:
        assert flows[name][place] == 0
        return
    # d log Z / d parameter = sum_nc F_nc d log w_nc / d parameter
    log_weights = pc.weights().own[name].log
    score = torch.where(flows[name] > 0, flows[name] * log_weights, 0.0).sum()
    expected = torch.autograd.grad(score, parameter)[0][place]
    shifted = []
    for shift in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            parameter[place] += shift
        shifted.append(enumerated()[possible].sum())
    torch.testing.assert_close((shifted[0] - shifted[1]) / 2e-5, expected, rtol=1e-5, atol=1e-6)


@given(compiled_with_evidence(batch_size=3))
def test_every_observed_value_is_used_by_exactly_one_leaf(case):
    pc, evidence = case
    flows, log_likelihood = learning.expected_flows(pc, evidence)
    joint = ct.testing.enumerate_joint(pc)
    possible = log_likelihood > -torch.inf
    evidence = evidence.rows(possible)
    expected = torch.zeros(max(pc.circuit.num_categories), dtype=torch.float64)
    if bool(possible.any()):
        marginals = ct.testing.enumerated_marginals(joint, evidence)
        marginals = marginals.masked_fill(
            evidence.levelled(pc.num_categories)[0].says_nothing(pc.num_categories).unsqueeze(-1), 0.0
        )
        expected = marginals.sum((0, 1))
    found = torch.zeros_like(expected)
    for name, flow in flows.items():
        if name.startswith("input"):
            found[: flow.shape[1]] += flow.sum((0, 2))
    torch.testing.assert_close(found, expected, **CLOSE)


@given(compiled_with_evidence(batch_size=3), st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3))
def test_em_never_lowers_the_likelihood_and_keeps_zeros(case, counts):
    pc, evidence = case
    counts = torch.tensor(counts, dtype=torch.float64)
    zeros = zeros_of(pc)
    before = None
    for _ in range(3):
        flows, log_likelihood = learning.expected_flows(pc, evidence, counts)
        possible = log_likelihood > -torch.inf
        total = (counts * log_likelihood)[possible].sum()
        assert before is None or total >= before - 1e-9
        before = total
        learning.em_step(pc, flows)
        with torch.no_grad():  # reads the weights through their cache
            assert torch.equal((pc.log_partition(evidence) > -torch.inf)[counts > 0], possible[counts > 0])
        for name, weights in pc.weights().own.items():
            assert bool((weights.log[zeros[name]] == -torch.inf).all())
            assert not bool(weights.log.isnan().any())


def test_one_em_step_of_a_mixture_is_the_textbook_one():
    pc = ct.compile(ct.structures.mixture(3, [2, 3, 4], num_components=5), dtype=torch.float64, seed=0)
    x = drawn(pc, 50)
    pc.randomize(seed=1)
    prior = pc.log_weights(pc.circuit.root)[0].exp()
    tables = [pc.log_weights(node).exp() for node in pc.circuit.inputs]
    responsibility = prior * tables[0][x[:, 0]] * tables[1][x[:, 1]] * tables[2][x[:, 2]]
    responsibility = responsibility / responsibility.sum(1, keepdim=True)
    learning.em_step(pc, learning.expected_flows(pc, x).flows)
    torch.testing.assert_close(pc.log_weights(pc.circuit.root)[0].exp(), responsibility.mean(0), **CLOSE)
    for node in pc.circuit.inputs:
        one_hot = torch.nn.functional.one_hot(x[:, node.var], node.distribution.num_values).double()
        expected = one_hot.t() @ responsibility / responsibility.sum(0)
        torch.testing.assert_close(pc.log_weights(node).exp(), expected, **CLOSE)


def hidden_path_counts(pc, x, length, states):
    """Expected initial, transition and emission counts of a homogeneous HMM, by a loop over all hidden paths."""
    initial = pc.log_weights(pc.circuit.node("initial"))[0].exp()
    transition = pc.log_weights(pc.circuit.node("transition0")).exp()
    emission = pc.log_weights(pc.circuit.node("emission0")).exp().t()
    counts = [torch.zeros_like(table) for table in (initial, transition, emission)]
    for sample in x:
        joint = {}
        for path in itertools.product(range(states), repeat=length):
            p = initial[path[0]] * torch.stack([emission[z, v] for z, v in zip(path, sample, strict=True)]).prod()
            for i, j in itertools.pairwise(path):
                p = p * transition[i, j]
            joint[path] = p
        evidence = sum(joint.values())
        for path, p in joint.items():
            counts[0][path[0]] += p / evidence
            for i, j in itertools.pairwise(path):
                counts[1][i, j] += p / evidence
            for z, v in zip(path, sample, strict=True):
                counts[2][z, v] += p / evidence
    return counts


@pytest.mark.parametrize(("step_size", "pseudocount"), [(1.0, 0.0), (1.0, 0.6), (0.3, 0.6)])
def test_one_em_step_of_a_tied_hmm_is_baum_welch(step_size, pseudocount):
    pc = hmm(0, seq_length=3, num_states=2)
    x = drawn(hmm(1, seq_length=3, num_states=2), 6)
    names = ["initial", "transition0", "emission0"]
    nodes = [pc.circuit.node(name) for name in names]
    before = [pc.log_weights(node).exp() for node in nodes]
    counts = hidden_path_counts(pc, x, 3, 2)
    learning.em_step(pc, learning.expected_flows(pc, x).flows, step_size=step_size, pseudocount=pseudocount)
    for node, old, count in zip(nodes, before, counts, strict=True):
        old = old if node.children else old.t()
        count = count.reshape(old.shape)
        maximised = (count + pseudocount / count.shape[1]) / (count.sum(1, keepdim=True) + pseudocount)
        found = pc.log_weights(node).exp()
        found = found if node.children else found.t()
        torch.testing.assert_close(found, (1 - step_size) * old + step_size * maximised, **CLOSE)


def test_top_down_flows_of_an_hmm_are_its_state_probabilities_without_data():
    pc = hmm(0, seq_length=4, num_states=3)
    state = pc.log_weights(pc.circuit.node("initial"))[0].exp()
    transition = pc.log_weights(pc.circuit.node("transition0")).exp()
    emission = pc.log_weights(pc.circuit.node("emission0")).exp()
    flows = learning.top_down_flows(pc)
    states = [state]
    for _ in range(3):
        states.append(states[-1] @ transition)
    torch.testing.assert_close(flows["sum_1x3"][0, 0], state, **CLOSE)
    torch.testing.assert_close(flows["sum_3x3"][0], sum(states[:3]).unsqueeze(1) * transition, **CLOSE)
    torch.testing.assert_close(flows["input_4x3"][0], sum(states) * emission, **CLOSE)


def test_anemone_follows_its_formula():
    pc = hmm(0)
    s, mu, a = 0.3, 0.8, 0.01
    average = {name: torch.zeros_like(parameter) for name, parameter in pc.bank.items()}
    state = None
    for step in range(1, 4):
        x = drawn(hmm(1), 10, seed=step)
        flows, _ = learning.expected_flows(pc, x)
        expected = {}
        for name, top_down in learning.top_down_flows(pc).items():
            average[name] = mu * average[name] + (1 - mu) * flows[name]
            corrected = average[name] / (1 - mu**step)
            rescaled = s / len(x) * corrected + (1 - s) * top_down
            axis = -1 if name.startswith("sum") else -2
            total = rescaled.sum(axis, keepdim=True)
            expected[name] = (rescaled + a / rescaled.shape[axis]) / (total + a)
        state = learning.anemone_step(pc, flows, len(x), state, step_size=s, momentum=mu, pseudocount=a)
        for name, weights in pc.weights().own.items():
            torch.testing.assert_close(weights.log.exp(), expected[name], **CLOSE)


def test_anemone_without_momentum_and_damping_is_em():
    one, other = hmm(0), hmm(0)
    x = drawn(hmm(1), 20)
    flows, _ = learning.expected_flows(one, x)
    learning.em_step(one, flows)
    learning.anemone_step(other, flows, len(x), step_size=1.0, momentum=0.0, pseudocount=0.0)
    for name, weights in one.weights().own.items():
        torch.testing.assert_close(other.weights().own[name].log.exp(), weights.log.exp(), **CLOSE)


def test_units_that_no_sample_reaches_keep_their_weights():
    transition = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    pc = hmm(0, num_states=2, initial=torch.tensor([1.0, 0.0]), transition=transition)
    emission = pc.log_weights(pc.circuit.node("emission0"))
    learning.em_step(pc, learning.expected_flows(pc, drawn(pc, 5)).flows, pseudocount=1.0)
    assert torch.equal(pc.log_weights(pc.circuit.node("transition0")).exp(), transition)
    torch.testing.assert_close(pc.log_weights(pc.circuit.node("emission0"))[:, 1], emission[:, 1], rtol=1e-12, atol=0)
    assert not torch.allclose(pc.log_weights(pc.circuit.node("emission0"))[:, 0], emission[:, 0])


def test_steps_refuse_what_is_out_of_range():
    pc = hmm(0)
    flows, _ = learning.expected_flows(pc, drawn(pc, 5))
    for options in ({"step_size": 0}, {"step_size": 1.5}, {"pseudocount": -1.0}, {"pseudocount": torch.inf}):
        with pytest.raises(ct.ArgumentError, match=next(iter(options))):
            learning.em_step(pc, flows, **options)
    with pytest.raises(ct.ArgumentError, match="momentum"):
        learning.anemone_step(pc, flows, 5, momentum=1.0)
    with pytest.raises(ct.ArgumentError, match="flows"):
        learning.em_step(hmm(0, num_states=2), flows)
    for weights in (torch.ones(4), -torch.ones(5), torch.full((5,), torch.nan), [1.0] * 5):
        with pytest.raises(ct.ArgumentError, match="sample_weights"):
            learning.expected_flows(pc, drawn(pc, 5), weights)


# Fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_reaches_the_generating_likelihood(optimizer):
    truth = hmm(7)
    x, held_out = drawn(truth, 500), drawn(truth, 300, seed=1)
    pc = hmm(1)
    before = mean_log_likelihood(pc, held_out)
    result = learning.fit(
        pc, x, optimizer=OPTIMIZERS[optimizer], num_epochs=12, batch_size=50, validation_data=held_out, progress=False
    )
    reached, possible = mean_log_likelihood(pc, held_out), mean_log_likelihood(truth, held_out)
    assert before < possible - 0.2
    assert reached > possible - 0.05
    assert reached == pytest.approx(max(result.validation_log_likelihood), abs=1e-12)
    assert result.validation_log_likelihood[result.best_epoch] == max(result.validation_log_likelihood)
    assert not result.stopped_early
    assert result.num_impossible == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_structural_zeros_survive_every_optimizer(optimizer):
    left_to_right = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    pc = hmm(0, transition=left_to_right)
    learning.fit(pc, drawn(hmm(1), 60), optimizer=OPTIMIZERS[optimizer], num_epochs=3, batch_size=16, progress=False)
    found = pc.log_weights(pc.circuit.node("transition0")).exp()
    assert torch.equal(found == 0, left_to_right == 0)
    assert not torch.allclose(found, left_to_right)


def test_a_full_batch_epoch_is_one_em_step_whatever_the_batch_size():
    x = drawn(hmm(1), 37)
    one, other = hmm(0), hmm(0)
    learning.em_step(one, learning.expected_flows(one, x).flows, pseudocount=0.5)
    result = learning.fit(other, x, num_epochs=1, batch_size=5, pseudocount=0.5, progress=False)
    for name, weights in one.weights().own.items():
        torch.testing.assert_close(other.weights().own[name].log, weights.log, **CLOSE)
    assert result.train_log_likelihood == pytest.approx((mean_log_likelihood(hmm(0), x),))


def test_missing_values_are_summed_out():
    x = torch.tensor([[0, 2], [1, -5], [1, 99], [7, 0]])
    observed = torch.tensor([[True, True], [True, False], [True, False], [False, True]])
    pc = ct.compile(ct.structures.fully_factorized(2, [2, 3]), dtype=torch.float64, seed=0)
    learning.fit(pc, x, observed=observed, num_epochs=1, pseudocount=0.0, progress=False)
    found = [pc.log_weights(node)[:, 0].exp().tolist() for node in pc.circuit.inputs]
    assert found == [pytest.approx([1 / 3, 2 / 3]), pytest.approx([1 / 2, 0, 1 / 2])]


def test_sample_weights_count_repetitions():
    x = drawn(hmm(1), 9)
    times = torch.tensor([0, 1, 2, 3, 1, 0, 2, 1, 1])
    one, other = hmm(0), hmm(0)
    weighted = learning.fit(one, x, sample_weights=times.double(), num_epochs=4, progress=False)
    repeated = learning.fit(other, x.repeat_interleave(times, 0), num_epochs=4, progress=False)
    assert weighted.train_log_likelihood == pytest.approx(repeated.train_log_likelihood)
    for name, weights in one.weights().own.items():
        torch.testing.assert_close(other.weights().own[name].log, weights.log, **CLOSE)


def test_numpy_arrays_and_small_integers_are_data_too():
    x = drawn(hmm(1), 30)
    read_only = x.numpy().astype(np.uint8)
    read_only.flags.writeable = False
    reversed_twice = np.ascontiguousarray(x.numpy()[::-1])[::-1]
    results = [learning.fit(hmm(0), data, num_epochs=2, progress=False) for data in (x, reversed_twice, read_only)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_impossible_samples_are_counted_and_change_nothing(optimizer):
    emission = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.8, 0.0], [0.2, 0.6, 0.2, 0.0]])
    possible = drawn(hmm(1, num_categories=3), 30)
    impossible = possible[:4].clone()
    impossible[:, 2] = 3
    with_them, without = hmm(0, emission=emission), hmm(0, emission=emission)
    options = {"optimizer": OPTIMIZERS[optimizer], "num_epochs": 3, "batch_size": 64, "progress": False}
    found = learning.fit(with_them, torch.cat([possible, impossible]), **options)
    expected = learning.fit(without, possible, **options)
    assert (found.num_impossible, expected.num_impossible) == (4, 0)
    assert found.train_log_likelihood == pytest.approx(expected.train_log_likelihood)
    for name, weights in without.weights().own.items():
        torch.testing.assert_close(with_them.weights().own[name].log, weights.log, **CLOSE)
    before = weights_of(with_them)
    with pytest.raises(ct.ImpossibleEvidenceError, match="all 4 samples"):
        learning.fit(with_them, impossible, **options)
    assert equal_weights(weights_of(with_them), before)


def test_a_product_root_with_an_impossible_factor_has_no_flow():
    leaves = [ct.inputs(i, 1, ct.Bernoulli(), weights=torch.tensor([[1.0], [0.0]]) if i else None) for i in range(2)]
    pc = ct.compile(ct.Circuit(ct.product(*leaves)), seed=0)
    flows, log_likelihood = learning.expected_flows(pc, torch.tensor([[0, 1], [1, 0]]))
    assert log_likelihood[0] == -torch.inf
    assert flows["input_2x1"][:, :, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_early_stopping_keeps_the_best_weights():
    truth = hmm(7)
    x, held_out = drawn(truth, 12), drawn(truth, 200, seed=1)
    pc = hmm(1, num_states=8)
    result = learning.fit(pc, x, num_epochs=200, validation_data=held_out, patience=3, progress=False)
    heard = result.validation_log_likelihood
    assert result.stopped_early
    assert len(heard) == result.best_epoch + 4 < 200
    assert max(heard) == heard[result.best_epoch]
    assert mean_log_likelihood(pc, held_out) == pytest.approx(max(heard), abs=1e-12)


def test_small_improvements_are_none():
    x = drawn(hmm(7), 50)
    options = {"num_epochs": 200, "validation_data": x, "patience": 2, "progress": False}
    patient, demanding = (learning.fit(hmm(1), x, min_improvement=least, **options) for least in (0.0, 0.01))
    assert len(demanding.validation_log_likelihood) < len(patient.validation_log_likelihood)


def test_the_order_of_the_samples_is_a_function_of_the_seed():
    x = drawn(hmm(7), 60)

    def fitted(seed):
        pc = hmm(1)
        learning.fit(pc, x, optimizer="minibatch_em", num_epochs=2, batch_size=8, seed=seed, progress=False)
        return weights_of(pc)

    assert equal_weights(fitted(0), fitted(0))
    assert not equal_weights(fitted(0), fitted(1))


def test_progress_shows_likelihoods_on_standard_error(capsys):
    x = drawn(hmm(7), 20)
    result = learning.fit(hmm(1), x, num_epochs=2, validation_data=x)
    shown = capsys.readouterr().err
    assert f"train {result.train_log_likelihood[-1]:.4f}, validation" in " ".join(shown.split())


# What is refused --------------------------------------------------------------------------------------------------

GOOD = torch.zeros(5, 4, dtype=torch.int64)
REFUSED = {
    "empty": ({"data": GOOD[:0]}, "data: expected at least one"),
    "fractions": ({"data": GOOD + 0.5}, "data: expected values from 0 to 3 of variable 0, got 0.5 in sample 0"),
    "ragged lists": ({"data": [[0, 0, 0, 0], [0]]}, "data: expected lists of one length"),
    "a dict": ({"data": {}}, "data: expected a tensor"),
    "texts": ({"data": np.array([["a"] * 4])}, "data: expected an array of numbers"),
    "one sample": ({"data": GOOD[0]}, r"data: expected integers of shape \(num_samples, 4\)"),
    "another length": ({"data": GOOD[:, :3]}, r"\(5, 3\)"),
    "too large": ({"data": GOOD + 4}, "data: expected values from 0 to 3 of variable 0, got 4 in sample 0"),
    "negative": ({"data": GOOD - 1}, "got -1"),
    "too large in validation": ({"validation_data": GOOD + 4}, "validation_data: expected values from 0 to 3"),
    "observed of a wrong shape": ({"observed": torch.ones(5, 3, dtype=torch.bool)}, "observed"),
    "observed of a wrong type": ({"observed": torch.ones(5, 4)}, "observed"),
    "integer sample weights": ({"sample_weights": torch.ones(5, dtype=torch.int64)}, "sample_weights"),
    "negative sample weights": ({"sample_weights": -torch.ones(5)}, "sample_weights"),
    "unknown optimizer": ({"optimizer": "sgd"}, "optimizer: expected em, minibatch_em, anemone"),
    "no optimizer": ({"optimizer": None}, "optimizer"),
    "function to something else": ({"optimizer": lambda p: 1}, "optimizer"),
    "optimizer of others": ({"optimizer": torch.optim.SGD([torch.zeros(2)], lr=1.0)}, "optimizer"),
    "momentum of em": ({"momentum": 0.5}, "momentum: em has no such option"),
    "step size of adam": ({"optimizer": adam, "step_size": 0.5}, "step_size: GradientDescent has no such option"),
    "step size": ({"step_size": 0.0}, "step_size"),
    "no epochs": ({"num_epochs": 0}, "num_epochs"),
    "no batch": ({"batch_size": 0}, "batch_size"),
    "negative seed": ({"seed": -1}, "seed"),
    "patience alone": ({"patience": 3}, "patience: .* validation_data"),
    "negative improvement": ({"min_improvement": -1.0}, "min_improvement"),
    "a folder": ({"checkpoint_path": "."}, "checkpoint_path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_change_nothing(case):
    options, message = REFUSED[case]
    pc = hmm(0)
    before = weights_of(pc)
    with pytest.raises(ct.ArgumentError, match=message):
        learning.fit(pc, **{"data": GOOD, "num_epochs": 1, "progress": False} | options)
    assert equal_weights(weights_of(pc), before)


def test_circuits_that_are_not_compiled_or_not_sane_are_refused():
    with pytest.raises(ct.ArgumentError, match="pc: expected"):
        learning.fit(ct.structures.hmm(4, 3, 4), GOOD)
    pc = hmm(0)
    with torch.no_grad():
        pc.bank["sum_3x3"][0, 0, 0] = torch.nan
    with pytest.raises(ct.ArgumentError, match="NaN"):
        learning.fit(pc, GOOD)


@pytest.mark.parametrize("num_good_epochs", [0, 2])
def test_a_diverging_optimizer_leaves_the_last_good_weights(num_good_epochs):
    x = drawn(hmm(7), 40)
    good, diverged = hmm(1), hmm(1)

    class Diverging(torch.optim.SGD):
        num_steps = 0

        def step(self, closure=None):
            result = super().step(closure)
            Diverging.num_steps += 1
            if Diverging.num_steps > 4 * num_good_epochs + 1:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(torch.nan)
            return result

    if num_good_epochs:
        optimizer = torch.optim.SGD(good.parameters(), lr=0.1)
        learning.fit(good, x, optimizer=optimizer, num_epochs=num_good_epochs, batch_size=10, progress=False)
    with pytest.raises(ct.ArgumentError, match="lower its learning rate"):
        learning.fit(
            diverged, x, optimizer=Diverging(diverged.parameters(), lr=0.1), num_epochs=5, batch_size=10, progress=False
        )
    assert equal_weights(weights_of(diverged), weights_of(good))


# Checkpoints ------------------------------------------------------------------------------------------------------

RUN_AND_DIE = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_learning import OPTIMIZERS, fit_with_checkpoint
replace, done = os.replace, []

def replace_or_die(*paths):
    done.append(paths)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # while the third checkpoint is being written
    replace(*paths)

os.replace = replace_or_die
for name in OPTIMIZERS:
    process = os.fork()
    if not process:
        fit_with_checkpoint(name, f"{sys.argv[2]}/{name}.safetensors")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def fit_with_checkpoint(method, checkpoint_path, **options):
    truth = hmm(7)
    pc = hmm(1)
    result = learning.fit(
        pc,
        drawn(truth, 60),
        **{
            "optimizer": OPTIMIZERS[method],
            "num_epochs": 5,
            "batch_size": 16,
            "validation_data": drawn(truth, 40, seed=1),
            "checkpoint_path": checkpoint_path,
            "progress": False,
        }
        | options,
    )
    return pc, result


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """Start one process per optimizer; each kills itself while it writes its third checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", RUN_AND_DIE, os.path.dirname(__file__), str(folder)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.split() == [str(-signal.SIGKILL)] * len(OPTIMIZERS)
    return {name: folder / f"{name}.safetensors" for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_ends_like_one_that_was_not(killed_runs, optimizer, monkeypatch):
    epochs = []
    for kind in (_learners.Learner, _learners.FullBatchLearner, _learners.GradientLearner):
        end_epoch = kind.end_epoch
        monkeypatch.setattr(kind, "end_epoch", lambda self, end=end_epoch: (epochs.append(1), end(self)))
    resumed, resumed_result = fit_with_checkpoint(optimizer, killed_runs[optimizer])
    assert len(epochs) == 3  # of five: two were in the checkpoint
    whole, whole_result = fit_with_checkpoint(optimizer, None)
    assert resumed_result == whole_result
    assert equal_weights(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_interrupted_at_any_batch_ends_like_one_that_was_not(optimizer, tmp_path, monkeypatch):
    whole, whole_result = fit_with_checkpoint(optimizer, None)
    batches, samples_batches = [], _samples.CheckedSamples.batches

    def interrupted(self, *arguments):
        for batch in samples_batches(self, *arguments):
            batches.append(batch)
            if len(batches) % 9 == 0:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(_samples.CheckedSamples, "batches", interrupted)
    for attempt in itertools.count():
        try:
            resumed, resumed_result = fit_with_checkpoint(optimizer, tmp_path / "run.safetensors")
            break
        except KeyboardInterrupt:
            assert attempt < 20
    assert attempt > 2
    assert resumed_result == whole_result
    assert equal_weights(weights_of(resumed), weights_of(whole))
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_more_epochs_continue_a_finished_run_and_a_finished_one_returns_at_once(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    whole, whole_result = fit_with_checkpoint("anemone", None, num_epochs=6)
    fit_with_checkpoint("anemone", path, num_epochs=4)
    longer, longer_result = fit_with_checkpoint("anemone", path, num_epochs=6)
    assert longer_result == whole_result
    assert equal_weights(weights_of(longer), weights_of(whole))
    monkeypatch.setattr(_learners.AnemoneLearner, "update", None)
    again, again_result = fit_with_checkpoint("anemone", path, num_epochs=6)
    assert again_result == whole_result
    assert equal_weights(weights_of(again), weights_of(whole))
    with pytest.raises(ct.CheckpointError, match="has done 24 updates, more than the 12 of this call"):
        fit_with_checkpoint("anemone", path, num_epochs=3)


def test_a_stopped_run_stays_stopped(tmp_path):
    options = {"patience": 1, "min_improvement": 0.5, "num_epochs": 50}
    pc, result = fit_with_checkpoint("em", tmp_path / "run.safetensors", **options)
    assert result.stopped_early
    again, again_result = fit_with_checkpoint("em", tmp_path / "run.safetensors", **options)
    assert again_result == result
    assert equal_weights(weights_of(again), weights_of(pc))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "minibatch_em"}, "optimizer"),
        ({"optimizer": "em", "pseudocount": 1.0}, "optimizer"),
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.1)}, "optimizer"),
        ({"seed": 1}, "options"),
        ({"batch_size": 8}, "options"),
        ({"validation_data": None}, "validation_data"),
        ({"observed": torch.ones(60, 4, dtype=torch.bool)}, "data"),
        ({"sample_weights": torch.ones(60)}, "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_checkpoints_of_other_runs_are_refused(tmp_path, options, named):
    path = tmp_path / "run.safetensors"
    fit_with_checkpoint("em", path, num_epochs=1)
    before = path.read_bytes()
    with pytest.raises(ct.CheckpointError, match=f"expected this run, got one with a different {named}"):
        fit_with_checkpoint("em", path, **options)
    assert path.read_bytes() == before
    with pytest.raises(ct.CheckpointError, match="a different circuit and data"):
        learning.fit(hmm(0, num_states=2), GOOD, batch_size=16, checkpoint_path=path, progress=False)


@given(data=st.data())
def test_corrupt_checkpoints_are_refused_and_change_nothing(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "corrupt.safetensors"
    path.unlink(missing_ok=True)
    x = drawn(hmm(7), 10)
    options = {"optimizer": adam, "num_epochs": 1, "checkpoint_path": path, "progress": False}
    learning.fit(hmm(1), x, **options)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), label="truncate"):
        content = content[:position]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    pc = hmm(1)
    before = weights_of(pc)
    with pytest.raises(ct.CheckpointError, match="delete it or give another checkpoint_path"):
        learning.fit(pc, x, **options | {"num_epochs": 2})
    assert equal_weights(weights_of(pc), before)


def test_torch_optimizers_with_nested_state_are_saved_whole(tmp_path):
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, max_iter=2, history_size=3)

    options = {"optimizer": lbfgs, "batch_size": 64}
    whole, whole_result = fit_with_checkpoint("em", None, **options)
    fit_with_checkpoint("em", tmp_path / "run.safetensors", **options | {"num_epochs": 2})
    resumed, resumed_result = fit_with_checkpoint("em", tmp_path / "run.safetensors", **options)
    assert resumed_result == whole_result
    assert equal_weights(weights_of(resumed), weights_of(whole))
