"""Texts judged from outside: their perplexity under a causal language model that is not ours, beside distinct-n.

Perplexity alone is easily had: by repetition. So there is no way to ask for it without the share of different n-grams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.arguments import checked_count
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.evaluation.intervals import Estimate, interval_of, resamples, rounded
from diffusion.evaluation.result_tables import ResultTable

_GRAMS = (1, 2, 3)


@dataclass(frozen=True)
class TextQuality:
    """What some texts are like to a causal language model, with 95 % bootstrap intervals over them.

    Attributes:
        perplexity: exp of the negative log-likelihood per token of the scorer, over all texts together, each given its
            prompt.
        distinct: for n = 1, 2, 3 the share of a text's n-grams, of the scorer's tokens, that are different; a mean over
            the texts that have any.
        num_texts: texts.
        num_tokens: of the scorer, in all of them, that were scored.
    """

    perplexity: Estimate
    distinct: tuple[Estimate, ...]
    num_texts: int
    num_tokens: int

    def __str__(self) -> str:
        shares = ", ".join(f"distinct-{n} {share}" for n, share in zip(_GRAMS, self.distinct, strict=True))
        return f"perplexity {self.perplexity}, {shares} ({self.num_texts} texts, {self.num_tokens} tokens)"


class CausalScorer:
    """A causal language model with its tokenizer, from transformers.

    Args:
        model: gives logits of the next token.
        tokenizer: of it.
        name: for tables.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "scorer") -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> CausalScorer:
        """Load a model by its name on the hub, from a folder, or from a ``.gguf`` file; needs transformers ([hf]).

        Args:
            name: of the model, or a path. A ``.gguf`` file needs the packages gguf and accelerate ([eval]) too.
            device: where it runs.
            dtype: of its weights; None: float32.
            revision: of a name on the hub.

        Raises:
            ArgumentError: transformers is not installed.
            CheckpointError: the model cannot be loaded.
        """
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ArgumentError("scorer: expected transformers to be installed; pip install 'unfactor[hf]'") from error
        path, options = str(name), dict[str, Any]()
        if path.endswith(".gguf"):
            path, options["gguf_file"] = str(Path(path).parent), Path(path).name
        if revision is not None:
            options["revision"] = revision
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32, **options)
        except Exception as error:  # of files, the hub, and missing packages: many types
            reason = " ".join(str(error).split())
            raise CheckpointError(f"scorer: expected a causal model, got {name}: {reason:.300}") from error
        return cls(model.to(torch.device(device)), tokenizer, name=Path(str(name)).name)

    @torch.no_grad()
    def log_likelihoods(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, *, batch_size: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each text given its prompt, and how many tokens it is of.

        A text's first token is only scored where something stands before it: a prompt, or a token that the tokenizer
        puts there.

        Args:
            texts: N of them.
            prompts: what stands before each; None: nothing.
            batch_size: texts at a time; it changes no result.

        Returns:
            float64 (N,), in nats, and int64 (N,).

        Raises:
            ArgumentError: there are no texts, one is empty, or one is longer than the model can read.
        """
        checked_count("batch_size", batch_size)
        rows, starts = self._rows(texts, prompts)
        scores = torch.zeros(len(rows), dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        device = next(self.model.parameters()).device
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            longest = len(rows[batch[0]])
            tokens = torch.tensor([rows[index] + [0] * (longest - len(rows[index])) for index in batch], device=device)
            lengths = torch.tensor([len(rows[index]) for index in batch], device=device)
            places = torch.arange(longest, device=device)
            given = (places < lengths.unsqueeze(1)).long()
            logits = self.model(input_ids=tokens, attention_mask=given).logits[:, :-1].float()
            found = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1).double()
            begin = torch.tensor([starts[index] for index in batch], device=device).unsqueeze(1)
            is_scored = (places[1:] >= begin) & (places[1:] < lengths.unsqueeze(1))
            scores[torch.tensor(batch)] = found.masked_fill(~is_scored, 0.0).sum(1).cpu()
        counts = [len(row) - max(1, start) for row, start in zip(rows, starts, strict=True)]
        return scores, torch.tensor(counts)

    def quality(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, *, batch_size: int = 8, seed: int = 0
    ) -> TextQuality:
        """Return what texts are like.

        Args:
            texts: N of them, of which those that are empty count as texts, but have nothing to score.
            prompts: what stands before each; None: nothing.
            batch_size: texts at a time.
            seed: of the bootstrap.

        Raises:
            ArgumentError: there is nothing to score, or a text is longer than the model can read.
        """
        prompts = [""] * len(texts) if prompts is None else prompts
        kept = [pair for pair in zip(texts, prompts, strict=True) if pair[0]]
        scores, counts = self.log_likelihoods(
            [pair[0] for pair in kept], [pair[1] for pair in kept], batch_size=batch_size
        )
        ids = [self._plain_ids(text) for text, _ in kept]
        rows = resamples(len(kept), seed)
        nll, number = -scores.numpy(), counts.numpy().astype(float)
        if not number.sum():
            raise ArgumentError("texts: expected some with more than one token, got none")
        value = math.exp(nll.sum() / number.sum())
        drawn = np.exp(nll[rows].sum(1) / np.maximum(1.0, number[rows].sum(1)))
        distinct = tuple(_mean([_distinct(row, n) for row in ids if len(row) >= n], seed) for n in _GRAMS)
        return TextQuality(interval_of(value, drawn), distinct, len(texts), int(number.sum()))

    def _rows(self, texts: Sequence[str], prompts: Sequence[str] | None) -> tuple[list[list[int]], list[int]]:
        """Return all tokens of each prompt and text, and where the text's begin."""
        prompts = [""] * len(texts) if prompts is None else prompts
        if not texts or len(prompts) != len(texts) or not all(texts):
            raise ArgumentError(
                f"texts: expected at least one, none of them empty, each with its prompt, got {len(texts)}"
            )
        before = self._prefix()
        rows, starts = [], []
        for text, prompt in zip(texts, prompts, strict=True):
            given = before + (self._plain_ids(prompt) if prompt else [])
            rows.append(given + self._plain_ids(text))
            starts.append(len(given))
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and max(map(len, rows)) > longest:
            raise ArgumentError(
                f"texts: expected at most the scorer's {longest} tokens with their prompts, got {max(map(len, rows))}; "
                "take shorter ones"
            )
        return rows, starts

    def _prefix(self) -> list[int]:
        """Return what the tokenizer puts before every text."""
        with_special, plain = self.tokenizer("a")["input_ids"], self._plain_ids("a")
        found = [place for place in range(len(with_special)) if with_special[place : place + len(plain)] == plain]
        return list(with_special[: found[0]]) if found else []

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class QualityRow:
    """Texts written in one way.

    Attributes:
        decoding: the way, in words.
        num_calls: denoiser calls a text, a mean; None: it was not written by a denoiser.
        quality: what the texts are like.
    """

    decoding: str
    num_calls: float | None
    quality: TextQuality


@dataclass(frozen=True)
class QualityTable(ResultTable):
    """Texts written in several ways, judged from outside.

    Attributes:
        scorer: the judge's name.
        rows: one a way.
    """

    scorer: str
    rows: tuple[QualityRow, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        rows = [
            (
                row.decoding,
                "" if row.num_calls is None else f"{row.num_calls:.3g}",
                str(row.quality.perplexity),
                *(rounded(share.value) for share in row.quality.distinct),
            )
            for row in self.rows
        ]
        return [("decoding", "calls", f"perplexity ({self.scorer})", *(f"distinct-{n}" for n in _GRAMS)), *rows]


def _distinct(ids: Sequence[int], n: int) -> float:
    """Return the share of a text's n-grams, of which it has some, that are different (Li et al. 2016, "distinct-n")."""
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams)


def _mean(shares: Sequence[float], seed: int) -> Estimate:
    if not shares:
        return Estimate(math.nan, math.nan, math.nan)
    values = np.asarray(shares)
    return interval_of(values.mean(), values[resamples(len(values), seed)].mean(1))
