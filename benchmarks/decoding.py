"""The speed of decoding: every mode on a small model, and one coupled step at the size of a real one beside its GEMMs.

    python benchmarks/decoding.py [--quick] [--rounds 5] [--threads 1] [--root FOLDER] [--large-only]

Times are CPU times of the process, which others on the machine disturb less than what a clock on the wall shows; of
several threads they are the sum. ``--root`` names another checkout of this project; its small-model figures are
measured too, by turns with this one's.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import Timed, cpu_seconds, measure
from torch import Tensor

import circuits as ct
import diffusion as df
from circuits.engine.adjoint import LogRoot
from circuits.engine.input_layers import InputLayer
from circuits.engine.question import Question
from diffusion.decoding.canvas import Canvas
from diffusion.decoding.plans import Look
from diffusion.decoding.step import decode_step

HERE = Path(__file__).resolve().parents[1]
MODES = ("independent", "latent", "marginal", "any_order", "joint")
LENGTH, COMMITTED = 32, 4

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
        start = time.process_time()
        decode(mode)
        if turn:
            seconds[mode].append(time.process_time() - start)
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
        tries = [[small_model(root, threads, rounds, batch_size) for root in roots] for _ in range(5)]
        print(f"\nA block of 32 tokens in 8 calls, hmm(32, 64, 112), small denoiser, batch {batch_size}, CPU ms")
        for mode in MODES:
            figures = [1e3 * median([turn[i][mode] for turn in tries]) for i in range(len(roots))]
            ratio = f"   {figures[0] / figures[1]:.2f} x before" if len(roots) > 1 else ""
            print(f"  {mode:12s} " + " ".join(f"{figure:8.1f}" for figure in figures) + ratio)
        base = median([turn[0]["independent"] for turn in tries])
        on_top = {mode: median([turn[0][mode] for turn in tries]) - base for mode in MODES[1:]}
        print(f"  any_order costs {on_top['any_order'] / on_top['latent']:.2f} x latent on top of the denoiser")


class Split:
    """The CPU time of a step by part: what input units do, the passes over the other layers, and all the rest."""

    def __init__(self) -> None:
        self.seconds = {"emission": 0.0, "recursion": 0.0}
        self._inside = False
        for owner, name, part in (
            (InputLayer, "forward", "emission"),
            (sys.modules[ct.queries.Posterior.__module__], "_shares", "emission"),
            (Question, "evaluated", "recursion"),
            (LogRoot, "apply", "recursion"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))
        solved = vars(ct.queries.Posterior)["_solved"]
        solved.func = self._timed(solved.func, "recursion")

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, start = True, time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.process_time() - start
                self._inside = False

        return timed

    def measure(self, step: Callable[[], object]) -> dict[str, float]:
        """Run a step once; return its seconds: of the parts, and of all of it."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        start = time.process_time()
        step()
        total = time.process_time() - start
        return {**self.seconds, "choice": total - sum(self.seconds.values()), "all": total}


def steps_of(head: df.CoupledHead, prediction: df.Prediction, config: df.DecodingConfig) -> Callable[[], Tensor]:
    """Return a step that commits ``COMMITTED`` tokens of every block, without the denoiser."""
    batch_size, length = prediction.shape
    spec = df.DenoiserSpec(
        vocab_size=prediction.vocab_size, mask_id=0, eos_ids=(), pad_id=0, forbidden_ids=(0,), max_length=length
    )
    is_open = torch.ones(batch_size, length, dtype=torch.bool)
    counts = torch.full((batch_size,), COMMITTED)
    weights = head.pc.weights()

    def step() -> Tensor:
        canvas = Canvas(is_open.long() * 0, is_open, is_open.clone(), 0, torch.arange(batch_size), spec)
        look = Look((0, length), is_open, counts, torch.zeros(batch_size, dtype=torch.bool))
        decode_step(canvas, look, prediction, df.Anywhere(), head, config, weights=weights)
        return canvas.tokens

    return step


