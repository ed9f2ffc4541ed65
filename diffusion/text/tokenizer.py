"""Tokenizers for training from scratch: characters, or byte-level byte-pair encoding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from circuits.files import replace_file
from circuits.reading import read_text, unreadable
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.fingerprint import tokenizer_fingerprint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenizerKind = Literal["characters", "bpe"]
PAD, MASK, EOS, UNK = "<pad>", "<mask>", "<eos>", "<unk>"
DEFAULT_BPE_VOCABULARY = 1024
FILE_NAME = "tokenizer.json"


class TextTokenizer:
    """Text to token ids and back, with ids for padding, masking, end of text and, if any, unknown characters.

    Made by ``train_tokenizer`` or ``TextTokenizer.load``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A document may well contain the characters "<mask>": they are text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id = self._id_of(PAD)
        self.mask_id = self._id_of(MASK)
        self.eos_id = self._id_of(EOS)
        self.unk_id: int | None = tokenizer.token_to_id(UNK)

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids that are no text and must never be generated: padding, mask, unknown."""
        return tuple(id for id in (self.pad_id, self.mask_id, self.unk_id) if id is not None)

    @property
    def fingerprint(self) -> str:
        """A digest of which token has which id, see :func:`~diffusion.fingerprint.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; unknown characters become ``unk_id``, nothing becomes a special token.

        Raises ArgumentError if it is no text, but holds half of a surrogate pair.
        """
        return list(self._tokenizer.encode(_checked_text(text), add_special_tokens=False).ids)

    def encode_documents(self, documents: Iterable[str]) -> list[list[int]]:
        """Return the token ids of many texts, encoded in parallel."""
        encodings = self._tokenizer.encode_batch_fast(list(map(_checked_text, documents)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of token ids; special tokens are dropped, or with ``keep_special`` written like ``<mask>``.

        Raises ArgumentError if an id is outside the vocabulary.
        """
        ids = [int(id) for id in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ArgumentError(f"ids: expected 0 to {self.vocab_size - 1}, got {min(ids)} to {max(ids)}")
        return str(self._tokenizer.decode(ids, skip_special_tokens=not keep_special))

    def token_bytes(self) -> list[bytes | None]:
        """Return what every token writes, in bytes of UTF-8; None for the special tokens, which write nothing."""
        from tokenizers import decoders

        alphabet = byte_alphabet() if isinstance(self._tokenizer.decoder, decoders.ByteLevel) else None
        special = {self.pad_id, self.mask_id, self.eos_id, self.unk_id}
        texts: list[bytes | None] = [None] * self.vocab_size
        for token, id in self._tokenizer.get_vocab().items():
            if id not in special:
                texts[id] = token.encode() if alphabet is None else bytes(alphabet[c] for c in token)
        return texts

    def get_vocab(self) -> dict[str, int]:
        """Return the table from tokens, as the tokenizer writes them, to their ids."""
        return dict(self._tokenizer.get_vocab())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON, to this file or, if ``path`` is not named ``*.json``, into this folder."""
        with replace_file(tokenizer_file(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Read what ``save`` wrote; raises CheckpointError if it is missing, corrupt, or lacks the special tokens."""
        from tokenizers import Tokenizer

        file = tokenizer_file(path)
        try:
            content = read_text(file)
        except (OSError, ValueError) as error:
            raise unreadable(file, error, way_out="save the tokenizer again") from error
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(
                f"{file}: expected a tokenizer, got something else: {error}; save it again"
            ) from error
        unknown = getattr(tokenizer.model, "unk_token", None)
        if unknown is not None and tokenizer.model.token_to_id(unknown) is None:  # else encoding would fail one day
            raise CheckpointError(f"{file}: unk_token: expected a token of the model, got {unknown!r}; save it again")
        return cls(tokenizer)

    def _id_of(self, token: str) -> int:
        id: int | None = self._tokenizer.token_to_id(token)
        if id is None:
            raise CheckpointError(f"tokenizer: expected a token {token}, got none; train it with train_tokenizer")
        return id


def is_text(text: str) -> bool:
    """Whether a string is Unicode text, which UTF-8 can write: JSON and undecoded bytes may bring half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_text(text: str) -> str:
    if not is_text(text):
        raise ArgumentError(f"text: expected Unicode text, got half of a surrogate pair in {text!r:.80}; leave it out")
    return text


def byte_alphabet() -> dict[str, int]:
    """Return the printable character that byte-level tokenizers write for every byte (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def train_tokenizer(
    documents: Iterable[str], *, kind: TokenizerKind = "characters", vocab_size: int | None = None
) -> TextTokenizer:
    """Build a tokenizer for these documents.

    Args:
        documents: the training text.
        kind: ``characters``, one token per character; or ``bpe``, byte-pair encoding of UTF-8 bytes, which knows every
            text and writes numbers digit by digit.
        vocab_size: number of tokens with the special ones. Of characters the most frequent are kept, by default all.
            For ``bpe`` an upper limit, by default 1,024.

    Raises:
        ArgumentError: the documents are empty, ``kind`` is unknown, or ``vocab_size`` too small.
    """
    if kind not in get_args(TokenizerKind):
        raise ArgumentError(f"kind: expected one of {', '.join(get_args(TokenizerKind))}, got {kind!r}")
    documents = list(documents)
    if not any(documents):
        raise ArgumentError("documents: expected some text, got none")
    for document in documents:
        _checked_text(document)
    if kind == "characters":
        return TextTokenizer(_character_tokenizer(documents, vocab_size))
    return TextTokenizer(_byte_pair_tokenizer(documents, DEFAULT_BPE_VOCABULARY if vocab_size is None else vocab_size))


def _character_tokenizer(documents: Sequence[str], vocab_size: int | None) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    special = [PAD, MASK, EOS, UNK]
    if vocab_size is not None and vocab_size <= len(special):
        raise ArgumentError(f"vocab_size: expected more than the {len(special)} special tokens, got {vocab_size}")
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(by_frequency[: None if vocab_size is None else vocab_size - len(special)])
    vocabulary = {token: id for id, token in enumerate([*special, *kept])}
    # byte-pair encoding without a single merge leaves every character alone
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK, fuse_unk=False))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_pair_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, MASK, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise ArgumentError(
            f"vocab_size: expected at least {smallest}, all bytes and the special tokens, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    # Digit by digit, so that the parts of a number keep their places and arithmetic can be learnt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that a tokenizer is saved as: ``path``, or ``tokenizer.json`` in the folder ``path``."""
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE_NAME
