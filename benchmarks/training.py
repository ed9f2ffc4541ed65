"""What training a head costs, and what it is best trained on.

    python benchmarks/training.py updates                        # an update beside log Z and its gradients
    python benchmarks/training.py masks --data train.jsonl.gz    # caches of random masks, and as blocks are written
    python benchmarks/training.py joint --data train.jsonl.gz    # denoiser and head together, and the head alone

*masks* and *joint* work on GSM8K's answers under the denoiser that the library ships, with the circuit of maximum
likelihood that comes with it and a calibration. Times are those of the processor, of all threads together.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from _bed import Bed
from _bed_text import gsm8k_bed
from _timing import cpu_seconds, measure
from torch import Tensor

import circuits as ct
import diffusion as df
from diffusion.app.packing import SHIPPED
from diffusion.training.circuit import CacheTraining, coupled_loss
from diffusion.training.masking import Masks

SIZES = ((32, 64, 112, None), (32, 128, 1024, None), (32, 256, 4096, 256), (32, 512, 16_384, 512))
"""Tokens of a block, states, tokens of the vocabulary, and how many of them are listed."""
STEPS = (2, 4, 8)
"""Denoiser calls a block."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl[.gz]")
    parser.add_argument("--blocks", type=int, default=2048, help="of a cache")
    parser.add_argument("--steps", type=int, default=200, help="updates of a head, of 64 blocks")
    parser.add_argument("--texts", type=int, default=64, help="held-out texts")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the processor, for each way of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    return parser.parse_args()


def updates(options: argparse.Namespace) -> None:
    """Print what an update costs, in multiples of log Z and its gradients in the weights under the same evidence."""
    print("| block, states, tokens, listed | log Z and gradients (ms) | adam | calibrated, adam | anemone |")
    print("|---|---|---|---|---|")
    for size in SIZES[:1] if options.quick else SIZES:
        length, states, vocab_size, listed = size
        cache, trainings = _cache(64, length, vocab_size, listed), {}
        for name, config, is_calibrated in (("adam", "adam", 0), ("calibrated", "adam", 1), ("anemone", "anemone", 0)):
            pc = ct.compile(ct.structures.hmm(length, states, vocab_size), seed=0)
            calibration = df.NoiseCalibration(vocab_size) if is_calibrated else None
            training = df.CircuitTraining(batch_size=64, optimizer=config, steps=1 << 30)
            trainings[name] = CacheTraining(df.CoupledHead(pc, calibration=calibration), cache, None, training)
        pc, batch = trainings["adam"].head.pc, trainings["adam"].batch(0)
        evidence = batch.distribution(trainings["adam"].head).evidence

        def own(pc: ct.CompiledCircuit = pc, evidence: ct.Evidence = evidence) -> None:
            pc.zero_grad()
            pc.log_partition(evidence).sum().backward()

        runs = {"own": own} | {name: lambda one=one: one.update(0) for name, one in trainings.items()}
        seconds = {name: np.median(times) for name, times in measure(runs, options.rounds, clock=cpu_seconds).items()}
        ratios = " | ".join(f"{seconds[name] / seconds['own']:.2f}" for name in trainings)
        print(
            f"| {length}, {states}, {vocab_size:,}, {listed or 'all'} | {1e3 * seconds['own']:.0f} | {ratios} |",
            flush=True,
        )


