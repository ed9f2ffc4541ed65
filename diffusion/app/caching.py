"""Caches of any denoiser's predictions on texts of the user's, for circuits to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion.app.models import Models
from diffusion.app.processes import shard
from diffusion.app.scoring import given_texts
from diffusion.errors import ArgumentError
from diffusion.text.corpus import load_corpus
from diffusion.training.answers import answer_windows
from diffusion.training.logit_cache import LogitCache, cache_logits


def cache_texts(models: Models, options: Any, *, num_blocks: int | None, progress: bool) -> LogitCache:
    """Cache what a denoiser says about the blocks of texts, each after its prompt where it has one.

    Under torchrun every process caches its share, in a shard of the folder.

    Args:
        models: the denoiser and its tokenizer.
        options: of the command line, by name: text, to, context, block, suffix, top_k, features, seed.
        num_blocks: how many, drawn at random; None: all.
        progress: draw a progress bar.

    Raises:
        ArgumentError: no folder is named, or no text fills a block.
        CorpusError: the file cannot be read.
        CheckpointError: the folder holds something else.
    """
    if options.to is None:
        raise ArgumentError("to: expected a folder for the cache with --text, got none; name it with --to")
    tokens = [tuple(models.tokenizer.encode(text) for text in pair) for pair in _pairs(options.text)]
    windows, valid = answer_windows(
        tokens,
        models.denoiser.spec,
        context_length=options.context,
        block_length=options.block or models.block_length,
    )
    if num_blocks is not None:
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(len(windows), generator=generator)[:num_blocks]
        windows, valid = windows[chosen], valid[chosen]
    return cache_logits(
        models.denoiser,
        windows,
        options.to,
        block_length=options.block or models.block_length,
        valid=valid,
        suffix_length=options.suffix,
        shard=shard(),
        top_k=options.top_k,
        features=options.features,
        seed=options.seed,
        progress=progress,
        device=models.device,
    )


def _pairs(path: Path) -> list[tuple[str, str]]:
    if str(path).removesuffix(".gz").endswith(".jsonl"):
        return given_texts([], path, "")
    return [("", document) for document in load_corpus(path, held_out_fraction=0.0).train]
