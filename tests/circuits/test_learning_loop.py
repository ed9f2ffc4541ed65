"""The loop of learning: it stops where it is asked to, goes on to the bits of a whole run, and says why it ended."""

import pytest
import torch
from learning_cases import adam, drawn, hmm, weights_of

import circuits as ct
from circuits import learning
from circuits.learning.learners import AnemoneLearner, FullBatchLearner, GradientLearner, MiniBatchLearner
from circuits.progress import forget_stop, request_stop

X, HELD_OUT = drawn(hmm(7), 60), drawn(hmm(7), 40, seed=1)
METHODS = {
    "em": ("em", FullBatchLearner),
    "viterbi_em": ("viterbi_em", FullBatchLearner),
    "minibatch_em": ("minibatch_em", MiniBatchLearner),
    "anemone": ("anemone", AnemoneLearner),
    "adam": (adam, GradientLearner),
}


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function that makes long work be asked to stop once a learner has done so many updates."""

    def stop_after(kind, num_updates):
        update, done = kind.update, []

        def counted(self, batch):
            done.append(batch)
            if len(done) == num_updates:
                request_stop("SIGTERM")
            return update(self, batch)

        monkeypatch.setattr(kind, "update", counted)
        return done

    yield stop_after
    forget_stop()


def fitted(path, **options):
    pc = hmm(1)
    options = {"num_epochs": 3, "batch_size": 16, "validation_data": HELD_OUT, "progress": False} | options
    return learning.fit(pc, X, checkpoint_path=path, **options), weights_of(pc)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_updates", [1, 4, 6, 11])
def test_a_run_stops_after_the_update_in_which_it_is_asked_to_and_loses_nothing(
    method, num_updates, stop_after, tmp_path
):
    """Of four updates an epoch, so in the middle of epochs too; then it goes on like a run that was never stopped."""
    optimizer, kind = METHODS[method]
    whole, weights = fitted(None, optimizer=optimizer)
    done = stop_after(kind, num_updates)
    message = f"fitting the circuit: SIGTERM after {num_updates} of 12 updates; the same call goes on from .*run"
    with pytest.raises(ct.Interrupted, match=message):
        fitted(tmp_path / "run.safetensors", optimizer=optimizer)
    assert len(done) == num_updates
    forget_stop()
    result, resumed = fitted(tmp_path / "run.safetensors", optimizer=optimizer)
    assert len(done) == 12
    assert result == whole
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_run_that_is_asked_to_stop_in_its_last_update_is_done(stop_after, tmp_path):
    stop_after(FullBatchLearner, 12)
    assert fitted(tmp_path / "run.safetensors")[0].stopped == "num_epochs"
    with pytest.raises(ct.Interrupted, match=r"after 0 of 12 updates; there was no checkpoint_path"):
        fitted(None)


def test_what_handles_errors_does_not_swallow_that_work_is_to_stop():
    assert issubclass(ct.Interrupted, KeyboardInterrupt)
    assert not issubclass(ct.Interrupted, Exception)


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_a_fit_stops_when_the_training_likelihood_has_converged(tol):
    by_hand, means = hmm(1), []
    while len(means) < 2 or means[-1] - means[-2] >= tol:
        flows, log_likelihood = learning.expected_flows(by_hand, X)
        means.append(float(log_likelihood.mean()))
        learning.em_step(by_hand, flows)
    pc = hmm(1)
    result = learning.fit(pc, X, optimizer=learning.EM(pseudocount=0.0), tol=tol, num_epochs=500, progress=False)
    assert result.stopped == "converged"
    assert result.train_log_likelihood == pytest.approx(means)
    for name, weights in weights_of(by_hand).items():
        torch.testing.assert_close(weights_of(pc)[name].exp(), weights.exp(), rtol=1e-9, atol=1e-9)


def test_the_reason_of_stopping_is_in_the_result(tmp_path):
    assert fitted(None)[0].stopped == "num_epochs"
    patient = {"num_epochs": 200, "patience": learning.EarlyStopping(1, min_improvement=0.5)}
    result, weights = fitted(tmp_path / "run.safetensors", **patient)
    assert (result.stopped, result.stopped_early) == ("early_stopping", True)
    again, same = fitted(tmp_path / "run.safetensors", **patient)  # a stopped run stays stopped
    assert again == result
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert fitted(None, num_epochs=200, tol=0.1)[0].stopped == "converged"


def test_an_optimizer_as_an_object_is_that_of_its_name():
    objects = {
        "em": learning.EM(pseudocount=0.5),
        "minibatch_em": learning.MiniBatchEM(pseudocount=0.5, seed=3),
        "anemone": learning.Anemone(pseudocount=0.5, seed=3),
        "viterbi_em": learning.ViterbiEM(pseudocount=0.5),
    }
    for name, optimizer in objects.items():
        one, other = fitted(None, optimizer=optimizer), fitted(None, optimizer=name, pseudocount=0.5, seed=3)
        assert one[0] == other[0]
    assert fitted(None, optimizer=learning.GradientDescent(build=adam))[0] == fitted(None, optimizer=adam)[0]


def test_what_is_said_twice_or_unknown_is_refused():
    samples = learning.Samples(X, observed=X >= 0)
    for data, options, message in [
        (samples, {"observed": X >= 0}, "observed: data are samples that say it already"),
        (X, {"learning_rate": 0.1}, "learning_rate: em has no such option"),
        (X, {"optimizer": learning.EM(), "momentum": 0.1}, "momentum: EM has no such option"),
        (X, {"tol": -1.0}, "tol: expected a number of nats per sample >= 0"),
        (X, {"patience": learning.EarlyStopping(2), "min_improvement": 0.1}, "min_improvement: patience says it"),
    ]:
        with pytest.raises(ct.ArgumentError, match=message):
            learning.fit(hmm(1), data, validation_data=HELD_OUT, progress=False, **options)


def test_lists_and_truth_values_are_data():
    pcs = [ct.compile(ct.structures.mixture(3, 2, 2), dtype=torch.float64, seed=0) for _ in range(4)]
    x = torch.randint(2, (20, 3), generator=torch.Generator().manual_seed(0))
    for pc, data in zip(pcs, (x, x.tolist(), x.bool(), x.bool().numpy()), strict=True):
        learning.fit(pc, data, num_epochs=2, progress=False)
    for pc in pcs[1:]:
        assert all(torch.equal(weights, weights_of(pcs[0])[name]) for name, weights in weights_of(pc).items())
