"""What a folder was made from, known by its content: the text and the tokenizer, whose hashes its recipe.json has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.files import file_hash
from circuits.reading import damaged, short
from diffusion.app.recipe import Recipe, recipe_content
from diffusion.errors import ArgumentError, CheckpointError, CorpusError
from diffusion.text.corpus import Corpus, load_corpus
from diffusion.text.tokenizer import TextTokenizer

MOST_UNKNOWN = 0.5
"""The largest share of unknown characters in a text that a tokenizer is for."""


def read_digests(folder: Path) -> dict[str, str]:
    """Return the hashes in a folder's recipe.json, by name; none where it has none or was written before they were."""
    path = folder / "recipe.json"
    if not path.exists():
        return {}
    digests = recipe_content(path).get("digests", {})
    if not isinstance(digests, dict):
        raise CheckpointError(
            f"{path}: digests: expected hashes by name, got {short(digests)}; delete the folder and start again"
        )
    return digests


def corpus_of(recipe: Recipe) -> Corpus:
    """Load the text that a recipe names, whatever it is now; raises CorpusError if it cannot be read."""
    return load_corpus(recipe.text.corpus, field=recipe.text.field, seed=recipe.seed)


def check_corpus(folder: Path, corpus: Corpus) -> None:
    """Raise CorpusError unless the text is the one that a folder was made from, or the folder does not say."""
    if read_digests(folder).get("corpus", corpus.digest) != corpus.digest:
        hint = " (it comes with Python, and changes with its version)" if corpus.name == "embedded" else ""
        raise CorpusError(
            f"corpus: expected the text that {folder} was made from, got other documents in {corpus.name}{hint}; "
            "restore it, or choose another --out"
        )


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load a folder's tokenizer; raises CheckpointError if it is not there, or not as it was written."""
    path = folder / "tokenizer.json"
    tokenizer = TextTokenizer.load(path)
    found = file_hash(path)
    if read_digests(folder).get("tokenizer", found) != found:
        raise damaged(path, way_out=f"delete {folder} and train again")
    return tokenizer


def encoded_corpus(folder: Path, documents: Sequence[str], tokenizer: TextTokenizer) -> list[list[int]]:
    """Return the documents' tokens; raises CorpusError if the tokenizer does not know most of them."""
    encoded = tokenizer.encode_documents(documents)
    if _share_unknown(encoded, tokenizer) > MOST_UNKNOWN:
        raise CorpusError(
            f"corpus: expected text that the tokenizer of {folder} knows, got one that mostly became <unk>; take the "
            "text that it was trained on, or choose another --out"
        )
    return encoded


def encoded_prompts(name: str, prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the prompts' tokens; raises ArgumentError if the tokenizer does not know most of one."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if _share_unknown([ids], tokenizer) > MOST_UNKNOWN:
            raise ArgumentError(
                f"prompt: expected characters of the text that {name} was made from, got {prompt!r:.80}, most of "
                "which became <unk>; write others, or train on a text that has them"
            )
    return encoded


def _share_unknown(encoded: Sequence[Sequence[int]], tokenizer: Any) -> float:
    unknown = 0 if tokenizer.unk_id is None else sum(ids.count(tokenizer.unk_id) for ids in encoded)
    return unknown / max(1, sum(map(len, encoded)))
