"""Density estimation on the 20 binary data sets (DEBD) beside published results, one command.

    python benchmarks/density.py --data FOLDER                        # NLTCS, Plants, Audio, Jester, DNA
    python benchmarks/density.py --data FOLDER --sets kdd msweb --seeds 0 1 2 --minutes 5

FOLDER holds NAME/NAME.train.data.gz, .valid and .test (or not gzipped), rows of 0 and 1 with commas between. Every set
gets the same treatment. Members of an ensemble learn from the training rows: continuous mixtures over blocks of
variables, and mixtures of hidden Chow-Liu trees, one tree per k-means cluster. Each is stopped by the validation
likelihood. The ensemble is one circuit, whose convex weights are the likeliest for the validation rows. The test rows
are read once, by that circuit, at the end. Steps and epochs are counted out beforehand from sizes and --minutes, so
that a seed gives the same circuit whatever the machine's load.
"""

from __future__ import annotations

import argparse
import gzip
import math
import multiprocessing
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import keep_freed_memory
from torch import Tensor

import circuits as ct

DEFAULT_SETS = ("nltcs", "plants", "baudio", "jester", "dna")

# Mean test log-likelihoods in nats. HCLT: mean of the five logs that come with the code of Liu and Van den Broeck 2021
# ("Tractable Regularization of Probabilistic Circuits"). The others are as usually cited, not checked in their papers.
PUBLISHED = {
    "nltcs": {"HCLT": -6.00, "LearnSPN": -6.11, "ID-SPN": -6.02, "RAT-SPN": -6.01, "EiNet": -6.02},
    "plants": {"HCLT": -14.26, "LearnSPN": -12.98, "ID-SPN": -12.54, "RAT-SPN": -13.44, "EiNet": -13.68},
    "baudio": {"HCLT": -39.77, "LearnSPN": -40.50, "ID-SPN": -39.79, "RAT-SPN": -39.96, "EiNet": -39.88},
    "jester": {"HCLT": -52.46, "LearnSPN": -53.48, "ID-SPN": -52.86, "RAT-SPN": -52.97, "EiNet": -52.56},
    "dna": {"HCLT": -79.06, "LearnSPN": -82.52, "ID-SPN": -81.21, "RAT-SPN": -97.23, "EiNet": -96.09},
}

FLOPS, ELEMENTS = 8e10, 3.5e9
"""Operations of matrix products, and numbers read or written, per second and core: what steps are counted out for."""
TREE_SECONDS = 1.2e-8
"""Seconds and core per row, variable, tree and latent state of one EM epoch of a mixture of HCLTs."""
FIT_SHARE = 0.75
"""Share of the time that is for learning; the rest is for reading, evaluating and the ensemble."""
MIN_STEPS, MAX_STEPS, MAX_PASSES, MAX_EPOCHS = 120, 3000, 60, 80
NUM_POINTS, HIDDEN_UNITS, BATCH_SIZE = 1024, 128, 256


@dataclass(frozen=True)
class Blocks:
    """A continuous mixture over blocks of at most ``max_values`` joint values."""

    max_values: int
    dropout: float


@dataclass(frozen=True)
class Trees:
    """A mixture of hidden Chow-Liu trees, one per k-means cluster."""

    num_clusters: int
    num_latents: int


MEMBERS: tuple[Blocks | Trees, ...] = (
    Blocks(64, 0.2),
    Blocks(16, 0.0),
    Trees(2, 12),
    Blocks(4, 0.1),
    Blocks(64, 0.0),
    Trees(3, 12),
    Blocks(16, 0.1),
    Blocks(256, 0.1),
)


def path_of(folder: Path, name: str, part: str) -> Path:
    """Return the file of one part of a data set, gzipped if there is such a file."""
    path = folder / name / f"{name}.{part}.data.gz"
    return path if path.exists() else path.with_suffix("")


def load(folder: Path, name: str, part: str) -> Tensor:
    """Read one part of a data set, int64 (N, D)."""
    path = path_of(folder, name, part)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    width = text.split(b"\n", 1)[0].count(b",") + 1
    digits = np.frombuffer(text.translate(None, b",\r\n "), dtype=np.uint8) - ord("0")
    return torch.from_numpy(digits.reshape(-1, width).astype(np.int64))