def bare_products(batch_size: int, num_states: int, num_tokens: int, top_k: int | None) -> dict[str, Timed]:
    """Return the products that a step cannot do without: of the emission, and of a recursion in one direction."""
    # smaller matrices stand for those of all steps: what is multiplied does not matter
    rows, listed = batch_size * LENGTH, top_k or num_tokens
    factors, table = torch.rand(rows, listed), torch.rand(listed, num_states)
    states, transition = torch.rand(batch_size, num_states), torch.rand(num_states, num_states)

    def emission() -> object:
        if top_k is None:
            return factors @ table
        return [factors[i : i + 1] @ table for i in range(rows)]  # every row has a list of its own

    def recursion() -> None:
        for _ in range(LENGTH - 1):
            states @ transition  # the faster order, for so few columns

    return {"emission": emission, "recursion": recursion}


def benchmark_step(
    split: Split, pc: ct.CompiledCircuit, batch_size: int, top_k: int | None, rounds: int, temperature: float
) -> None:
    """Split one coupled step of every mode into emission, recursion and choice, as multiples of its bare products."""
    num_tokens, num_states = max(pc.circuit.num_categories), 1024 if pc.circuit.num_units > 1 << 15 else 16
    head = df.CoupledHead(pc, top_k=top_k)
    logits = 4 * torch.randn(batch_size, LENGTH, num_tokens, generator=torch.Generator().manual_seed(0))
    prediction = df.Prediction.from_logits(logits, top_k=top_k)
    del logits
    bare = bare_products(batch_size, num_states, num_tokens, top_k)
    floor = {name: median(seconds) for name, seconds in measure(bare, rounds, clock=cpu_seconds).items()}
    both = sum(floor.values())
    steps = {
        mode: steps_of(head, prediction, df.DecodingConfig(decode=mode, temperature=temperature, strategy="entropy"))
        for mode in MODES[1:]
    }
    taken: dict[str, list[dict[str, float]]] = {mode: [] for mode in steps}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for mode, step in steps.items():
                seconds = split.measure(step)
                if turn:
                    taken[mode].append(seconds)
    listed = f"{top_k or 'all'} tokens, tau={temperature:g}"
    size = f"V={num_tokens}, N={num_states}, L={LENGTH}, batch {batch_size}, {listed}"
    print(f"\nOne step that commits {COMMITTED} tokens of a block, {size}: CPU ms, multiples of both bare products")
    print(f"  {'bare products':14s} " + " ".join(f"{name} {1e3 * value:.1f}" for name, value in floor.items()))
    parts = ("emission", "recursion", "choice", "all")
    middle = {mode: {part: median([each[part] for each in tries]) for part in parts} for mode, tries in taken.items()}
    for mode, found in middle.items():
        figures = " ".join(f"{part} {1e3 * found[part]:8.1f} ({found[part] / both:5.2f})" for part in parts)
        print(f"  {mode:14s} {figures}   {found['all'] / middle['latent']['all']:.2f} x latent", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large-only", action="store_true", help="leave the small model out")
    parser.add_argument("--root", type=Path, help="another checkout to compare the small model with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32, medians of {arguments.rounds} rounds"
    )
    roots = [HERE, *([] if arguments.root is None else [arguments.root.resolve()])]
    if not arguments.large_only:
        benchmark_small_model(roots, arguments.threads, arguments.rounds)
    scale = 64 if arguments.quick else 1
    split = Split()
    pc = ct.compile(ct.structures.hmm(LENGTH, 1024 // scale, 126_464 // scale), seed=0).requires_grad_(False)
    for top_k in (1024 // scale, None):
        for batch_size in (1, 8):
            for temperature in (1.0, 0.0):
                benchmark_step(split, pc, batch_size, top_k, arguments.rounds, temperature)


if __name__ == "__main__":
    main()
