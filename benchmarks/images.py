"""Fashion-MNIST, 28 x 28 pixels of 256 values: test bits per dimension beside published ones, samples and completions.

    python benchmarks/images.py                                     # quad graph, 16 units, 20 minutes
    python benchmarks/images.py --units 16 64 256 --structure quad_graph quad_tree --device cuda     # the whole table

The data are the four ``.gz`` files that Debian's package ``dataset-fashion-mnist`` installs (Xiao, Rasul, Vollgraf
2017). The last twelfth of the training images, 5,000, is for validation alone; the test images are read once, at the
end of a run. A run that was interrupted goes on where its last checkpoint was; a finished one is only reported again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import keep_freed_memory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import circuits as ct
from circuits.progress import progress_bar

SIDE, NUM_VALUES = 28, 256
VALIDATION_PART = 12
NUM_VARS = SIDE * SIDE
BITS = 1 / (NUM_VARS * math.log(2))
PUBLISHED = {
    ("quad_graph", 16): 3.459,
    ("quad_graph", 64): 3.341,
    ("quad_graph", 256): 3.326,
    ("quad_tree", 16): 3.589,
    ("quad_tree", 64): 3.442,
    ("quad_tree", 256): 3.392,
}
"""Test bits per dimension with CP layers, by structure and units: the means of five seeds in
``results/grid_fashion_mnist.csv`` of the repository april-tools/uni-circ-le."""
ROWS, COLUMNS, ZOOM = 8, 12, 3
SECONDS_BETWEEN_CHECKPOINTS = 60.0
LEAST_RATE = 0.01
"""The last learning rate, as a share of the first."""


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels, uint8 (N, 784)."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(folder: Path) -> Images:
    images = read_idx(folder / "train-images-idx3-ubyte.gz")
    train, validation = images.tensor_split([len(images) - len(images) // VALIDATION_PART])
    return Images(train, validation, test=read_idx(folder / "t10k-images-idx3-ubyte.gz"))


def read_idx(path: Path) -> Tensor:
    """Read images from a gzipped file of the IDX format: magic number, sizes as big-endian int32, bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise SystemExit(
            f"{path}: cannot be read ({error}); install Debian's package dataset-fashion-mnist, or name the folder of "
            "the four .gz files with --data"
        ) from error
    magic, *shape = np.frombuffer(content, ">i4", 4).tolist()
    if magic != 0x803 or shape[1:] != [SIDE, SIDE] or len(content) != 16 + math.prod(shape):
        raise SystemExit(f"{path}: expected {SIDE} x {SIDE} images in the IDX format, got magic {magic:#x}, {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(-1, NUM_VARS).copy())


@dataclass(frozen=True)
class Settings:
    """What a run is told by, and what its checkpoint must agree with."""

    structure: str
    units: int
    minutes: float
    batch_size: int
    learning_rate: float
    roughness: float
    seed: int
    device: str


@dataclass(frozen=True)
class State:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Clock:
    """Seconds by the clock and of all cores that training took, over all parts of an interrupted run."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def start_at(self, state: State) -> None:
        """Count what an earlier part of the run took."""
        self._start = self._start[0] - state.seconds, self._start[1] - state.cpu_seconds

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


class Run:
    """One circuit that is trained by Adam for some minutes, its learning rate falling as a cosine of the time spent."""

    def __init__(self, settings: Settings, images: Images, folder: Path) -> None:
        self.settings, self.images, self.folder = settings, images, folder
        build: Callable[..., ct.Circuit] = getattr(ct.structures, settings.structure)
        circuit = build((SIDE, SIDE), settings.units, NUM_VALUES)
        self.pc = ct.compile(circuit, device=settings.device, seed=settings.seed)
        self.optimizer = torch.optim.Adam(
            self.pc.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.state = State()
        self.checkpoint = folder / "checkpoint.safetensors"

    def train(self) -> None:
        """Train until the time is up; write a checkpoint every minute, and go on from one."""
        clock = Clock()
        if self.checkpoint.exists():
            self._restore()
        else:
            ct.learning.initialize_inputs(
                self.pc, self.images.train, by="quantiles", bandwidth=3.0, seed=self.settings.seed
            )
        clock.start_at(self.state)
        budget, train_bits, last_saved = 60 * self.settings.minutes, float("nan"), time.perf_counter()
        if self.state.seconds >= budget:
            return
        title, shown = f"{self.settings.structure}, {self.settings.units} units", self.state.seconds
        with progress_bar(title, round(budget), enabled=True, completed=round(shown)) as advance:
            for batch in self._batches():
                bits = self._step(batch, min(1.0, self.state.seconds / budget))
                train_bits = bits if math.isnan(train_bits) else 0.95 * train_bits + 0.05 * bits
                self.state = State(self.state.step + 1, *clock.read())
                is_over = self.state.seconds >= budget
                if is_over or time.perf_counter() - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self._save()
                    last_saved = time.perf_counter()
                advance(self.state.seconds - shown, note=f"epoch {self.epoch:.1f}, train {train_bits:.3f} bits")
                shown = self.state.seconds
                if is_over:
                    return

    def bits_per_dimension(self, images: Tensor) -> float:
        """Return the mean of -log2 p(x) / 784."""
        total = 0.0
        with torch.no_grad():
            for batch in images.split(self.settings.batch_size):
                total -= float(self.pc(batch.to(self.pc.device, torch.int64)).double().sum())
        return total / len(images) * BITS

    def draw(self) -> None:
        """Save grids of samples, and of test images whose lower halves are drawn given the upper ones."""
        generator = torch.Generator(self.pc.device).manual_seed(self.settings.seed)
        samples = ct.queries.sample(self.pc, ROWS * COLUMNS, generator=generator)
        save_grid(samples, self.folder / "samples.png")
        originals = self.images.test[:COLUMNS].to(self.pc.device, torch.int64)
        is_known = (torch.arange(NUM_VARS, device=self.pc.device) < NUM_VARS // 2).expand(COLUMNS, -1)
        evidence = ct.Evidence.observe(originals, is_known)
        completions = ct.queries.sample(self.pc, ROWS - 2, evidence=evidence, generator=generator)
        given = originals.double().masked_fill(~is_known, math.nan)
        save_grid(torch.cat([originals, given, *completions]), self.folder / "completions.png")

    @property
    def epoch(self) -> float:
        """How often the training images were seen."""
        return self.state.step * self.settings.batch_size / len(self.images.train)

    def _step(self, batch: Tensor, share: float) -> float:
        """Do one step of Adam at a share of the time; return the batch's bits per dimension.

        The roughness of all values but black, which is a value of its own kind, is a prior over the whole of training.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * (
                LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * share)) / 2
            )
        self.optimizer.zero_grad()
        weights = self.pc.weights()
        nll = -self.pc(batch.to(self.pc.device, torch.int64), weights=weights).mean()
        roughness = ct.batteries.roughness(self.pc, weights=weights, values=slice(1, None))
        (nll + self.settings.roughness / len(self.images.train) * roughness).backward()
        self.optimizer.step()
        return float(nll.detach()) * BITS

    def _batches(self) -> Iterator[Tensor]:
        """Yield the batches from the present step on, in an order that seed and epoch alone decide."""
        per_epoch = len(self.images.train) // self.settings.batch_size
        while True:
            epoch, done = divmod(self.state.step, per_epoch)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.images.train), generator=generator)
            for index in order.split(self.settings.batch_size)[done:per_epoch]:
                yield self.images.train[index]

    def _save(self) -> None:
        tensors = {f"weights.{name}": parameter.detach() for name, parameter in self.pc.bank.items()}
        for name, parameter in self.pc.bank.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
        metadata = {"settings": json.dumps(asdict(self.settings)), "state": json.dumps(asdict(self.state))}
        partial = self.checkpoint.with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, self.checkpoint)

    def _restore(self) -> None:
        with safe_open(self.checkpoint, "pt", self.settings.device) as file:
            metadata = file.metadata()
            if json.loads(metadata["settings"]) != asdict(self.settings):
                raise SystemExit(
                    f"{self.checkpoint}: it is of a run with other settings, {metadata['settings']}; "
                    "name another folder with --out, or delete it"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  - not a mapping
        self.state = State(**json.loads(metadata["state"]))
        for name, parameter in self.pc.bank.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weights.{name}"])
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }


