"""Loading a checkpoint of PyJuice as large as CoDD's circuits for LLaDA: time and memory, in a fresh process.

python benchmarks/jpc.py                       # 126,464 tokens, 1,024 states, 32 positions: 0.5 GB
python benchmarks/jpc.py --vocab 1000 --states 64
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 32

LOAD = """
import json, re, sys, time
import circuits as ct
import circuits.interop
import torch
torch.set_num_threads(int(sys.argv[2]))
def peak():  # of this process alone; what getrusage says begins with that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
start = time.perf_counter()
pc = ct.interop.load_jpc(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "before": before, "peak": peak(), "circuit": str(pc.circuit)}))
"""
"""Runs in a process of its own: the peak of the memory is that of loading."""


def family(num_categories: int) -> bytes:
    """Return the pickle of an input family that takes soft evidence: a class's name and its argument."""
    module = "pyjuice.nodes.distributions.external_categorical"
    return f"c{module}\nExternProductCategorical\n(I{num_categories}\ntR.".encode()


def hmm_records(length: int, states: int, vocab: int, *, block: int, seed: int) -> list[dict[str, Any]]:
    """Return the nodes of a homogeneous hidden Markov model as PyJuice lists them: the last step first."""
    generator = np.random.default_rng(seed)
    blocks = states // block
    records: list[dict[str, Any]] = []

    def add(kind: str, chs: tuple[int, ...] = (), *, num_blocks: int = blocks, size: int = block, **rest: Any) -> int:
        records.append({"type": kind, "num_node_blocks": num_blocks, "block_size": size, "chs": chs, **rest})
        return len(records) - 1

    emission = generator.random((states, vocab), dtype=np.float32)
    emission /= emission.sum(1, keepdims=True)
    transition = generator.random((blocks * blocks, block, block), dtype=np.float32) / states
    dense = np.stack([axis.ravel() for axis in np.meshgrid(range(blocks), range(blocks), indexing="ij")])
    straight = np.arange(blocks)[:, None]
    table = {"params": emission.ravel()}
    rest, owner = add("Input", scope=[length - 1], dist=family(vocab), **table), {}
    for step in reversed(range(length - 1)):
        leaf = add("Input", scope=[step], dist=family(vocab), source_node=0)
        below = add("Product", (rest,), edge_ids=straight) if step == length - 2 else rest
        own = {"source_node": owner["sum"]} if owner else {"params": transition}
        mixed = add("Sum", (below,), edge_ids=dense, **own)
        owner.setdefault("sum", mixed)
        rest = add("Product", (leaf, mixed), edge_ids=np.repeat(straight, 2, 1))
    start = np.full((blocks, 1, block), 1 / states, np.float32)
    add(
        "Sum",
        (rest,),
        num_blocks=1,
        size=1,
        edge_ids=np.stack([np.zeros(blocks, int), np.arange(blocks)]),
        params=start,
    )
    return records


def main() -> None:
    """Write a file, load it in a fresh process, and print seconds and memory beside the size of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=126_464)
    parser.add_argument("--states", type=int, default=1_024)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.jpc"
        records = hmm_records(options.length, options.states, options.vocab, block=min(BLOCK, options.states), seed=0)
        with path.open("wb") as file:
            pickle.dump(records, file)
        del records
        size = path.stat().st_size
        command = [sys.executable, "-c", LOAD, str(path), str(options.threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    mega = 1e6
    print(f"{found['circuit']}: a file of {size / mega:,.0f} MB")
    print(f"  loaded in {found['seconds']:.1f} s")
    print(f"  peak memory {found['peak'] / mega:,.0f} MB, {found['peak'] / size:.2f} x the file;")
    added = found["peak"] - found["before"]
    print(f"  {found['before'] / mega:,.0f} MB before loading, so loading took {added / size:.2f} x the file")


if __name__ == "__main__":
    main()
