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

TEXT = Sizes(states=256, epochs=5, masks=1, cache_batch=64, batch_size=128, steps=300, validate_every=100, patience=2, hidden=128)
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
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    most = 16 if is_quick else None
    forbidden = set(denoiser.spec.forbidden_ids)
    vocabulary = tuple(id for id in range(denoiser.spec.vocab_size) if id not in forbidden)
    return Bed(
        denoiser=denoiser,
        num_features=denoiser.config.width,
        block_length=length,
        vocabulary=vocabulary,
        text=random_windows(tokens, length=span, num_windows=most or 40_000, generator=generators[0]),
        train=random_windows(tokens, length=span, num_windows=most or 40_960, generator=generators[1]),
        validation=windows(validation, length=span, max_windows=most or 256),
        held_out={"held-out": _part(windows(rest, length=span), seed)},
        chain=partial(grown, num_categories=len(vocabulary), first=2 if is_quick else 128, seed=0),
        ratios=RATIOS,
        is_shared=True,
    )


def grown(
    num_states: int, text: Tensor, *, num_categories: int, first: int, seed: int, noise: float = 0.3
) -> ct.Circuit:
    """Return a hidden Markov model whose states were split in two after every fit: better than from a random start.

    Args:
        num_states: in the end, a power of two times ``first``.
        text: categories, int64 (N, L).
        num_categories: C.
        first: states of the first fit, which starts from random weights.
        seed: of the first weights, the order of the text, and what parts the copies of a state.
        noise: standard deviation of the logarithm of the factors that part them.
    """
    generator = torch.Generator().manual_seed(seed)
    circuit = ct.structures.hmm(text.shape[1], first, num_categories)
    while first < num_states:
        pc = ct.compile(circuit, seed=seed)
        ct.learning.fit(pc, text, optimizer="anemone", num_epochs=2, batch_size=512, seed=seed, progress=False)
        tables = [pc.log_weights(name).detach() for name in ("initial", "transition0", "emission0")]
        tables = [tables[0][0], tables[1], tables[2].t()]
        split = [table.repeat_interleave(2, 0) for table in tables]
        split[1] = split[1].repeat_interleave(2, 1)
        moved = [table + noise * torch.randn(table.shape, generator=generator) for table in split]
        initial, transition, emission = (table.softmax(-1) for table in moved)
        first *= 2
        circuit = ct.structures.hmm(
            text.shape[1], first, num_categories, initial=initial, transition=transition, emission=emission
        )
    return circuit


def _part(found: Tensor, seed: int) -> Tensor:
    """Return a part of all windows, spread over the text; those of the first seeds have none in common."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found[order[seed % NUM_PARTS :: NUM_PARTS]]
