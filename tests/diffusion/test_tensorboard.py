"""Logs for TensorBoard: what a curve says is written once for every number of updates, also by a run that went on."""

import sys
from collections import defaultdict
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny_folders import make_folder

import circuits as ct
import diffusion as df
from diffusion.training.circuit import HeadTraining, losses_by_ratio

pytestmark = pytest.mark.usefixtures("one_thread")
V, L = 4, 4
CONFIG = df.CircuitTraining(steps=6, batch_size=8, validate_every=2, checkpoint_every=3)


@pytest.fixture
def logged(monkeypatch):
    """What stands in the folders: by run, by name, by the number of updates."""
    found = defaultdict(lambda: defaultdict(dict))

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.run, self.is_open = found[log_dir], True
            for scalars in self.run.values():
                for step in [step for step in scalars if step >= purge_step]:
                    del scalars[step]

        def add_scalar(self, name, value, step):
            assert self.is_open
            assert step not in self.run[name]
            self.run[name][step] = value

        def flush(self):
            pass

        def close(self):
            self.is_open = False

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return found


def cache(seed):
    random = np.random.default_rng(seed)
    tokens = np.repeat(random.integers(V, size=(24, 1)), L, 1)
    masked = random.random((24, L)) < 0.6
    return df.LogitCache(tokens, masked, random.normal(size=(24, L, V)).astype(np.float32), None, V, f"{seed}")


def fit(**options):
    head = df.CoupledHead(ct.compile(ct.structures.hmm(L, 2, V), seed=0))
    curve = df.fit_coupled(head, cache(0), cache(1), config=CONFIG, progress=False, **options)
    return head, {
        "train": dict(zip(curve.steps, curve.train, strict=True)),
        "validation": dict(zip(curve.steps, curve.held_out, strict=True)),
    }


def test_a_heads_log_is_its_curve_with_the_losses_by_ratio(logged):
    head, curve = fit(log_dir="runs/head")
    run = logged["runs/head"]
    assert {name: run[name] for name in curve} == curve
    for ratio, loss in zip(("0.25", "0.5", "0.75", "1"), losses_by_ratio(head, cache(1)), strict=True):
        assert run[f"validation by mask ratio/up to {ratio}"][6] == pytest.approx(loss)
    assert list(run["train"]) == [2, 4, 6]


def test_a_run_that_goes_on_logs_what_a_whole_one_does(logged, monkeypatch, tmp_path):
    fit(log_dir="whole")
    update = HeadTraining.update

    def killed_after_five(self, step):
        if step == 5:
            raise MemoryError
        return update(self, step)

    monkeypatch.setattr(HeadTraining, "update", killed_after_five)
    with pytest.raises(MemoryError):  # of which the checkpoint has three updates, and the log four
        fit(log_dir="parts", checkpoint_path=tmp_path / "run.safetensors")
    assert list(logged["parts"]["train"]) == [2, 4]
    monkeypatch.setattr(HeadTraining, "update", update)
    fit(log_dir="parts", checkpoint_path=tmp_path / "run.safetensors")
    assert logged["parts"] == logged["whole"]


def test_a_circuits_log_is_its_result(logged):
    pc = ct.compile(ct.structures.hmm(L, 2, V), seed=0)
    x = torch.from_numpy(cache(0).tokens)
    options = {"optimizer": "anemone", "num_epochs": 3, "batch_size": 8, "progress": False}
    result = ct.learning.fit(pc, x, validation_data=x[:9], log_dir="runs", **options)
    assert list(logged["runs"]["train"]) == [3, 6, 9]  # updates, of which an epoch has three
    assert tuple(logged["runs"]["train"].values()) == result.train_log_likelihood
    assert tuple(logged["runs"]["validation"].values()) == result.validation_log_likelihood


def test_every_stage_of_a_folder_has_a_run(logged, run_program, tmp_path):
    out = make_folder(tmp_path, fits=False)
    fit = ("fit", "--out", out, "--joint", "--states", 4, "--log-dir", tmp_path / "runs", "--quiet")
    assert run_program(*fit)[0] == 0
    corpus = tmp_path / "corpus.txt"
    train = ("train", "--corpus", corpus, "--preset", "tiny", "--steps", 2, "--log-dir", tmp_path / "runs", "--quiet")
    assert run_program(*train, "--out", tmp_path / "other")[0] == 0
    assert {name.rpartition("/")[2] for name in logged} == {"likelihood", "head", "joint", "denoiser"}
    assert all(run["train"] and run["validation"] for run in logged.values())


def test_without_tensorboard_it_is_said_before_anything_is_done(monkeypatch, run_program, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "log_dir: expected the package tensorboard, got none; pip install tensorboard"
    with pytest.raises(df.errors.ArgumentError, match=message):
        fit(log_dir="runs")
    code, _, error = run_program("train", "--out", tmp_path / "out", "--log-dir", tmp_path / "runs", "--quiet")
    assert (code, message in error) == (2, True)
    assert not (tmp_path / "out").exists()
    code, _, error = run_program("fit", "--out", tmp_path / "out", "--log-dir", tmp_path / "runs", "--quiet")
    assert (code, message in error) == (2, True)
