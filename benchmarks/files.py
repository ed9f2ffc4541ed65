"""What it costs to save, load and cache: medians in ms of one version of this library beside another, in turn.

python benchmarks/files.py --trees /path/to/the/one /path/to/the/other --folders /dev/shm .
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MEASURE = "import sys; sys.path[:0] = sys.argv[1:3]; import files; files.measure(sys.argv[3], int(sys.argv[4]))"
"""Runs in a process of its own, with the package of the tree that is asked for."""
SMALL, LARGE = (4, 3, 5), (8, 256, 9_000)  # steps, states, categories: 39 weights, and 2.4 million, 10 MB
ROUNDS = 3


def measure(place: str, repetitions: int) -> None:
    """Print the seconds of every repetition, by what was done, as JSON."""
    import torch

    import circuits as ct
    import diffusion as df

    torch.set_num_threads(1)
    config = df.TransformerConfig(
        vocab_size=1_000,
        mask_id=999,
        pad_id=998,
        eos_id=997,
        context_length=64,
        block_length=32,
        width=128,
        num_layers=4,
        num_heads=4,
    )
    denoiser, found = df.TransformerDenoiser(config), {}
    windows = torch.randint(900, (128, 96), generator=torch.Generator().manual_seed(0))

    def timed(what: str, act: Callable[[Path], object], prepare: Callable[[Path], object] = lambda path: None) -> None:
        with tempfile.TemporaryDirectory(dir=place) as name:
            path = Path(name) / "x"
            for repetition in range(repetitions + 1):
                prepare(path)
                start = time.perf_counter()
                act(path)
                if repetition:  # the first one imports
                    found.setdefault(what, []).append(time.perf_counter() - start)

    for size, shape in (("40 weights", SMALL), ("10 MB", LARGE)):
        pc = ct.compile(ct.structures.hmm(*shape), seed=0)
        head = df.CoupledHead(pc)
        timed(f"`ct.save`, {size}", lambda path, pc=pc: ct.save(pc, path))
        timed(f"`ct.load`, {size}", ct.load, lambda path, pc=pc: path.exists() or ct.save(pc, path))
        timed(f"`CoupledHead.save`, {size}", lambda path, head=head: head.save(path))
        timed(
            f"`CoupledHead.load`, {size}", df.CoupledHead.load, lambda path, head=head: path.exists() or head.save(path)
        )
    timed("`TransformerDenoiser.save`, 4 MB", denoiser.save)
    timed(
        "`TransformerDenoiser.load`, 4 MB",
        df.TransformerDenoiser.load,
        lambda path: path.exists() or denoiser.save(path),
    )

    def cache(path: Path) -> object:
        return df.cache_logits(denoiser, windows, path, block_length=32, top_k=64, batch_size=128, progress=False)

    timed("`df.cache_logits`, one batch of 128", cache, lambda path: shutil.rmtree(path, ignore_errors=True))
    print(json.dumps(found))


def main() -> None:
    """Measure both trees in every folder, in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs=2, required=True)
    parser.add_argument("--folders", nargs="+", default=["/dev/shm", "."])
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    seconds: dict[str, dict[tuple[str, str], list[float]]] = {}
    for _ in range(ROUNDS):
        for folder in options.folders:
            for tree in options.trees:
                own = str(Path(__file__).parent)
                command = [sys.executable, "-W", "ignore", "-c", MEASURE, tree, own, folder, str(options.repetitions)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                for what, taken in json.loads(done.stdout.splitlines()[-1]).items():
                    seconds.setdefault(what, {}).setdefault((folder, tree), []).extend(taken)
    columns = [(folder, tree) for folder in options.folders for tree in options.trees]
    print(f"| | {' | '.join(' '.join(column) for column in columns)} |\n|{'---|' * (1 + len(columns))}")
    for what, by_column in seconds.items():
        medians = [1e3 * statistics.median(by_column[column]) for column in columns]
        print(f"| {what} | {' | '.join(f'{value:.3g}' for value in medians)} |")


if __name__ == "__main__":
    main()
