"""Two processes that torchrun started learn what one learns."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from learning_cases import adam
from safetensors.torch import load_file

import circuits as ct
from circuits import learning
from circuits.learning import distributed

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def discrete():
    truth = ct.compile(ct.structures.hmm(4, 3, 4), dtype=torch.float64, seed=7)
    x, held_out = (
        ct.queries.sample(truth, count, generator=torch.Generator().manual_seed(count)) for count in (61, 40)
    )
    return ct.compile(ct.structures.hmm(4, 3, 4), dtype=torch.float64, seed=1), x, held_out


def all_families():
    """A mixture over one variable of every family; a fifth of the values is missing."""
    families = [
        ct.Categorical(3),
        ct.Bernoulli(),
        ct.Binomial(4),
        ct.Gaussian(),
        ct.Poisson(),
        ct.DiscretizedLogistic(8),
        ct.EmbeddingCategorical(5, 2),
    ]
    leaves = [ct.inputs(var, 3, family) for var, family in enumerate(families)]
    circuit = ct.Circuit(ct.sum(ct.product(*leaves), num_units=1))
    x = ct.queries.sample(ct.compile(circuit, seed=5), 50, generator=torch.Generator().manual_seed(0)).double()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = torch.nan
    return ct.compile(circuit, dtype=torch.float64, seed=1), x, x[:20]


def weighted(x):
    return torch.arange(len(x), dtype=torch.float64) % 4


CASES = {
    **{
        name: (discrete, {"optimizer": optimizer})
        for name, optimizer in {
            "em": "em",
            "minibatch_em": "minibatch_em",
            "anemone": "anemone",
            "adam": adam,
            "sgd": sgd,
            "viterbi_em": "viterbi_em",
        }.items()
    },
    "families em": (all_families, {"optimizer": "em"}),
    "families anemone": (all_families, {"optimizer": "anemone"}),
    "families adam": (all_families, {"optimizer": adam}),
    "batches of one": (discrete, {"optimizer": "anemone", "batch_size": 1, "num_epochs": 2}),
    "batches of one adam": (discrete, {"optimizer": adam, "batch_size": 1, "num_epochs": 1}),
    "early stopping": (discrete, {"optimizer": "em", "num_epochs": 40, "patience": 1, "min_improvement": 0.02}),
}


def fitted(name, **options):
    build, chosen = CASES[name]
    pc, x, held_out = build()
    options = {"num_epochs": 4, "batch_size": 16, "progress": False} | chosen | options
    result = learning.fit(pc, x, validation_data=held_out, sample_weights=weighted(x), **options)
    history = {
        "train": torch.tensor(result.train_log_likelihood),
        "validation": torch.tensor(result.validation_log_likelihood),
        "counts": torch.tensor([result.best_epoch, result.num_impossible, float(result.stopped_early)]),
    }
    return {name: tensor.detach().double() for name, tensor in (history | dict(pc.bank)).items()}


PROGRAM = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_learning_distributed as cases
import circuits as ct
from circuits import learning
from safetensors.torch import save_file

torch.set_num_threads(1)
folder = sys.argv[2]
with learning.join_processes() as group:
    rank = torch.distributed.get_rank()
    for name in cases.CASES:
        save_file(cases.fitted(name, process_group=group), f"{folder}/{name} {rank}")

    # resumed after two epochs; each process looks for the file, only the first one's view of it counts
    path = f"{folder}/checkpoint.safetensors" if rank == 0 else f"{folder}/nowhere.safetensors"
    cases.fitted("anemone", process_group=group, num_epochs=2, checkpoint_path=path)
    save_file(cases.fitted("anemone", process_group=group, checkpoint_path=path), f"{folder}/resumed {rank}")

    errors = []
    def refused(call):
        try:
            call()
        except ct.UnfactorError as error:
            errors.append(f"{type(error).__name__} {error}")
    pc, x, _ = cases.discrete()
    fit = lambda data, **options: learning.fit(pc, data, process_group=group, progress=False, **options)
    refused(lambda: fit(x[rank:], num_epochs=1))
    refused(lambda: fit(x, num_epochs=1 + rank))
    refused(lambda: fit(x[:9], checkpoint_path=path))
    refused(lambda: fit(x, optimizer=lambda p: torch.optim.SGD(p, lr=1e308), batch_size=8))
    refused(lambda: learning.join_processes().__enter__())
    with open(f"{folder}/errors {rank}", "w") as file:
        file.write("\\n".join(errors))
os._exit(0)  # gloo's threads sometimes abort an interpreter that takes itself down
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["--local-addr=127.0.0.1", str(program), os.path.dirname(__file__), str(folder)]
    root = os.path.dirname(os.path.dirname(ct.__file__))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        returncode = process.wait(timeout=60)
    finally:
        process.terminate()  # and so its children, where they hang
        process.wait()
    assert returncode == 0, (folder / "output").read_text()[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(folder, name):
    expected = fitted(name)
    for rank in range(2):
        torch.testing.assert_close(load_file(folder / f"{name} {rank}"), expected, **CLOSE)
    if name == "early stopping":
        assert expected["counts"][2] == 1


def test_both_processes_end_with_the_same_circuit(folder):
    for name in CASES:
        one, other = (load_file(folder / f"{name} {rank}") for rank in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_run_ends_like_a_whole_one(folder):
    assert not (folder / "nowhere.safetensors").exists()
    for rank in range(2):
        resumed, whole = load_file(folder / f"resumed {rank}"), load_file(folder / f"anemone {rank}")
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_errors_are_raised_in_all_processes(folder):
    for rank in range(2):
        lines = (folder / f"errors {rank}").read_text().splitlines()
        assert len(lines) == 5
        assert lines[0].startswith("ArgumentError process_group: the processes called fit with a different data;")
        assert "different num_epochs" in lines[1]
        assert lines[2].startswith("CheckpointError")
        assert "expected this run, got one with a different data" in lines[2]
        assert "lower its learning rate" in lines[3]
        assert "already initialised" in lines[4]


LOST = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
import test_learning_distributed as cases
import circuits as ct
from circuits import learning
from circuits.learning.fit import _CircuitTraining

torch.set_num_threads(1)
update = _CircuitTraining.update
def lost(self, step):
    if self.processes.rank == 1 and step == 7:
        if sys.argv[3] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the disk is on fire")
    return update(self, step)
_CircuitTraining.update = lost
try:
    with learning.join_processes() as group:
        cases.fitted("anemone", process_group=group, checkpoint_path=sys.argv[2])
except ct.UnfactorError as error:
    print(type(error).__name__, error, flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize("way", ["killed", "raised"])
def test_a_process_that_ends_ends_the_others_with_its_reason_and_one_alone_goes_on(way, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root, path = os.path.dirname(os.path.dirname(ct.__file__)), tmp_path / "run.safetensors"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", LOST, os.path.dirname(__file__), str(path), way]
    started = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        said = started[0].communicate(timeout=60)[0].decode()
        started[1].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == 3
    assert said.startswith("ProcessLostError process_group: another process ended: ")
    assert ("process 1: ValueError: the disk is on fire" if way == "raised" else "without a word") in said
    assert path.exists()
    resumed, whole = fitted("anemone", checkpoint_path=path), fitted("anemone")
    torch.testing.assert_close(resumed, whole, **CLOSE)


def test_a_program_that_was_not_started_by_torchrun_is_told_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ct.ArgumentError, match=r"RANK.*torchrun"), learning.join_processes():
        pass
    pc, x, _ = discrete()
    with pytest.raises(ct.ArgumentError, match="process_group: expected a group"):
        learning.fit(pc, x, process_group=2, progress=False)


def test_shares_are_a_partition_of_every_batch(monkeypatch):
    monkeypatch.setattr(distributed.Processes, "size", 3)
    index = torch.arange(8)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed.Processes, "rank", rank)
        shares.append(distributed.Processes().share(index))
    assert sorted(torch.cat(shares).tolist()) == index.tolist()
    assert max(map(len, shares)) == math.ceil(8 / 3)


def test_a_process_without_a_sample_has_no_flow():
    pc, x, _ = all_families()
    found, expected = learning.expected_flows(pc, x[:0]), learning.expected_flows(pc, x[:1])
    assert found.log_likelihood.shape == (0,)
    for name, flow in expected.flows.items():
        assert found.flows[name].dtype == flow.dtype
        assert torch.equal(found.flows[name], torch.zeros_like(flow))
