"""What the tokens of a vocabulary write, in bytes, and automata over texts lifted to automata over its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.queries import DeterministicAutomaton
from diffusion.errors import ArgumentError
from diffusion.text.tokenizer import byte_alphabet

_MAX_TABLE = 1 << 24
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer as bytes of text, and which of them end it.

    Attributes:
        texts: what each of the V tokens writes; None: it never is part of a text (padding, mask, unknown).
        eos_ids: the tokens that end a text; nothing but these and ``pad_id`` may follow.
        pad_id: what stands after the end of a text; None: ``eos_ids`` alone.

    Raises:
        ArgumentError: there is no token, or an id is out of range.
    """

    texts: tuple[bytes | None, ...]
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        ids = (*self.eos_ids, *(() if self.pad_id is None else (self.pad_id,)))
        if all(text is None for text in self.texts):
            raise ArgumentError(f"texts: expected a token that writes text, got {len(self.texts)} tokens without any")
        if any(not 0 <= id < len(self.texts) for id in ids):
            raise ArgumentError(f"eos_ids, pad_id: expected ids below the {len(self.texts)} tokens, got {ids}")

    def ids_of(self, text: str) -> list[int]:
        """Return the tokens that write exactly this text."""
        content = text.encode()
        return [id for id, written in enumerate(self.texts) if written == content]

    @property
    def is_text(self) -> Tensor:
        """Which tokens write text and do not end it, bool (V,)."""
        return torch.tensor([text is not None and id not in self.eos_ids for id, text in enumerate(self.texts)])

    def lift(self, language: DeterministicAutomaton) -> DeterministicAutomaton:
        """Return the automaton over tokens of the texts in a language over bytes; see :meth:`ended`."""
        is_text = self.is_text
        contents = [text for text, used in zip(self.texts, is_text.tolist(), strict=True) if used and text is not None]
        classes, members = _told_apart(language, contents)
        table = _after_texts(language, [contents[i] for i in members])
        no_text = torch.full((len(table), 1), -1)
        all_classes = torch.full((len(self.texts),), table.shape[1]).masked_scatter(is_text, classes)
        table = torch.cat([table, no_text], 1)
        return self.ended(DeterministicAutomaton(all_classes, table, language.accepting, language.start))

    def ended(self, automaton: DeterministicAutomaton) -> DeterministicAutomaton:
        """Return the automaton of sequences whose text, before its end, another automaton accepts.

        The text is what stands before the first end-of-text token, or all where there is none. Nothing but end-of-text
        tokens and padding may follow it.
        """
        can_end = automaton.accepting.unsqueeze(1).expand(-1, len(self.eos_ids))
        return with_end(automaton, can_end, self.eos_ids, self.pad_id)


def with_end(
    automaton: DeterministicAutomaton,
    can_end: Tensor,  # shape: (S, n)
    eos_ids: Sequence[int],
    pad_id: int | None,
) -> DeterministicAutomaton:
    """Return an automaton with one more state, after the end: there nothing but end-of-text tokens and padding follow.

    Args:
        automaton: over tokens; what it does with the ``eos_ids`` does not matter.
        can_end: bool (S, n), in which of its states each end-of-text token may come.
        eos_ids: n tokens.
        pad_id: the padding; None: there is none.
    """
    num_states, num_classes = automaton.transition.shape
    ids = list(dict.fromkeys((*eos_ids, *(() if pad_id is None else (pad_id,)))))
    classes = automaton.classes.clone()
    before = automaton.transition[:, classes[ids]]
    before[:, : can_end.shape[1]] = torch.where(can_end, num_states, -1)
    classes[ids] = torch.arange(num_classes, num_classes + len(ids), device=classes.device)
    after = torch.full_like(before[:1], num_states)
    nothing = torch.full_like(automaton.transition[:1], -1)
    transition = torch.cat([torch.cat([automaton.transition, before], 1), torch.cat([nothing, after], 1)])
    accepting = torch.nn.functional.pad(automaton.accepting, (0, 1), value=True)
    return DeterministicAutomaton(classes, transition, accepting, automaton.start).minimized()


