"""Caches of any denoiser's predictions on texts of the user's, for circuits to train on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from diffusion.app.models import Models
from diffusion.app.processes import shard
from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks.data import read_examples, text_of
from diffusion.evaluation.tasks.task import Example
from diffusion.text.corpus import load_corpus
from diffusion.text.tables import is_table, open_table
from diffusion.training.answers import answer_windows
from diffusion.training.logit_cache import LogitCache, cache_logits

_PROMPT = "prompt"


def cache_texts(models: Models, options: Any, *, num_blocks: int | None, progress: bool) -> LogitCache:
    """Cache what a denoiser says about the blocks of texts, each after its prompt where it has one.

    Under torchrun every process caches its share, in a shard of the folder.

    Args:
        models: the denoiser and its tokenizer.
        options: of the command line, by name: text, field, prompt_field, to, context, block, suffix, masks, top_k,
            features, seed.
        num_blocks: how many, drawn at random; None: all.
        progress: draw a progress bar.

    Raises:
        ArgumentError: no folder is named, or no text fills a block.
        CorpusError: the texts cannot be read.
        CheckpointError: the folder holds something else.
    """
    if options.to is None:
        raise ArgumentError("to: expected a folder for the cache with --text, got none; name it with --to")
    pairs = _pairs(options.text, options.field, options.prompt_field)
    encode = models.tokenizer.encode
    windows, valid = answer_windows(
        ((encode(prompt), encode(text)) for prompt, text in pairs),
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
        masks=options.masks,
        shard=shard(),
        top_k=options.top_k,
        features=options.features,
        seed=options.seed,
        progress=progress,
        device=models.device,
    )


def _pairs(source: str, field: str, prompt_field: str | None) -> Iterable[tuple[str, ...]]:
    """Return prompts and texts, of a table as they are read; raises ArgumentError if these texts have no prompts."""
    if is_table(source):
        table = open_table(source)
        prompt = prompt_field or (_PROMPT if _PROMPT in table.columns and field != _PROMPT else None)
        return (("", text) for (text,) in table.texts(field)) if prompt is None else table.texts(prompt, field)
    if not source.removesuffix(".gz").endswith(".jsonl"):
        if prompt_field is not None:
            raise ArgumentError(
                f"prompt_field: expected none, for {source} has no keys, got {prompt_field!r}; leave it out"
            )
        return [("", document) for document in load_corpus(source, held_out_fraction=0.0).train]

    def pair(record: dict[str, Any]) -> Example:
        prompt = record.get(_PROMPT, "") if prompt_field is None else record[prompt_field]
        return Example(text_of(prompt), (), text_of(record[field]))

    return [(example.question, example.solution) for example in read_examples(source, pair, name="text")]
