"""What the files beside a model say about its tokens: which ids exist, which are special, which end a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.denoisers.base import DenoiserSpec
from diffusion.denoisers.pretrained import Source
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.fingerprint import tokenizer_fingerprint
from diffusion.hub import CONFIG, read_json


def token_ids(folder: Path) -> dict[str, int]:
    """Return the id of every token in a folder's tokenizer files, special ones too; {} where there are none."""
    found: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            found |= vocabulary
        elif isinstance(vocabulary, list):
            found |= {str(entry[0]): id for id, entry in enumerate(vocabulary)}
        found |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    elif (folder / "vocab.json").is_file():
        found |= read_json(folder / "vocab.json")
        for name in ("added_tokens.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                found |= _added(read_json(folder / name))
    return found


def fingerprint_of(folder: Path) -> str | None:
    """Return the digest of a folder's tokenizer; None: it has none."""
    known = token_ids(folder)
    return tokenizer_fingerprint(known) if known else None


@dataclass(frozen=True)
class Specials:
    """Tokens of a family of models, for configs that do not name them.

    Attributes:
        masks: how the mask is written, in any of its models.
        mask_id: the mask, where the tokenizer does not say.
        ends: tokens besides the config's that end a text.
        end_ids: what ends a text where the tokenizer does not say.
        pad_id: what stands at padding where the config does not say; None: the first end, or else the mask.
    """

    masks: tuple[str, ...]
    mask_id: int
    ends: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    pad_id: int | None = None


def spec_of(source: Source, specials: Specials, *, vocab_size: int, max_length: int) -> DenoiserSpec:
    """Return the facts about a model; ids that its tokenizer does not know are never generated.

    Raises CheckpointError if a special id is none, or mask or padding lie outside the vocabulary.
    """
    known = token_ids(source.folder)
    mask_id = next((known[name] for name in specials.masks if name in known), specials.mask_id)
    ends = tuple(id for id in _ends(source, specials, known) if 0 <= id < vocab_size)
    pad_id = specials.pad_id if specials.pad_id is not None else next(iter(ends), mask_id)
    mask_id = source.number("mask_token_id", mask_id)
    unknown = set(range(vocab_size)) - set(known.values()) if known else set()
    try:
        return DenoiserSpec(
            vocab_size=vocab_size,
            mask_id=mask_id,
            eos_ids=ends,
            pad_id=source.number("pad_token_id", pad_id),
            forbidden_ids=tuple(sorted({mask_id, *unknown})),
            max_length=max_length,
        )
    except ArgumentError as error:
        raise CheckpointError(f"{source.folder / CONFIG}: {error}") from error


def _ends(source: Source, specials: Specials, known: dict[str, int]) -> list[int]:
    """Return the ids that end a text: those of the config, of ``generation_config.json``, and of the family."""
    generation = source.folder / "generation_config.json"
    listed: list[Any] = [source.config.get("eos_token_id")]
    if generation.is_file():
        listed.append(read_json(generation).get("eos_token_id"))
    ids = [id for entry in listed for id in (entry if isinstance(entry, list) else [entry]) if id is not None]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise CheckpointError(f"{source.folder / CONFIG}: eos_token_id: expected ids, got {ids!r:.80}")
    ids += [known[name] for name in specials.ends if name in known] or specials.end_ids
    return list(dict.fromkeys(ids))


def _added(content: dict[str, Any]) -> dict[str, int]:
    decoder = content.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {entry["content"]: int(id) for id, entry in decoder.items()}
    return {token: id for token, id in content.items() if isinstance(id, int) and not isinstance(id, bool)}