def save_grid(images: Tensor, path: Path) -> None:
    """Save images (N, 784) as one picture, unknown pixels red."""
    ct.plot.samples(
        images.unflatten(1, (SIDE, SIDE)), path, num_columns=COLUMNS, value_range=(0, NUM_VALUES - 1), zoom=ZOOM
    )


def machine(device: str) -> str:
    """Return what the run was measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def measure(settings: Settings, images: Images, folder: Path) -> dict[str, Any]:
    """Train, evaluate and draw one circuit, unless that was done before; return its results."""
    results = folder / "results.json"
    if results.exists():
        found = json.loads(results.read_text())
        if found["settings"] == asdict(settings):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(settings, images, folder)
    run.train()
    found = {
        "settings": asdict(settings),
        "num_parameters": run.pc.circuit.num_parameters,
        "epochs": run.epoch,
        "seconds": run.state.seconds,
        "cpu_seconds": run.state.cpu_seconds,
        "validation_bits": run.bits_per_dimension(images.validation),
        "test_bits": run.bits_per_dimension(images.test),
        "machine": machine(settings.device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    run.draw()
    results.write_text(json.dumps(found, indent=2) + "\n")
    return found


def report(found: dict[str, Any]) -> None:
    settings = found["settings"]
    published = PUBLISHED.get((settings["structure"], settings["units"]))
    print(
        f"{settings['structure']:<11} {settings['units']:>5} {found['num_parameters']:>11,} "
        f"{found['validation_bits']:>11.3f} {found['test_bits']:>7.3f} "
        f"{'-' if published is None else format(published, '.3f'):>10} "
        f"{found['epochs']:>7.1f} {found['seconds'] / 60:>8.1f} {found['cpu_seconds'] / 60:>12.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the .gz"
    )
    parser.add_argument("--units", type=int, nargs="+", default=[16], help="units per region")
    parser.add_argument("--structure", nargs="+", default=["quad_graph"], choices=["quad_graph", "quad_tree"])
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, by the clock, per circuit")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--out", type=Path, default=Path("images-out"), help="folder for checkpoints, pictures, results"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--roughness", type=float, default=4.0, help="strength of ct.batteries.roughness")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    images = load(options.data)
    print(
        "structure   units  parameters  validation    test  published  epochs  minutes  CPU minutes\n"
        "                              (bits per dimension, lower is better)"
    )
    for structure in options.structure:
        for units in options.units:
            settings = Settings(
                structure,
                units,
                minutes=options.minutes,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                roughness=options.roughness,
                seed=options.seed,
                device=options.device,
            )
            found = measure(settings, images, options.out / f"{structure}-{units}")
            report(found)
    print(f"{found['machine']}; {found['versions']}; pictures in {options.out}/*/*.png")


if __name__ == "__main__":
    main()
