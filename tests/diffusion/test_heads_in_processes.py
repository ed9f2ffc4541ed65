"""Two processes that torchrun started fit the head that one fits."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import make_folder

import circuits as ct
import diffusion as df
from diffusion.app.workspace import Workspace

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
V, MASK, L, H = 5, 4, 3, 4
TRAINING = df.CircuitTraining(
    steps=7, batch_size=9, learning_rate=0.05, feature_learning_rate=0.05, validate_every=3, checkpoint_every=2
)
JOINT = df.JointTraining(
    steps=5, batch_size=5, learning_rate=0.05, denoiser_learning_rate=0.05, validate_every=2, checkpoint_every=2
)


def cache(seed, count, digest):
    """Blocks whose neighbours are often equal, and predictions of them that lean to the truth."""
    random = np.random.default_rng(seed)
    tokens = np.repeat(random.integers(V - 1, size=(count, 1)), L, 1)
    log_q = random.normal(size=(count, L, V)) + np.eye(V)[tokens]
    masked = random.random((count, L)) < 0.6
    return df.LogitCache(tokens, masked, log_q, None, V, digest, random.normal(size=(count, L, H)))


class Frequent(torch.nn.Module):
    spec = df.DenoiserSpec(vocab_size=V, mask_id=MASK, eos_ids=(), pad_id=MASK, forbidden_ids=(MASK,), max_length=9)

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(V, V, dtype=torch.float64))

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        return self.table[tokens[:, start:stop]] + self.table[tokens[:, :1]]


def head_of(*, with_potentials=False, **options):
    pc = ct.compile(ct.structures.hmm(L, 3, V), seed=1, dtype=torch.float64)
    conditioners = [df.LatentPotentials.for_hmm(pc, H)] if with_potentials else []
    return df.CoupledHead(pc, conditioners=conditioners, **options).double()


CASES = {
    "adam": ({}, {}),
    "flows": ({}, {"optimizer": "anemone"}),
    "local": ({"normalization": "local"}, {"weighting": "uniform"}),
    "potentials": ({"with_potentials": True}, {"optimizer": "anemone"}),
    "plain text": ({}, {"optimizer": "anemone", "likelihood_weight": 0.5}),
    "early stopping": ({}, {"learning_rate": 2.0, "patience": 1, "validate_every": 1}),
    "joint": ({}, None),
}


def fitted(name, *, steps=None, **options):
    """Return the learning curve and all weights after a fit, by name."""
    of_head, of_training = CASES[name]
    head, denoiser = head_of(**of_head), Frequent()
    if of_training is None:
        config = JOINT if steps is None else replace(JOINT, steps=steps)
        texts = torch.randint(V - 1, (11, L + 1), generator=torch.Generator().manual_seed(0))
        curve = df.fit_jointly(denoiser, head, texts, texts[:6], config=config, progress=False, **options)
    else:
        config = replace(TRAINING, **of_training)
        training, held_out = cache(0, 20, "training"), cache(1, 7, "held-out")
        text = torch.from_numpy(cache(2, 13, "text").tokens) if config.likelihood_weight else None
        curve = df.fit_coupled(head, training, held_out, text=text, config=config, progress=False, **options)
    numbers = {name: torch.tensor(getattr(curve, name)) for name in ("steps", "train", "held_out")}
    found = numbers | head.state_dict() | {"denoiser": denoiser.table.detach()}
    return {name: tensor.double().clone() for name, tensor in found.items()}


def interrupted(name, path, **options):
    """Begin a fit that is asked to stop after three updates."""
    from circuits.progress import forget_stop, request_stop
    from diffusion.training.circuit import HeadTraining

    update = HeadTraining.update

    def watched(self, step):
        if step == 2:
            request_stop("asked to stop")
        return update(self, step)

    HeadTraining.update = watched
    try:
        fitted(name, checkpoint_path=path, **options)
    except ct.Interrupted:
        return
    finally:
        HeadTraining.update = update
        forget_stop()
    raise AssertionError("it was not interrupted")


PROGRAM = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_heads_in_processes as cases
import circuits as ct
import diffusion as df
from safetensors.torch import save_file

torch.set_num_threads(1)
folder = sys.argv[2]
with ct.learning.join_processes() as group:
    rank = torch.distributed.get_rank()
    for name in cases.CASES:
        save_file(cases.fitted(name, process_group=group), f"{folder}/{name} {rank}")
    for name in ("flows", "joint"):  # begun by one process, and by two
        save_file(
            cases.fitted(name, process_group=group, checkpoint_path=f"{folder}/one {name}.safetensors"),
            f"{folder}/resumed {name} {rank}",
        )
        cases.interrupted(name, f"{folder}/two {name}.safetensors", process_group=group)
    errors = []
    few = cases.cache(0, 1, "few")
    for call in (
        lambda: df.fit_coupled(cases.head_of(), few, process_group=group, progress=False),
        lambda: df.fit_coupled(cases.head_of(), cases.cache(rank, 9, f"{rank}"), process_group=group, progress=False),
        lambda: df.fit_coupled(cases.head_of(), cases.cache(0, 9, "nine"), process_group=7, progress=False),
    ):
        try:
            call()
        except ct.ArgumentError as error:
            errors.append(str(error))
    with open(f"{folder}/errors {rank}", "w") as file:
        file.write("\\n".join(errors))
os._exit(0)  # gloo's threads sometimes abort an interpreter that takes itself down
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name in ("flows", "joint"):
        interrupted(name, folder / f"one {name}.safetensors")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    run_processes([str(program), os.path.dirname(__file__), str(folder)], folder / "output")
    return folder


def run_processes(command, output, **environment):
    """Run a program in two processes of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    root = os.path.dirname(os.path.dirname(ct.__file__))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root} | environment
    with open(output, "w") as file:
        process = subprocess.Popen(
            [*torchrun, "--local-addr=127.0.0.1", *command], stdout=file, stderr=file, env=environment
        )
    try:
        returncode = process.wait(timeout=90)
    finally:
        process.terminate()  # and so its children, where they hang
        process.wait()
    assert returncode == 0, output.read_text()[-4000:]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_fit_what_one_fits(folder, name):
    expected = fitted(name)
    one, other = (load_file(folder / f"{name} {rank}") for rank in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    torch.testing.assert_close(one, expected, **CLOSE)
    assert len(one["steps"]) < TRAINING.steps, "early stopping would not have stopped"


@pytest.mark.parametrize("name", ["flows", "joint"])
def test_another_number_of_processes_goes_on(folder, name):
    expected = fitted(name)
    for rank in range(2):
        torch.testing.assert_close(load_file(folder / f"resumed {name} {rank}"), expected, **CLOSE)
    resumed = fitted(name, checkpoint_path=folder / f"two {name}.safetensors")
    torch.testing.assert_close(resumed, expected, **CLOSE)


def test_what_does_not_go_together_is_refused_in_all_processes(folder):
    for rank in range(2):
        few, different, wrong = (folder / f"errors {rank}").read_text().splitlines()
        assert "process_group: expected at most a process for each of the 1 blocks of a batch, got 2" in few
        assert "called fit with a different cache" in different
        assert "process_group: expected a group" in wrong


def test_the_program_fits_in_two_processes_what_it_fits_in_one(tmp_path, run_program):
    one = make_folder(tmp_path, fits=False)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    options = ("--optimizer", "anemone", "--joint", "--potentials")
    assert run_program("fit", "--out", one, *options, "--quiet")[0] == 0
    run_processes(["-m", "unfactor", "fit", "--out", str(two), *options], tmp_path / "output")
    said = (tmp_path / "output").read_text()
    assert said.count(f"is in {two}/head") == 1  # the first process speaks
    assert not (two / "cache").exists()
    assert sorted(place.name for place in one.iterdir()) == sorted(place.name for place in two.iterdir())
    for load in (lambda folder: folder.head(), lambda folder: folder.denoiser()):
        found, expected = (load(Workspace(folder)).state_dict() for folder in (two, one))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32
    assert run_program("fit", "--out", two, *options, "--quiet")[0] == 0  # finds it done