def _cache(count: int, length: int, vocab_size: int, listed: int | None) -> df.LogitCache:
    random = np.random.default_rng(0)
    masked = random.random((count, length)) < 0.5
    log_q = random.normal(size=(count, length, listed or vocab_size)).astype(np.float16)
    if listed is None:
        return df.LogitCache(random.integers(vocab_size, size=masked.shape), masked, log_q, None, vocab_size, "all")
    starts = random.integers(vocab_size, size=(*masked.shape, 1))
    values = (starts + np.arange(listed) * (vocab_size // listed)) % vocab_size
    return df.LogitCache(values[..., 0], masked, log_q, values, vocab_size, "listed")


def masks(options: argparse.Namespace) -> None:
    """Print how probable held-out text is under block decoding, with heads of equal updates on different caches."""
    titles = [f"{count} calls a block" for count in STEPS]
    print("\n".join([_row("cache", *titles, "seed"), "|---" * (len(STEPS) + 2) + "|"]))
    for seed in options.seeds:
        bed = gsm8k_bed(Path(), seed=seed, is_quick=options.quick, data=options.data)
        texts = _texts(bed, options.texts)
        losses = {"without circuit": _decoded(bed, None, texts)}
        for name in get_args(Masks):
            with tempfile.TemporaryDirectory() as folder:
                cache = _cached(bed, bed.train[: options.blocks], folder, seed, masks=name)
                head = first_head(bed)
                df.fit_coupled(head, cache, config=_training(options.steps, seed), progress=False)
            losses[name] = _decoded(bed, head, texts)
            cells = [f"{mean:.3f}" for mean in losses[name].mean(1)]
            if name != "random":
                apart = losses[name] - losses["random"]
                half = 1.96 * apart.std(1) / len(texts) ** 0.5
                parts = zip(cells, apart.mean(1), half, strict=True)
                cells = [f"{cell} ({mean:+.3f} ± {wide:.3f})" for cell, mean, wide in parts]
            print(_row(name, *cells, str(seed)), flush=True)
        alone = [f"{mean:.3f}" for mean in losses["without circuit"].mean(1)]
        print(_row("without circuit", *alone, str(seed)), flush=True)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _texts(bed: Bed, count: int) -> Tensor:
    """Return windows of a context and two blocks."""
    held_out = bed.held_out["held-out"]
    pairs = torch.cat([held_out[:-1], held_out[1:, -bed.block_length :]], 1)
    return pairs[:count]


def _decoded(bed: Bed, head: df.CoupledHead | None, texts: Tensor) -> Tensor:
    """Return the negative log-likelihoods of two blocks a text, in nats per token: (numbers of calls, texts)."""
    length = bed.block_length
    prompt, answer = texts.tensor_split([texts.shape[1] - 2 * length], 1)
    options: dict[str, Any] = {"head": head, "block_length": length, "strategy": "entropy", "decode": "joint"}
    return torch.stack(
        [
            -df.log_likelihood(bed.denoiser, prompt, answer, num_steps=2 * count, **options) / (2 * length)
            for count in STEPS
        ]
    )


WAYS = {"the head alone": 0.0, "half of the time alone, then both": 0.5, "both": 1.0}
"""Ways of training, and for which share of the time denoiser and head move together."""


def joint(options: argparse.Namespace) -> None:
    """Print held-out losses of heads and denoisers that were trained for the same time, caches included."""
    print(_row("trained", "updates", "one-step", "coupled", "seed") + "\n|---|---|---|---|---|")
    for seed in options.seeds:
        shipped = gsm8k_bed(Path(), seed=seed, is_quick=options.quick, data=options.data)
        for name, share in WAYS.items():
            bed = replace(shipped, denoiser=copy.deepcopy(shipped.denoiser))
            head, done, began = first_head(bed), [], time.process_time()
            if share < 1:
                with tempfile.TemporaryDirectory() as folder:
                    cache = _cached(bed, bed.train[: options.blocks], folder, seed)
                    left = options.seconds * (1 - share) - (time.process_time() - began)
                    probe = CacheTraining(first_head(bed), cache, None, _training(100, seed))
                    done.append(_number_of_updates(probe, left))
                    df.fit_coupled(head, cache, config=_training(done[-1], seed), progress=False)
            if share:
                rate = 0.03 if share == 1 else 0.003  # of a head that was not trained before, and of one that was
                config = df.JointTraining(batch_size=64, learning_rate=rate, validate_every=1 << 30, seed=seed)
                probed = replace(shipped, denoiser=copy.deepcopy(shipped.denoiser))
                done.append(_joint_updates(probed, options.seconds * share, config))
                df.fit_jointly(bed.denoiser, head, bed.train, config=replace(config, steps=done[-1]), progress=False)
            with tempfile.TemporaryDirectory() as folder:
                held_out = _cached(bed, bed.validation, folder, 1)
                loss, alone = coupled_loss(head, held_out), _one_step(held_out)
            updates = " + ".join(map(str, done))
            print(_row(name, updates, f"{alone:.3f}", f"{loss:.3f}", str(seed)), flush=True)


def _number_of_updates(probe: CacheTraining, seconds: float) -> int:
    """Return how many updates fit into some time, from the time of a few."""
    times = measure({"update": lambda: probe.update(0)}, 5, clock=cpu_seconds)["update"]
    return max(1, round(seconds / float(np.median(times))))


def _joint_updates(bed: Bed, seconds: float, config: df.JointTraining) -> int:
    began = time.process_time()
    df.fit_jointly(bed.denoiser, first_head(bed), bed.train, config=replace(config, steps=5), progress=False)
    return max(1, round(seconds / (time.process_time() - began) * 5))


def _one_step(cache: df.LogitCache) -> float:
    """Return the loss of the denoiser alone, weighted as the coupled one."""
    batch = cache.batch(slice(None))
    log_q = batch.prediction.log_prob_of(batch.tokens).masked_fill(~batch.masked, 0.0).sum(1)
    count = batch.masked.sum(1)
    return float(-(log_q[count > 0] / count[count > 0]).mean())


def first_head(bed: Bed) -> df.CoupledHead:
    """Return the shipped circuit of maximum likelihood with a calibration that divides frequencies out."""
    pc = ct.load(SHIPPED / "likelihood")
    counts = torch.bincount(bed.train[:, -bed.block_length :].flatten(), minlength=bed.denoiser.spec.vocab_size)
    return df.CoupledHead(pc, calibration=df.NoiseCalibration.dividing_out(counts))


def _training(steps: int, seed: int) -> df.CircuitTraining:
    return df.CircuitTraining(steps=steps, batch_size=64, validate_every=1 << 30, seed=seed)


def _cached(bed: Bed, windows: Tensor, folder: str, seed: int, **made: Any) -> df.LogitCache:
    return df.cache_logits(
        bed.denoiser, windows, folder, block_length=bed.block_length, seed=seed, progress=False, **made
    )


SECTIONS = {"updates": updates, "masks": masks, "joint": joint}

if __name__ == "__main__":
    chosen = parsed()
    torch.set_num_threads(chosen.threads)
    if chosen.quick:
        chosen.blocks, chosen.steps, chosen.texts, chosen.seconds, chosen.rounds = 8, 2, 4, 2.0, 1
    SECTIONS[chosen.section](chosen)