def vocabulary(
    tokenizer: Any, *, vocab_size: int | None = None, eos_ids: Sequence[int] | None = None, pad_id: int | None = None
) -> Vocabulary:
    """Read the vocabulary of a tokenizer.

    Args:
        tokenizer: a :class:`~diffusion.text.tokenizer.TextTokenizer`; a Hugging Face tokenizer with byte-level or
            SentencePiece tokens; any object with a method ``token_bytes()``; or a vocabulary, which comes back as it is
            but for what is given here.
        vocab_size: V of the denoiser, where it is larger than the tokenizer's; the tokens beyond are no text.
        eos_ids: by default the tokenizer's end-of-text token.
        pad_id: by default the tokenizer's.

    Raises:
        ArgumentError: the tokenizer's tokens cannot be read, or ``vocab_size`` is too small.
    """
    if isinstance(tokenizer, Vocabulary):
        own = tokenizer
    else:
        own = Vocabulary(tuple(token_texts(tokenizer)), _eos_of(tokenizer), _id_of(tokenizer, "pad"))
    size = len(own.texts) if vocab_size is None else vocab_size
    if size < len(own.texts):
        raise ArgumentError(f"vocab_size: expected at least the tokenizer's {len(own.texts)} tokens, got {vocab_size}")
    return Vocabulary(
        (*own.texts, *[None] * (size - len(own.texts))),
        own.eos_ids if eos_ids is None else tuple(eos_ids),
        own.pad_id if pad_id is None else pad_id,
    )


def token_texts(tokenizer: Any) -> list[bytes | None]:
    """Return what every token of a tokenizer writes, None for those that are no text.

    Args:
        tokenizer: has ``token_bytes()``; or, like Hugging Face's, ``convert_ids_to_tokens``, ``all_special_ids`` and a
            length, with tokens in the alphabet of byte-level tokenizers, or in SentencePiece's.

    Raises:
        ArgumentError: neither.
    """
    if hasattr(tokenizer, "token_bytes"):
        return list(tokenizer.token_bytes())
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ArgumentError(
            f"tokenizer: expected one with token_bytes(), or Hugging Face's convert_ids_to_tokens, got "
            f"{type(tokenizer).__name__}; give a Vocabulary with the text of every token"
        )
    pieces = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    special = set(tokenizer.all_special_ids)
    added = {id: str(token) for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    alphabet = byte_alphabet()
    if set(alphabet) <= set(pieces):
        read = lambda piece: bytes(alphabet[c] for c in piece)  # noqa: E731
    elif any("\u2581" in piece for piece in pieces if piece):
        read = _sentence_piece
    else:
        raise ArgumentError(
            "tokenizer: expected byte-level or SentencePiece tokens, whose texts join without a change, got others; "
            "give a Vocabulary with the text of every token"
        )
    texts: list[bytes | None] = []
    for id, piece in enumerate(pieces):
        is_text = piece is not None and id not in special
        texts.append(None if not is_text else added[id].encode() if id in added else read(piece))
    return texts


def _sentence_piece(piece: str) -> bytes:
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


def _id_of(tokenizer: Any, kind: str) -> int | None:
    found = getattr(tokenizer, f"{kind}_id", None)
    return getattr(tokenizer, f"{kind}_token_id", None) if found is None else found


def _eos_of(tokenizer: Any) -> tuple[int, ...]:
    found = _id_of(tokenizer, "eos")
    return () if found is None else (found,)


def _told_apart(language: DeterministicAutomaton, contents: Sequence[bytes]) -> tuple[Tensor, list[int]]:
    """Return the class of every text, those that lead alike from every state, and a member of every class."""
    classes = torch.zeros(len(contents), dtype=torch.int64)
    for states in torch.arange(language.num_states).split(max(1, _MAX_TABLE // len(contents))):
        for row in _after_texts(language, contents, states):
            classes = torch.unique(classes * (language.num_states + 1) + row + 1, return_inverse=True)[1]
    members = torch.zeros(int(classes.max()) + 1, dtype=torch.int64)
    members[classes] = torch.arange(len(contents))
    return classes, members.tolist()


def _after_texts(
    language: DeterministicAutomaton, contents: Sequence[bytes], states: Tensor | None = None
) -> Tensor:  # shape: (states, texts)
    """Return the states in which a language is after each text, from each of some states; -1: rejected."""
    states = torch.arange(language.num_states) if states is None else states
    by_byte = language.transition[:, language.classes]  # (S, 256)
    table = torch.cat([by_byte, torch.full_like(by_byte[:1], -1)])  # row -1 is the last: once rejected, always
    longest_first = sorted(range(len(contents)), key=lambda i: -len(contents[i]))
    lengths = torch.tensor([len(contents[i]) for i in longest_first])
    reached = states.unsqueeze(1).repeat(1, len(contents))
    for position in range(int(lengths[0])):
        num_open = int((lengths > position).sum())
        column = torch.tensor([contents[i][position] for i in longest_first[:num_open]])
        reached[:, :num_open] = table[reached[:, :num_open], column]
    return reached[:, torch.tensor(longest_first).argsort()]
