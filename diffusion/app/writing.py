"""Texts with the models of a folder: prompts continued, and holes in texts filled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion.app.sources import encoded_prompts
from diffusion.decoding.generation import Generation, generate, infill
from diffusion.errors import ArgumentError
from diffusion.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from diffusion.app.workspace import Workspace

_HOLE = re.compile(r"(_{3,}|<mask(?:\*[0-9]{1,6})?>)")


def encoded_holes(folder: Path, texts: list[str], tokenizer: TextTokenizer) -> list[list[int]]:
    """Return the tokens of texts with holes: ``___`` is as many masks as it has underscores, ``<mask*8>`` is eight.

    Raises:
        ArgumentError: a text without a hole, or the tokenizer does not know most of one.
    """
    rows = []
    for text in texts:
        parts = _HOLE.split(text)
        if len(parts) == 1:
            raise ArgumentError(
                f"text: expected a hole to fill, got {text!r:.80}; write ___ (as many tokens as underscores, at least "
                "three), <mask>, or <mask*8>"
            )
        encoded_prompts(folder, ["".join(parts[::2])], tokenizer)  # known, as a whole
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += [tokenizer.mask_id] * _size(part) if number % 2 else tokenizer.encode(part)
        rows.append(ids)
    return rows


def continue_prompts(
    workspace: Workspace,
    prompts: list[str],
    *,
    gen_length: int,
    num_steps: int | None = None,
    use_circuit: bool = True,
    seed: int = 0,
    **options: Any,
) -> Generation:
    """Continue each prompt, in blocks as long as those of the denoiser's training, or ``block_length``.

    Args:
        workspace: the folder.
        prompts: texts.
        gen_length: tokens to generate.
        num_steps: denoiser calls in all; None: one per token.
        use_circuit: whether with the folder's head.
        seed: of all draws.
        options: of :func:`~diffusion.decoding.generation.generate`.
    """
    denoiser = workspace.denoiser()
    rows = encoded_prompts(workspace.path, prompts, workspace.tokenizer())
    options.setdefault("block_length", denoiser.config.block_length)
    return generate(
        denoiser,
        [torch.tensor(ids, dtype=torch.int64, device=workspace.device) for ids in rows],
        gen_length=gen_length,
        num_steps=num_steps,
        head=workspace.head() if use_circuit else None,
        generator=torch.Generator(device=workspace.device).manual_seed(seed),
        **options,
    )


def fill_holes(
    workspace: Workspace,
    texts: list[str],
    *,
    num_steps: int | None = None,
    use_circuit: bool = True,
    seed: int = 0,
    **options: Any,
) -> Generation:
    """Fill the holes of each text, see :func:`encoded_holes`.

    Args:
        workspace: the folder.
        texts: with holes.
        num_steps: denoiser calls in all; None: one per token of a hole.
        use_circuit: whether with the folder's head.
        seed: of all draws.
        options: of :func:`~diffusion.decoding.generation.infill`.
    """
    rows = encoded_holes(workspace.path, texts, workspace.tokenizer())
    return infill(
        workspace.denoiser(),
        [torch.tensor(ids, dtype=torch.int64, device=workspace.device) for ids in rows],
        num_steps=num_steps,
        head=workspace.head() if use_circuit else None,
        generator=torch.Generator(device=workspace.device).manual_seed(seed),
        **options,
    )


def _size(hole: str) -> int:
    if hole.startswith("_"):
        return len(hole)
    return int(hole[6:-1]) if "*" in hole else 1
