"""What a run starts from is part of it: a checkpoint continues that run alone, to the bits of one never interrupted."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_cases import adam, drawn, hmm, weights_of
from safetensors import safe_open
from safetensors.torch import save_file

import circuits as ct
from circuits import learning
from circuits.learning.samples import CheckedSamples

X, HELD_OUT = drawn(hmm(7), 60), drawn(hmm(7), 40, seed=1)
METHODS = {name: name for name in ("em", "minibatch_em", "anemone", "viterbi_em")} | {"adam": adam}


def fitted(pc, path=None, **options):
    options = {"optimizer": "anemone", "num_epochs": 4, "batch_size": 20} | options
    learning.fit(pc, X, checkpoint_path=path, progress=False, **options)
    return weights_of(pc)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Interrupted(BaseException):
    pass


def interrupted_after(num_batches):
    """Make the fit in the block stop before it learns from another batch."""
    batches, seen = CheckedSamples.batches, []

    def until(self, *arguments):
        for batch in batches(self, *arguments):
            if len(seen) == num_batches:
                raise Interrupted
            seen.append(batch)
            yield batch

    return patch.object(CheckedSamples, "batches", until)


def with_one_other_bit(pc, data):
    """Move one weight to the next number that there is."""
    name = data.draw(st.sampled_from(sorted(pc.bank)), label="bank")
    with torch.no_grad():
        flat = pc.bank[name].view(-1)
        position = data.draw(st.integers(0, len(flat) - 1), label="weight")
        flat[position] = torch.nextafter(flat[position], torch.tensor(torch.inf, dtype=flat.dtype))
    return pc


@settings(max_examples=20)
@given(st.sampled_from(sorted(METHODS)), st.integers(5, 11), st.booleans(), st.booleans(), st.data())
def test_an_interrupted_run_is_continued_from_its_own_start_alone(method, num_batches, is_validated, is_nudged, data):
    options = {"optimizer": METHODS[method], "validation_data": HELD_OUT if is_validated else None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        with interrupted_after(num_batches), pytest.raises(Interrupted):
            fitted(hmm(1), path, **options)
        before = path.read_bytes()
        elsewhere = with_one_other_bit(hmm(1), data) if is_nudged else hmm(data.draw(st.integers(2, 9), label="seed"))
        weights = weights_of(elsewhere)
        with pytest.raises(ct.CheckpointError, match=r"expected the weights .* started elsewhere; .*; delete it or"):
            fitted(elsewhere, path, **options)
        assert same(weights_of(elsewhere), weights)
        assert path.read_bytes() == before
        assert same(fitted(hmm(1), path, **options), fitted(hmm(1), **options))


def test_restarts_from_several_seeds_do_not_return_the_first_ones_circuit(tmp_path):
    first = fitted(hmm(0), tmp_path / "run.safetensors")
    for seed in (1, 2):
        with pytest.raises(ct.CheckpointError, match="started elsewhere"):
            fitted(hmm(seed), tmp_path / "run.safetensors")
        own = fitted(hmm(seed), tmp_path / f"{seed}.safetensors")
        assert same(own, fitted(hmm(seed)))
        assert not same(own, first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_validated", [False, True])
def test_a_finished_run_in_memory_goes_on_where_it_is(method, is_validated, tmp_path):
    """It holds the latest weights, or with validation the best; later calls still know what it started from."""
    options = {"optimizer": METHODS[method], "validation_data": HELD_OUT if is_validated else None}
    pc, path = hmm(1), tmp_path / "run.safetensors"
    for num_epochs in (2, 4, 4, 6):
        last = fitted(pc, path, num_epochs=num_epochs, **options)
        assert same(last, fitted(hmm(1), num_epochs=num_epochs, **options))
    assert same(fitted(hmm(1), path, num_epochs=6, **options), last)


def test_the_best_weights_of_an_earlier_epoch_are_a_start_too(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"optimizer": "em", "validation_data": HELD_OUT, "num_epochs": 5}
    pc = hmm(1)
    result = learning.fit(pc, X, batch_size=20, checkpoint_path=path, progress=False, **options)
    assert result.best_epoch < 4  # so the circuit holds other weights than the latest
    assert same(fitted(pc, path, **options), fitted(hmm(1), **options))


def used_adam(pc, num_steps):
    """Return an optimizer that has done steps of which only its moments are left."""
    optimizer, weights = adam(pc.parameters()), weights_of(pc)
    for _ in range(num_steps):
        pc(X).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in pc.bank.items():
            parameter.copy_(weights[name])
    return optimizer


def test_the_state_that_an_optimizer_brings_along_is_part_of_the_run(tmp_path):
    path = tmp_path / "run.safetensors"

    def run(num_steps, path=None, **options):
        pc = hmm(1)
        optimizer = used_adam(pc, num_steps)
        fitted(pc, path, optimizer=optimizer, **options)
        return pc, optimizer

    pc, optimizer = run(3, path, num_epochs=2)
    for num_steps in (0, 2):
        with pytest.raises(ct.CheckpointError, match="expected the state of the optimizer"):
            run(num_steps, path)
    whole = weights_of(run(3)[0])
    assert not same(whole, weights_of(run(0)[0]))
    assert same(fitted(pc, path, optimizer=optimizer), whole)  # both are in memory as the file has them
    assert same(weights_of(run(3, path)[0]), whole)


def some_parameters(pc):
    return list(pc.parameters())[:1]


def with_one_fixed(pc):
    next(pc.parameters()).requires_grad_(False)
    return pc.parameters()


@pytest.mark.parametrize(
    "other",
    [
        lambda pc: torch.optim.Adam(pc.parameters(), lr=0.06),
        lambda pc: torch.optim.Adam(pc.parameters(), lr=0.05, amsgrad=True),
        lambda pc: torch.optim.AdamW(pc.parameters(), lr=0.05),
        lambda pc: adam(some_parameters(pc)),
        lambda pc: adam(with_one_fixed(pc)),
    ],
)
def test_an_optimizer_with_other_options_or_over_other_parameters_is_of_another_run(other, tmp_path):
    path = tmp_path / "run.safetensors"
    pc = hmm(1)
    fitted(pc, path, optimizer=adam(pc.parameters()), num_epochs=1)
    pc = hmm(1)
    with pytest.raises(ct.CheckpointError, match="expected this run, got one with a different optimizer"):
        fitted(pc, path, optimizer=other(pc))


@pytest.mark.parametrize("format", ["unfactor-circuit-fit", "unfactor-denoiser-training"])
def test_a_checkpoint_of_an_earlier_version_is_refused(format, tmp_path):
    """The loops before this one kept their state in other forms."""
    path = tmp_path / "run.safetensors"
    fitted(hmm(1), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"format": format, "format_version": "2"})
    with pytest.raises(
        ct.CheckpointError, match=r"expected a run of this version, got one of an earlier, .*; delete it or"
    ):
        fitted(hmm(1), path)
