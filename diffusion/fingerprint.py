"""Which tokenizer a model was trained with, in sixteen letters: a head must not read another one's ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from diffusion.errors import ArgumentError


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a digest of which token has which id: equal for tokenizers that give every token the same id.

    How a text is split into tokens is not part of it: circuits and denoisers only see ids.

    Args:
        tokenizer: one of transformers, of tokenizers, of ours, or a table from tokens to ids.

    Raises:
        ArgumentError: it has no table from tokens to ids.
    """
    table = tokenizer
    if hasattr(tokenizer, "get_vocab"):
        table = tokenizer.get_vocab()
    if not isinstance(table, Mapping):
        raise ArgumentError(
            f"tokenizer: expected one with get_vocab(), or a table from tokens to ids, got {type(tokenizer).__name__}"
        )
    listed = sorted((int(id), str(token)) for token, id in table.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
