"""Texts with the models of a command: prompts continued, and holes in texts filled."""

from __future__ import annotations

import re
from typing import Any

import torch

from diffusion.app.models import Models
from diffusion.app.sources import encoded_prompts
from diffusion.decoding.generation import Generation, generate, infill
from diffusion.errors import ArgumentError

_HOLE = re.compile(r"(_{3,}|<mask(?:\*[0-9]{1,6})?>)")


def encoded_holes(models: Models, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts with holes: ``___`` is as many masks as it has underscores, ``<mask*8>`` is eight.

    Raises ArgumentError for a text without a hole, or if the tokenizer does not know most of one.
    """
    rows = []
    for text in texts:
        parts = _HOLE.split(text)
        if len(parts) == 1:
            raise ArgumentError(
                f"text: expected a hole to fill, got {text!r:.80}; write ___ (as many tokens as underscores, at least "
                "three), <mask>, or <mask*8>"
            )
        encoded_prompts(models.name, ["".join(parts[::2])], models.tokenizer)  # known, as a whole
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += [models.denoiser.spec.mask_id] * _size(part) if number % 2 else models.tokenizer.encode(part)
        rows.append(ids)
    return rows


def continue_prompts(
    models: Models, prompts: list[str], *, gen_length: int, seed: int = 0, **options: Any
) -> Generation:
    """Continue each prompt, in blocks of ``models.block_length``, or ``block_length``; by default in a call per token.

    Options are those of :func:`~diffusion.decoding.generation.generate`.
    """
    if "plan" not in options:
        options.setdefault("block_length", models.block_length)
    rows = _on_device(models, encoded_prompts(models.name, prompts, models.tokenizer))
    generator = torch.Generator(device=models.device).manual_seed(seed)
    return generate(models.denoiser, rows, gen_length=gen_length, head=models.head, generator=generator, **options)


def fill_holes(models: Models, texts: list[str], *, seed: int = 0, **options: Any) -> Generation:
    """Fill the holes of each text, see :func:`encoded_holes`; options are those of ``generation.infill``."""
    rows = _on_device(models, encoded_holes(models, texts))
    generator = torch.Generator(device=models.device).manual_seed(seed)
    return infill(models.denoiser, rows, head=models.head, generator=generator, **options)


def _on_device(models: Models, rows: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(ids, dtype=torch.int64, device=models.device) for ids in rows]


def _size(hole: str) -> int:
    if hole.startswith("_"):
        return len(hole)
    return int(hole[6:-1]) if "*" in hole else 1