@torch.no_grad()
def log_likelihoods(pc: ct.CompiledCircuit, x: Tensor) -> Tensor:
    """Return log p(x) of every row, in batches of bounded memory; equal rows are evaluated once."""
    rows, inverse = torch.unique(x, dim=0, return_inverse=True)
    batch_size = max(16, min(1024, (1 << 27) // max(size * units for size, units in pc.layer_sizes)))
    return torch.cat([pc(batch) for batch in rows.split(batch_size)])[inverse]


def seconds_per_step(blocks: list[tuple[int, ...]]) -> float:
    """Estimate the time of one training step of a continuous mixture on one core."""
    features = [len(block) * (len(block) + 1) // 2 for block in blocks]
    columns = sum(2 ** len(block) for block in blocks)
    decoder = 3 * HIDDEN_UNITS * (2 * HIDDEN_UNITS + sum(features))
    tables = 3 * sum(count * 2 ** len(block) for count, block in zip(features, blocks, strict=True))
    elements = 30 * HIDDEN_UNITS + 20 * columns + BATCH_SIZE * (3 * len(blocks) + 8)
    return NUM_POINTS * (2 * (decoder + tables) / FLOPS + elements / ELEMENTS)


def fit_blocks(recipe: Blocks, train: Tensor, valid: Tensor, seconds: float, seed: int) -> ct.CompiledCircuit:
    """Learn a continuous mixture; members differ in the bootstrap sample that their blocks come from."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(train), (len(train),), generator=generator)
    information = ct.structures.empirical_mutual_information(train[drawn], num_categories=2, pseudocount=1.0)
    max_values, steps = recipe.max_values, 0
    while steps < MIN_STEPS and max_values > 1:
        blocks = ct.structures.correlated_blocks(information, 2, max_values=max_values)
        steps = int(seconds / seconds_per_step(blocks))
        max_values //= 4
    passes = MAX_PASSES * len(train) // BATCH_SIZE
    return ct.batteries.fit_continuous_mixture(
        train,
        num_categories=2,
        validation_data=valid,
        blocks=blocks,
        num_components=NUM_POINTS,
        num_points=NUM_POINTS,
        hidden_units=HIDDEN_UNITS,
        dropout=recipe.dropout,
        batch_size=BATCH_SIZE,
        num_steps=max(40, min(MAX_STEPS, passes, steps)),
        patience=6,
        seed=seed,
        progress=False,
    ).pc


def fit_trees(recipe: Trees, train: Tensor, valid: Tensor, seconds: float, seed: int) -> ct.CompiledCircuit:
    """Learn one hidden Chow-Liu tree per cluster by EM, then all of them together by EM."""
    rows, counts = torch.unique(train, dim=0, return_counts=True)
    epoch = TREE_SECONDS * recipe.num_latents * recipe.num_clusters * train.shape[1]
    affordable = int(seconds / epoch / 30)  # rows that 30 epochs can see
    if len(rows) > affordable:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: max(100, affordable)]
        rows, counts = rows[chosen], counts[chosen]
    weights = counts.float()
    epochs = max(5, min(MAX_EPOCHS, int(seconds / epoch / len(rows))))
    labels = ct.learning.kmeans(rows, recipe.num_clusters, sample_weights=weights, seed=seed)
    options: dict[str, Any] = {"optimizer": "em", "pseudocount": 0.1, "batch_size": 512, "progress": False}
    experts, shares = [], []
    for cluster in labels.unique():
        inside = (labels == cluster).float()
        blurred = weights * (0.9 * inside + 0.1 / recipe.num_clusters)
        circuit = ct.structures.hclt(rows, recipe.num_latents, 2, pseudocount=4.0, weights=blurred)
        expert = ct.compile(circuit, seed=seed * 100 + int(cluster))
        ct.learning.fit(expert, rows, sample_weights=blurred, num_epochs=max(1, epochs // 5), **options)
        experts.append(expert)
        shares.append(float(blurred.sum()))
    mixture = ct.batteries.convex_combination(experts, torch.tensor(shares))
    ct.learning.fit(
        mixture,
        rows,
        sample_weights=weights,
        num_epochs=max(1, epochs - epochs // 5),
        validation_data=valid,
        patience=4,
        **options,
    )
    return mixture


def fit_member(job: tuple[Path, str, Blocks | Trees, float, int, Path]) -> tuple[Tensor, float]:
    """Learn one member, save it, and return (its validation log-likelihoods, CPU seconds)."""
    folder, name, recipe, seconds, seed, path = job
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.process_time()
    train, valid = load(folder, name, "train"), load(folder, name, "valid")
    if isinstance(recipe, Blocks):
        pc = fit_blocks(recipe, train, valid, seconds, seed)
    else:
        pc = fit_trees(recipe, train, valid, seconds, seed)
    ct.save(pc, path)
    return log_likelihoods(pc, valid), time.process_time() - start


def run(folder: Path, name: str, seed: int, minutes: float, workers: int) -> dict[str, Any]:
    """Learn an ensemble for one set and judge it."""
    start, cpu_start = time.perf_counter(), time.process_time()
    seconds = FIT_SHARE * minutes * 60 * workers / len(MEMBERS)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"member{position}.safetensors" for position in range(len(MEMBERS))]
        jobs = [
            (folder, name, recipe, seconds, seed * len(MEMBERS) + position, paths[position])
            for position, recipe in enumerate(MEMBERS)
        ]
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(fit_member, jobs))
        scores = torch.stack([score for score, _ in results], 1)
        weights = ct.batteries.convex_weights(scores)
        kept = [position for position, weight in enumerate(weights.tolist()) if weight > 0.003]
        ensemble = ct.batteries.convex_combination([ct.load(paths[i]) for i in kept], weights[kept])
    valid = log_likelihoods(ensemble, load(folder, name, "valid"))
    test = log_likelihoods(ensemble, load(folder, name, "test")).double()
    return {
        "test": float(test.mean()),
        "error": float(test.std() / math.sqrt(len(test))),
        "valid": float(valid.double().mean()),
        "members": [float(score.double().mean()) for score, _ in results],
        "weights": weights.tolist(),
        "parameters": ensemble.circuit.num_parameters,
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu_start + sum(cpu for _, cpu in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/debd"), help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=list(DEFAULT_SETS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=4.5, help="time per set and seed on --workers cores")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    files = [path_of(arguments.data, name, part) for name in arguments.sets for part in ("train", "valid", "test")]
    missing = [path for path in files if not path.exists()]
    if missing:
        parser.error(f"{missing[0]} is not there, nor gzipped; name the folder of the data sets with --data")
    torch.set_num_threads(arguments.workers)
    keep_freed_memory()
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    print("members:", ", ".join(map(str, MEMBERS)), flush=True)
    rows = []
    for name in arguments.sets:
        runs = []
        for seed in arguments.seeds:
            result = run(arguments.data, name, seed, arguments.minutes, arguments.workers)
            runs.append(result)
            members = " ".join(
                f"{score:.3f}x{weight:.2f}" for score, weight in zip(result["members"], result["weights"], strict=True)
            )
            print(
                f"{name} seed {seed}: test {result['test']:.4f} +- {result['error']:.3f}, valid {result['valid']:.4f}, "
                f"{result['wall']:.0f} s, {result['cpu']:.0f} CPU s, {result['parameters']} weights; members (valid x "
                f"weight) {members}",
                flush=True,
            )
        rows.append((name, runs))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print("\nMean test log-likelihood in nats per row. HCLT from its authors' logs, the others as usually cited. +- is")
    print(
        f"one standard error over test rows, 'seeds' the range over seeds; seconds per seed. Greatest process: "
        f"{peak / 2**20:.1f} GiB."
    )
    columns = ["HCLT", "LearnSPN", "ID-SPN", "RAT-SPN", "EiNet"]
    print(f"{'set':<10}{'ours':>10}{'+-':>8}{'seeds':>8}{'s':>7}{'CPU s':>7}  " + "".join(f"{c:>10}" for c in columns))
    for name, runs in rows:
        tests = torch.tensor([r["test"] for r in runs], dtype=torch.float64)
        spread = f"{float(tests.max() - tests.min()):.3f}" if len(tests) > 1 else "-"
        means = [sum(r[key] for r in runs) / len(runs) for key in ("error", "wall", "cpu")]
        published = "".join(f"{PUBLISHED[name][c]:>10.2f}" if name in PUBLISHED else f"{'-':>10}" for c in columns)
        print(
            f"{name:<10}{float(tests.mean()):>10.3f}{means[0]:>8.3f}{spread:>8}{means[1]:>7.0f}{means[2]:>7.0f}  "
            f"{published}"
        )


if __name__ == "__main__":
    main()
