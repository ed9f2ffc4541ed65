"""Texts scored by the models of a command."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.app.models import Models
from diffusion.app.sources import encoded_prompts
from diffusion.errors import ArgumentError
from diffusion.evaluation.likelihood import log_likelihood
from diffusion.evaluation.tasks.data import read_examples, text_of
from diffusion.evaluation.tasks.task import Example
from diffusion.json_files import write_json

_OF_METHOD = {"decoder": ("num_steps", "strategy", "decode"), "elbo": ("num_samples",), "sequential": ()}


@dataclass(frozen=True)
class ScoredText:
    """A text after its prompt, with its log-probabilities in nats: without the circuit, and with it if there is one."""

    prompt: str
    text: str
    num_tokens: int
    log_probs: tuple[float, ...]

    def perplexity(self, log_prob: float) -> float:
        """Return exp of the negative log-probability per token."""
        return math.exp(-log_prob / self.num_tokens) if log_prob > -math.inf else math.inf


@dataclass(frozen=True)
class Scores:
    """Texts with their log-probabilities, and what the numbers of a row are."""

    method: str
    columns: tuple[str, ...]
    rows: tuple[ScoredText, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all as JSON, atomically; -inf as null."""
        rows = [
            {**asdict(row), "log_probs": [value if math.isfinite(value) else None for value in row.log_probs]}
            for row in self.rows
        ]
        write_json(path, {"method": self.method, "columns": self.columns, "rows": rows})


def given_texts(texts: Sequence[str], file: Path | None, prompt: str) -> list[tuple[str, str]]:
    """Return pairs of prompt and text: those of the command line, or of a file.

    Raises ArgumentError if there are none, or both, or the file is not as it has to be.
    """
    if bool(texts) == (file is not None):
        raise ArgumentError("text: expected texts, or a --file with some, and not both")
    if file is None:
        return [(prompt, text) for text in texts]

    def pair(record: dict[str, Any]) -> Example:
        return Example(text_of(record.get("prompt", prompt)), (), text_of(record["text"]))

    return [(example.question, example.solution) for example in read_examples(file, pair, name="file")]


def method_options(method: str, **options: Any) -> dict[str, Any]:
    """Return the options that are given, by name; raises ArgumentError for those that a method does not have."""
    if method not in _OF_METHOD:
        raise ArgumentError(f"method: expected one of {', '.join(_OF_METHOD)}, got {method!r}")
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(_OF_METHOD[method]))
    if unknown:
        raise ArgumentError(f"{unknown[0]}: --method {method} has no such option; leave it out, or take another method")
    return given


def score_texts(
    models: Models,
    pairs: Sequence[tuple[str, str]],
    *,
    method: str,
    block_length: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Scores:
    """Return the log-probability of texts after their prompts, without the circuit, and with it if there is one.

    Options are those of a method of :func:`~diffusion.evaluation.likelihood.log_likelihood`; each text has the same
    seed. Raises ArgumentError if a text is empty or too long, or the tokenizer does not know most of it.
    """
    rows = [encoded_prompts(models.name, pair, models.tokenizer) for pair in pairs]
    if not all(text for _, text in rows):
        raise ArgumentError("text: expected at least one token in each, got an empty text")
    block_length = block_length or (None if models.head is None else models.head.block_length)
    heads = (None,) if models.head is None else (None, models.head)
    asked: dict[str, Any] = {"method": method, "seeds": [seed], **(options or {})}
    scored = []
    for pair, (before, text) in zip(pairs, rows, strict=True):
        parts = [[torch.tensor(part, dtype=torch.int64)] for part in (before, text)]
        asked["block_length"] = min(block_length or len(text), len(text))
        numbers = [float(log_likelihood(models.denoiser, *parts, head=head, **asked)[0]) for head in heads]
        scored.append(ScoredText(*pair, len(text), tuple(numbers)))
    return Scores(method, ("without circuit", "with circuit")[: len(heads)], tuple(scored))
