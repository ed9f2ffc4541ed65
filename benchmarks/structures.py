"""Transitions of hidden Markov models on one corpus, after equal processor time each: one command.

    python benchmarks/structures.py --data train.jsonl.gz --seconds 55

The text is blocks of 32 byte pairs, of 1,024, of GSM8K's answers. Every model learns by Anemone from blocks in the same
random order until its processor time is spent, the fits that it starts from included; the validation blocks are of
other documents. Then one rule chooses: the smallest that is not clearly worse than the best.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from _bed_text import gsm8k_bed
from torch import Tensor

import circuits as ct

CHUNK, BATCH_SIZE = 2048, 256
SHARE_OF_THE_START = 0.2
"""Of the time of a model that starts from smaller ones, what each of their fits takes."""

Start = Callable[["Learner"], ct.Circuit | ct.CompiledCircuit]


class Learner:
    """Learns models from one corpus, and counts the processor time that they take."""

    def __init__(self, train: Tensor, num_categories: int, seconds: float, seed: int) -> None:
        self.train, self.num_categories, self.seconds, self.seed = train, num_categories, seconds, seed
        self.length = train.shape[1]

    def fit(
        self, start: ct.Circuit | ct.CompiledCircuit, until: float, seed: int | None = None
    ) -> tuple[ct.CompiledCircuit, int]:
        """Return a model that learnt until the process had used so many seconds, and from how many blocks."""
        pc = ct.compile(start, seed=self.seed if seed is None else seed) if isinstance(start, ct.Circuit) else start
        seen = 0
        while time.process_time() < until:
            first = seen % len(self.train)
            chunk = self.train[first : first + CHUNK]
            ct.learning.fit(pc, chunk, optimizer="anemone", num_epochs=1, batch_size=BATCH_SIZE, progress=False)
            seen += len(chunk)
        return pc, seen

    def started(self, circuit: ct.Circuit, seed: int | None = None) -> ct.CompiledCircuit:
        """Return a small model, to start a larger one from."""
        return self.fit(circuit, time.process_time() + SHARE_OF_THE_START * self.seconds, seed)[0]

    def dense(self, num_states: int) -> ct.Circuit:
        """Return a hidden Markov model with any transitions."""
        return ct.structures.hmm(self.length, num_states, self.num_categories)


def split(learner: Learner) -> ct.CompiledCircuit:
    """Return a dense model of 256 states, pairs of copies of 128 that learnt."""
    return ct.transforms.grow(learner.started(learner.dense(128)), noise=0.3, seed=learner.seed)


def sparse(num_groups: int, rank: int) -> Start:
    """Return a start of groups of states, each followed by itself and the next three, and ways that all share."""
    near = (torch.arange(num_groups) - torch.arange(num_groups).unsqueeze(1)) % num_groups < 4

    def start(learner: Learner) -> ct.Circuit:
        sizes = [num_groups] * num_groups
        return ct.structures.block_sparse_hmm(learner.length, sizes, learner.num_categories, near, rank=rank)

    return start


def monarch(num_states: int) -> Start:
    """Return a random start of pairs of states."""
    return lambda learner: ct.structures.monarch_hmm(learner.length, (num_states,) * 2, learner.num_categories)


def product(num_states: int, power: float) -> Start:
    """Return a start from the product of two chains that learnt."""

    def start(learner: Learner) -> ct.Circuit:
        chains = [learner.started(learner.dense(num_states), learner.seed + number) for number in range(2)]
        return ct.transforms.product_chain(*chains, power=power)

    return start


STARTS: Mapping[str, Start] = {
    "dense 128": lambda learner: learner.dense(128),
    "dense 256": lambda learner: learner.dense(256),
    "dense 256, split": split,
    "block-sparse 16 x 16, rank 16": sparse(16, 16),
    "block-sparse 32 x 32, rank 32": sparse(32, 32),
    "Monarch 16 x 16": monarch(16),
    "Monarch 16 x 16, product": product(16, 1.0),
    "Monarch 32 x 32": monarch(32),
    "Monarch 32 x 32, product": product(32, 1.0),
    "Monarch 32 x 32, product, power 1/2": product(32, 0.5),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="GSM8K's training problems; without them a few answers do")
    parser.add_argument("--seconds", type=float, default=55, help="processor time of a model")
    parser.add_argument("--only", nargs="*", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    bed = gsm8k_bed(Path(), seed=options.seed, is_quick=False, data=options.data)
    train, validation = (
        part.unfold(1, bed.block_length, bed.block_length).flatten(0, 1) for part in (bed.text, bed.validation)
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    learner = Learner(train[order], bed.denoiser.spec.vocab_size, options.seconds, options.seed)
    fitted, notes = {}, {}
    for name in options.only:
        until = time.process_time() + options.seconds
        fitted[name], seen = learner.fit(STARTS[name](learner), until)
        notes[name] = f"{seen / len(train):.2f}"
        print(name, notes[name], flush=True)
    choice = ct.learning.choose_fitted(fitted, validation)
    print("| model | numbers | passes | nats a token | behind (standard error) |\n|---|---|---|---|---|")
    for name, score in choice.scores.items():
        numbers = (-score.log_likelihood, score.behind, score.standard_error)
        loss, behind, error = (number / bed.block_length for number in numbers)
        print(f"| {name} | {score.num_free_parameters:,} | {notes[name]} | {loss:.4f} | {behind:.4f} ({error:.4f}) |")
    print(f"{len(train)} training blocks, {len(validation)} validation blocks; chosen: {choice.name}")


if __name__ == "__main__":
    main()
