"""Tokenizers of pretrained models, from ``tokenizer.json`` or the older files, and their chat templates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.files import replace_file
from circuits.reading import read_text, unreadable
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.fingerprint import tokenizer_fingerprint
from diffusion.hub import CONFIG, SMALL_FILES, fetch, read_json, require
from diffusion.text.chat import ChatTemplate
from diffusion.text.tokenizer import FILE_NAME, TextTokenizer, byte_alphabet, tokenizer_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MASKS = ("<|mdm_mask|>", "<[MASK]>", "<|mask|>", "<|MASK|>", "[MASK]", "<mask>")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits a text before it merges bytes."""
_OVER_GPT2 = ("mdlm", "bd3lm")
"""Model types whose repositories have no tokenizer: theirs is GPT-2's, and a mask."""


class HubTokenizer:
    """Text to the token ids of a pretrained model and back, with the members of ``TextTokenizer``; made by
    :func:`load_tokenizer`.

    Attributes:
        vocab_size: the largest id and 1; the model's rows of logits may be more.
        mask_id: the mask, None if there is none.
        pad_id: padding, None if there is none.
        eos_id: what ends a text, None if nothing does.
        unk_id: unknown tokens, None if all texts are known.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, config: Mapping[str, Any], settings: Mapping[str, Any], chat: ChatTemplate | None
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._table: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._table.values()) + 1
        self.mask_id = self._special("mask", config, settings)
        if self.mask_id is None:
            self.mask_id = next((self._table[name] for name in _MASKS if name in self._table), None)
        self.eos_id = self._special("eos", config, settings)
        pad_id = self._special("pad", config, settings)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        unknown = getattr(tokenizer.model, "unk_token", None)
        self.unk_id = self._table.get(unknown) if isinstance(unknown, str) else None

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids that are no text and must never be generated: mask, unknown, and padding that is no end of text."""
        pad_id = None if self.pad_id == self.eos_id else self.pad_id
        return tuple(id for id in (pad_id, self.mask_id, self.unk_id) if id is not None)

    @property
    def fingerprint(self) -> str:
        """A digest of which token has which id, see :func:`~diffusion.fingerprint.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self._table)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""
        return dict(self._table)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text, nothing before it and nothing after it.

        Args:
            text: any text.
            special: whether the names of special tokens in it are those tokens. By default they are text.
        """
        self._tokenizer.encode_special_tokens = not special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, documents: Iterable[str]) -> list[list[int]]:
        """Return the token ids of many texts, encoded in parallel; nothing becomes a special token."""
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of token ids; special tokens are dropped, or with ``keep_special`` written by their names.

        Raises ArgumentError if an id is outside the vocabulary.
        """
        ids = [int(id) for id in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ArgumentError(
                f"ids: expected 0..{self.vocab_size - 1}, got {min(ids)} to {max(ids)}; mask the others"
            )
        return str(self._tokenizer.decode(ids, skip_special_tokens=not keep_special))

    def token_bytes(self) -> list[bytes | None]:
        """Return what every token writes, in bytes of UTF-8; None for special tokens, which write nothing.

        Raises ArgumentError if that depends on a token's neighbours, as with word pieces of several letters.
        """
        import json

        content = json.loads(self._tokenizer.to_str())
        kinds = _kinds(content["decoder"])
        special = {token["id"] for token in content["added_tokens"] if token["special"]}
        added = {token["content"] for token in content["added_tokens"]}
        words = {token: id for token, id in self._table.items() if id not in special}
        if "WordPiece" in kinds and any(len(token) > 1 for token in words):
            raise ArgumentError(
                "tokenizer: expected tokens that write the same bytes everywhere, got word pieces; use a model with "
                "byte-level tokens where bytes matter"
            )
        alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        texts: list[bytes | None] = [None] * self.vocab_size
        for token, id in words.items():
            if alphabet is not None and token not in added:
                texts[id] = bytes(alphabet[c] for c in token)
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
                texts[id] = bytes([int(token[3:5], 16)])
            else:
                texts[id] = (token.replace("▁", " ") if kinds & {"Metaspace", "Replace"} else token).encode()
        return texts

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's template writes it, to be encoded with ``special=True``.

        Args:
            messages: each with ``role`` ("system", "user", "assistant") and ``content``.
            add_generation_prompt: whether what opens the model's answer follows.

        Raises:
            ArgumentError: there is no template, or it refuses these messages.
        """
        if self._chat is None:
            raise ArgumentError("tokenizer: expected one with a chat template, got none; write plain text")
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON, to this file or, if ``path`` is not named ``*.json``, into this folder."""
        with replace_file(tokenizer_file(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def _special(self, name: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
        """Return a special id: that of the model's config, or that of the token that the tokenizer's settings name."""
        found = config.get(f"{name}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return self._table.get(token) if isinstance(token, str) else None


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None
) -> HubTokenizer | TextTokenizer:
    """Load the tokenizer of a model, from a local folder or from the Hugging Face hub. Nothing in it is executed.

    ``tokenizer.json`` is read without the package transformers, and so are the byte pairs of ``vocab.json`` and
    ``merges.txt``; other forms need it. MDLM and BD3-LM come without one and get GPT-2's, with a mask.

    Args:
        name_or_path: a folder, or the name of a repository.
        revision: branch, tag or commit of the repository.

    Raises:
        ArgumentError: there is no such folder or repository.
        CheckpointError: there is no tokenizer, or it is corrupt.
    """
    folder = fetch(name_or_path, SMALL_FILES, revision=revision)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("format") == "unfactor-transformer":
        return TextTokenizer.load(folder)
    kind = str(config.get("model_type", "")).lower()
    tokenizer = _read(folder, kind)
    if tokenizer is None and kind in _OVER_GPT2:
        tokenizer = _read(fetch("openai-community/gpt2", SMALL_FILES), kind)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: expected {FILE_NAME}, or vocab.json and merges.txt, got none; copy it there")
    if kind in _OVER_GPT2 and config.get("vocab_size") == tokenizer.get_vocab_size() + 1:
        tokenizer.add_special_tokens(["[MASK]"])
    settings = _settings(folder)
    return HubTokenizer(tokenizer, config=config, settings=settings, chat=ChatTemplate.of(folder, settings))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _read(folder: Path, kind: str) -> Tokenizer | None:
    from tokenizers import Tokenizer, models

    try:
        if (folder / FILE_NAME).is_file():
            tokenizer = Tokenizer.from_str(read_text(folder / FILE_NAME))
            pieces = isinstance(tokenizer.model, models.WordPiece)
            return (_letters(tokenizer.get_vocab()) if pieces else None) or tokenizer
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _byte_pairs(folder, kind)
        if (folder / "vocab.txt").is_file():
            lines = read_text(folder / "vocab.txt").splitlines()
            letters = _letters({token: id for id, token in enumerate(lines)})
            return _by_transformers(folder) if letters is None else letters
        if any((folder / name).is_file() for name in ("spiece.model", "sentencepiece.bpe.model")):
            return _by_transformers(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise nothing more specific
        raise unreadable(folder, error, way_out="download the tokenizer again") from error
    return None


def _byte_pairs(folder: Path, kind: str) -> Tokenizer:
    """Return the byte pairs of GPT-2, or those of Qwen2 that Dream has, whose words are split in another way."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "dream":
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    listed = _settings(folder).get("added_tokens_decoder") or {}
    added = {int(id): AddedToken(token["content"], special=bool(token["special"])) for id, token in listed.items()}
    if (folder / "added_tokens.json").is_file():
        others = read_json(folder / "added_tokens.json").items()
        added = {id: AddedToken(token, special=True) for token, id in others} | added
    for id in sorted(added):
        tokenizer.add_tokens([added[id]])
        if tokenizer.token_to_id(added[id].content) != id:
            raise CheckpointError(f"{folder}: {added[id].content}: expected the id {id}, got that of another token")
    return tokenizer


def _letters(vocabulary: dict[str, int]) -> Tokenizer | None:
    """Return a tokenizer of single letters, spaces between them or not, as of proteins; None: tokens are longer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    special = [token for token in vocabulary if len(token) > 1]
    if not all(token[0] + token[-1] in ("[]", "<>") for token in special):
        return None
    unknown = next((token for token in special if token[1:-1].lower() == "unk"), None)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown, fuse_unk=False))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), "")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _by_transformers(folder: Path) -> Tokenizer:
    loaded = require("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: expected a tokenizer with a {FILE_NAME}, got {type(loaded).__name__}")
    return tokenizer


def _kinds(part: Any) -> set[str]:
    """Return the types of a tokenizer's part and of all parts in it."""
    if isinstance(part, list):
        return set().union(*map(_kinds, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_kinds, part.values()))
