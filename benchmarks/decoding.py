"""The speed of decoding: every mode on a small model, and one coupled step at the size of a real one beside its GEMMs.

    python benchmarks/decoding.py [--quick] [--rounds 5] [--threads 2] [--root FOLDER]

``--root`` names another checkout of this project; its small-model figures are measured too, by turns with this one's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import measure
from torch import Tensor

import circuits as ct
import diffusion as df

HERE = Path(__file__).resolve().parents[1]
MODES = ("independent", "latent", "marginal", "any_order", "joint")
LENGTH = 32

SMALL_MODEL = """
import json, statistics, sys, time
import torch
import circuits as ct, diffusion as df
threads, rounds, batch_size = map(int, sys.argv[1:])
torch.set_num_threads(threads)
shape = df.TransformerConfig(vocab_size=112, mask_id=1, pad_id=0, eos_id=2, forbidden_ids=(3,))
denoiser = df.TransformerDenoiser(shape, seed=0).eval()
head = df.CoupledHead(ct.compile(ct.structures.hmm(32, 64, 112), seed=0), 1.0)
prompt = torch.randint(4, 112, (batch_size, 32), generator=torch.Generator().manual_seed(0))
options = dict(gen_length=32, block_length=32, num_steps=8, head=head, strategy="entropy", temperature=1.0)
modes = ("independent", "latent", "marginal", "any_order", "joint")
def decode(mode):
    generator = torch.Generator().manual_seed(0)
    df.generate(denoiser, prompt, decode=mode, stop_at_eos=False, generator=generator, **options)
seconds = {mode: [] for mode in modes}
for turn in range(rounds + 1):
    for mode in modes:
        start = time.perf_counter()
        decode(mode)
        if turn:
            seconds[mode].append(time.perf_counter() - start)
print(json.dumps({mode: statistics.median(times) for mode, times in seconds.items()}))
"""
"""Runs in a process of its own, so that another checkout can be measured by the same code."""


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def small_model(root: Path, threads: int, rounds: int, batch_size: int) -> dict[str, float]:
    command = [sys.executable, "-c", SMALL_MODEL, str(threads), str(rounds), str(batch_size)]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def benchmark_small_model(roots: list[Path], threads: int, rounds: int) -> None:
    """Decode one block of 32 tokens in 8 calls, and print milliseconds a text and what a mode costs on top."""
    for batch_size in (1, 8):
        tries = [[small_model(root, threads, rounds, batch_size) for root in roots] for _ in range(3)]
        print(f"\nA block of 32 tokens in 8 calls, hmm(32, 64, 112), small denoiser, batch {batch_size}, ms a batch")
        for mode in MODES:
            figures = [1e3 * median([turn[i][mode] for turn in tries]) for i in range(len(roots))]
            ratio = f"   {figures[0] / figures[1]:.2f} x before" if len(roots) > 1 else ""
            print(f"  {mode:12s} " + " ".join(f"{figure:8.1f}" for figure in figures) + ratio)
        base = median([turn[0]["independent"] for turn in tries])
        on_top = {mode: median([turn[0][mode] for turn in tries]) - base for mode in MODES[1:]}
        print(f"  any_order costs {on_top['any_order'] / on_top['latent']:.2f} x latent on top of the denoiser")


def benchmark_step(num_tokens: int, num_states: int, batch_size: int, top_k: int | None, rounds: int) -> None:
    """Split one coupled step into emission, recursion and choice, as multiples of its bare products."""
    generator = torch.Generator().manual_seed(0)
    pc = ct.compile(ct.structures.hmm(LENGTH, num_states, num_tokens), seed=0).requires_grad_(False)
    head = df.CoupledHead(pc, top_k=top_k)
    logits = 4 * torch.randn(batch_size, LENGTH, num_tokens, generator=generator)
    masked = torch.ones(batch_size, LENGTH, dtype=torch.bool)
    tokens = torch.zeros(batch_size, LENGTH, dtype=torch.int64)
    prediction = df.Prediction.from_logits(logits, masked, top_k=top_k)
    del logits
    seeds = ct.RowGenerators(torch.arange(batch_size))
    banks = pc.weights()
    # the smaller matrices stand for all of them: what is multiplied does not matter
    rows, listed = batch_size * LENGTH, top_k or num_tokens
    factors, table = torch.rand(rows, listed), torch.rand(listed, num_states)
    states, transition = torch.rand(num_states, batch_size), torch.rand(num_states, num_states)

    def emission_product() -> object:
        if top_k is None:
            return factors @ table
        return [factors[i : i + 1] @ table for i in range(rows)]  # every row has a list of its own

    def recursion_products() -> None:
        for _ in range(LENGTH - 1):
            transition @ states

    def distribution() -> df.CoupledDistribution:
        return head.distribution(prediction, tokens, masked)

    def any_order() -> Tensor:
        dist, chosen = distribution(), tokens
        for position in range(4):
            beliefs = dist.posterior()
            chosen = beliefs.best()
            dist = dist.given(chosen, torch.arange(LENGTH).expand_as(chosen) == position)
        return chosen

    dist = distribution()
    steps: dict[str, Callable[[], object]] = {
        "bare product of the emission": emission_product,
        f"bare products of the recursion ({LENGTH - 1})": recursion_products,
        "weights (compared once a step)": pc.weights,
        "evidence": distribution,
        "emission": lambda: pc.leaves(dist.evidence, banks),
        "emission and recursion: log Z": lambda: pc.log_partition(dist.evidence, banks),
        "latent: all of it": lambda: distribution().given_latents(seeds),
        "marginal: all of it": lambda: distribution().posterior(),
        "joint: all of it": lambda: distribution().draw(1.0, seeds),
        "any_order: 4 tokens": any_order,
    }
    with torch.no_grad():
        seconds = {name: median(times) for name, times in measure(steps, rounds).items()}
    names = list(steps)
    floor = seconds[names[0]] + seconds[names[1]]
    size = f"V={num_tokens}, N={num_states}, L={LENGTH}, batch {batch_size}, {top_k or 'all'} tokens"
    print(f"\nOne coupled step, {size}: ms, and multiples of both bare products")
    for name in names:
        print(f"  {name:38s} {1e3 * seconds[name]:9.1f} {seconds[name] / floor:8.2f}")
    recursion = seconds[names[5]] - seconds[names[4]]
    print(f"  {'recursion alone, of its own products':38s} {1e3 * recursion:9.1f} {recursion / seconds[names[1]]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, help="another checkout to compare the small model with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32, medians of {arguments.rounds} rounds"
    )
    roots = [HERE, *([] if arguments.root is None else [arguments.root.resolve()])]
    benchmark_small_model(roots, arguments.threads, arguments.rounds)
    scale = 64 if arguments.quick else 1
    for batch_size in (1, 8):
        for top_k in (1024 // scale, None):
            benchmark_step(126_464 // scale, 1024 // scale, batch_size, top_k, arguments.rounds)


if __name__ == "__main__":
    main()
