"""The benchmark of images: what it reads, that an interrupted run goes on, and what it leaves behind."""

import gzip
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, that import what lies beside them

import images as benchmark

NUM_TRAIN, NUM_TEST = 240, 24


def write_idx(path, images):
    header = struct.pack(">4i", 0x803, len(images), 28, 28)
    path.write_bytes(gzip.compress(header + images.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
    return tmp_path


def run(monkeypatch, folder, *options):
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--units", "2", "--batch-size", "32", *options]
    monkeypatch.setattr(sys, "argv", ["images.py", *arguments])
    benchmark.main()
    return json.loads((folder / "out" / "quad_graph-2" / "results.json").read_text())


def test_a_run_trains_reports_and_draws_and_is_reported_again_without_training(monkeypatch, folder, capsys):
    found = run(monkeypatch, folder, "--minutes", "0.02")
    assert found["epochs"] > 0
    assert 7.5 < found["test_bits"] < 9.5  # noise of 8 bits
    assert f"{found['test_bits']:.3f}" in capsys.readouterr().out
    for name in ("samples.png", "completions.png", "checkpoint.safetensors"):
        assert (folder / "out" / "quad_graph-2" / name).stat().st_size > 0
    assert run(monkeypatch, folder, "--minutes", "0.02") == found


def test_training_images_and_validation_images_are_apart(folder):
    images = benchmark.load(folder)
    assert (len(images.train), len(images.validation), len(images.test)) == (220, 20, NUM_TEST)
    everything = benchmark.read_idx(folder / "train-images-idx3-ubyte.gz")
    assert torch.equal(torch.cat([images.train, images.validation]), everything)


def test_an_interrupted_run_goes_on_with_the_same_batches_weights_and_moments(monkeypatch, folder):
    def settings(steps):
        monkeypatch.setattr(benchmark.Clock, "read", lambda clock: (steps.send(None), 0.0))
        return benchmark.Settings("quad_graph", 2, 1.0, 32, 0.05, 4.0, seed=0, device="cpu")

    def counted(stop_after=None):
        for second in range(10, 200, 10):
            if stop_after is not None and second > stop_after:
                raise KeyboardInterrupt
            yield second

    images = benchmark.load(folder)
    (folder / "whole").mkdir()
    whole = benchmark.Run(settings(counted()), images, folder / "whole")
    whole.train()

    (folder / "parts").mkdir()
    monkeypatch.setattr(benchmark, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    first = benchmark.Run(settings(counted(stop_after=30)), images, folder / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.train()
    rest = counted()
    for _ in range(3):
        next(rest)
    second = benchmark.Run(settings(rest), images, folder / "parts")
    second.train()
    assert second.state.step == whole.state.step == 6
    for one, other in zip(second.pc.parameters(), whole.pc.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_other_settings_and_files_that_are_no_images_are_refused(monkeypatch, folder):
    run(monkeypatch, folder, "--minutes", "0.01")
    with pytest.raises(SystemExit, match="other settings"):
        run(monkeypatch, folder, "--minutes", "0.01", "--seed", "1")
    broken = folder / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(gzip.compress(b"\0" * 40))
    with pytest.raises(SystemExit, match="IDX format"):
        run(monkeypatch, folder)
    broken.unlink()
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        run(monkeypatch, folder)
