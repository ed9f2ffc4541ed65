"""Text: GSM8K's answers under the denoiser that the library ships, and Python's documentation under the demo's own.

GSM8K (Cobbe et al. 2021, MIT licence) is read from ``--data`` or ``$UNFACTOR_GSM8K``, its ``train.jsonl`` as it is or
compressed; without it circuits and heads are fitted to a part of the held-out answers that come with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _barrier_fits import Sizes
from _bed import Bed
from torch import Tensor

import circuits as ct
from diffusion.app.packing import SHIPPED
from diffusion.app.recipe import PRESETS
from diffusion.app.workspace import Workspace
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.text.corpus import load_corpus, random_windows, windows

TEXT = Sizes(
    states=256,
    masks=1,
    cache_batch=64,
    batch_size=64,
    learning_rate=0.015,
    feature_learning_rate=2e-3,
    steps=250,
    patience=2,
    hidden=512,
    matching_updates=30,
)
ANSWERS = replace(TEXT, states=1024)
GROWTH = ((0.4, 0.4, 0.3), (0.4, 0.3), (0.4, 0.4, 0.3), (0.4, 0.4, 0.3, 0.2))
"""Step sizes of every epoch, with an eighth of the states, a quarter, half and all."""
RATIOS = (0.25, 0.5, 0.75, 1.0)
NUM_PARTS = 3
"""Seeds whose held-out windows have nothing in common."""


def gsm8k_bed(folder: Path, *, seed: int, is_quick: bool, data: Path | None = None) -> Bed:
    """Return the answers, in 1,024 byte pairs, under the denoiser that the library ships.

    Args:
        folder: where nothing is prepared.
        seed: which held-out windows.
        is_quick: whether a few windows do.
        data: GSM8K's training problems, ``.jsonl`` or ``.jsonl.gz``; None: only the answers that the library has.

    Raises:
        CorpusError: the file is not the one that the denoiser was trained on.
    """
    models = Workspace(SHIPPED, progress=False)
    recipe = models.recipe()
    if data is None:
        documents = models.held_out(recipe)
        train, held_out = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    else:
        corpus = models.claimed_corpus(replace(recipe, text=replace(recipe.text, corpus=str(data))))
        train, held_out = corpus.train, corpus.held_out
    return _bed(models, models.base_denoiser(), train, held_out, seed=seed, is_quick=is_quick)


def demo_bed(folder: Path, *, seed: int, is_quick: bool) -> Bed:
    """Return Python's documentation, in characters, under a denoiser that is trained in the folder once.

    Args:
        folder: of the denoiser, as ``unfactor train --corpus embedded`` makes it.
        seed: which held-out windows.
        is_quick: whether a denoiser of few updates and a few windows do.
    """
    recipe = PRESETS["tiny" if is_quick else "default"]
    if is_quick:
        recipe = replace(recipe, denoiser=replace(recipe.denoiser, training=replace(recipe.denoiser.training, steps=2)))
    models = Workspace(folder / f"models{'-quick' if is_quick else ''}", progress=not is_quick)
    denoiser = models.train(recipe)
    corpus = load_corpus(recipe.text.corpus)
    return _bed(models, denoiser, corpus.train, corpus.held_out, seed=seed, is_quick=is_quick)


def _bed(
    models: Workspace,
    denoiser: TransformerDenoiser,
    train: Sequence[str],
    held_out: Sequence[str],
    *,
    seed: int,
    is_quick: bool,
) -> Bed:
    """Return the bed of some documents: of those held out every second one is for early stopping."""
    span, length = denoiser.config.span, denoiser.config.block_length
    tokens, validation, rest = (models.stream(tuple(one)) for one in (train, held_out[::2], held_out[1::2]))
    most = 16 if is_quick else None
    count, generator = most or 40_960, torch.Generator().manual_seed(0)
    train_windows = random_windows(tokens, length=span, num_windows=count, generator=generator)
    forbidden = set(denoiser.spec.forbidden_ids)
    vocabulary = tuple(id for id in range(denoiser.spec.vocab_size) if id not in forbidden)
    return Bed(
        denoiser=denoiser,
        num_features=denoiser.config.width,
        block_length=length,
        vocabulary=vocabulary,
        text=train_windows,
        train=train_windows,
        validation=windows(validation, length=span, max_windows=most or 256),
        held_out={"held-out": _part(windows(rest, length=span), seed)},
        chain=partial(
            grown,
            stream=torch.searchsorted(torch.tensor(vocabulary), tokens),
            block_length=length,
            num_categories=len(vocabulary),
            num_blocks=most or 30_000,
            growth=GROWTH[-2:] if is_quick else GROWTH,
        ),
        ratios=RATIOS,
        is_shared=True,
    )


def grown(
    num_states: int,
    stream: Tensor,
    *,
    block_length: int,
    num_categories: int,
    num_blocks: int = 30_000,
    growth: Sequence[Sequence[float]] = GROWTH,
) -> ct.CompiledCircuit:
    """Fit a hidden Markov model whose states are split in two after every fit: better than from a random start.

    Args:
        num_states: in the end.
        stream: categories of all text, int64 (T,).
        block_length: L.
        num_categories: C.
        num_blocks: blocks of an epoch, drawn anew for each.
        growth: of each fit, from few states to ``num_states``: the step size of every epoch.
    """
    pc = None
    for number, step_sizes in enumerate(growth):
        states = num_states >> (len(growth) - 1 - number)
        if pc is None:
            pc = ct.compile(ct.structures.hmm(block_length, states, num_categories), seed=0)
        else:
            pc = ct.transforms.grow(pc, noise=0.3, seed=states)
        for epoch, step_size in enumerate(step_sizes):
            generator = torch.Generator().manual_seed(states + epoch)
            blocks = random_windows(stream, length=block_length, num_windows=num_blocks, generator=generator)
            anemone = ct.learning.Anemone(step_size=step_size, pseudocount=2e-5, seed=epoch)
            result = ct.learning.fit(pc, blocks, optimizer=anemone, num_epochs=1, batch_size=512, progress=False)
            print(f"{states} states: {result.train_log_likelihood[-1] / block_length:.3f} nats per token", flush=True)
    assert pc is not None
    return pc


def _part(found: Tensor, seed: int) -> Tensor:
    """Return a part of all windows, spread over the text; those of the first seeds have none in common."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found[order[seed % NUM_PARTS :: NUM_PARTS]]
