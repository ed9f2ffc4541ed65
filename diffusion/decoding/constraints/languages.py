"""Constraints on text: functions that return automata over the tokens of a vocabulary. ``a & b`` is both."""

from __future__ import annotations

import functools
import operator
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from circuits.queries import Automaton, DeterministicAutomaton
from diffusion.decoding.constraints import _pattern
from diffusion.decoding.constraints._languages import avoiding, containing, matching
from diffusion.decoding.constraints.vocabulary import Vocabulary, vocabulary
from diffusion.errors import ArgumentError


def regex(pattern: str, tokenizer: Any) -> DeterministicAutomaton:
    r"""Return the constraint that the whole text matches a regular expression.

    The text is what is decoded from the tokens up to the first end of text, or up to the end of the canvas. Known are
    literals, ``.`` (all but the line feed), sets ``[a-z]`` and ``[^a-z]``, ``\d \w \s \D \W \S`` (of ASCII), escapes,
    groups, ``|``, and the quantifiers ``* + ? {m} {m,} {,n} {m,n}``. ``.*word.*`` finds a word anywhere in a line.

    Args:
        pattern: in Python's syntax.
        tokenizer: whose tokens are written, see :func:`~diffusion.decoding.constraints.vocabulary.vocabulary`.

    Raises:
        ArgumentError: the pattern is malformed, too large, or uses what is not regular; the tokenizer cannot be read.
    """
    return vocabulary(tokenizer).lift(matching(_pattern.parse(pattern)))


def keywords(words: Sequence[str], tokenizer: Any) -> DeterministicAutomaton:
    """Return the constraint that every one of some words occurs in the text, anywhere, in any order.

    Args:
        words: the texts that must occur, perhaps overlapping; letter case counts.
        tokenizer: whose tokens are written.

    Raises:
        ArgumentError: no word, or an empty one.
    """
    languages = [containing(word) for word in _texts("words", words)]
    return vocabulary(tokenizer).lift(functools.reduce(operator.and_, languages))


def template(text: str, tokenizer: Any, **holes: str | int) -> DeterministicAutomaton:
    """Return the constraint that the text is a template with its holes filled in.

    Args:
        text: as for ``str.format``: ``"The capital of {country} is {}."``; ``{{`` is a brace. ``{}`` is any text of at
            least one character within a line.
        tokenizer: whose tokens are written.
        **holes: what fills a named hole: a regular expression, or a number of characters.

    Raises:
        ArgumentError: a malformed template, or holes that it does not name, or lacks.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"text: expected a template with holes like {{name}}, got {text!r}: {error}") from error
    named = {name for _, name, _, _ in parts if name}
    if named != set(holes):
        raise ArgumentError(f"holes: expected one for each of {sorted(named)}, got {sorted(holes)}")
    pieces: list[_pattern.Pattern] = []
    for literal, name, specification, conversion in parts:
        if specification or conversion:
            raise ArgumentError(f"text: expected holes {{}} or {{name}}, got one with a format in {text!r}")
        pieces.append(_pattern.text(literal))
        if name is not None:
            pieces.append(_hole(name, holes[name]) if name else _pattern.Repeat(_pattern.ANY, 1, None))
    return vocabulary(tokenizer).lift(matching(_pattern.Sequence(tuple(pieces))))


def _hole(name: str, filling: str | int) -> _pattern.Pattern:
    if isinstance(filling, int) and not isinstance(filling, bool) and filling >= 0:
        return _pattern.Repeat(_pattern.ANY, filling, filling)
    if not isinstance(filling, str):
        raise ArgumentError(f"{name}: expected a regular expression or a number of characters, got {filling!r}")
    return _pattern.parse(filling)


def forbid(what: Sequence[int | str], tokenizer: Any) -> DeterministicAutomaton:
    """Return the constraint that some tokens are never written, and some texts never occur.

    Args:
        what: ids of tokens; and texts, however they are cut into tokens.
        tokenizer: whose tokens are written.

    Raises:
        ArgumentError: nothing is forbidden, an id is out of range, or a text is empty.
    """
    known = vocabulary(tokenizer)
    ids = [item for item in what if not isinstance(item, str)]
    texts = [item for item in what if isinstance(item, str)]
    if not ids and not texts:
        raise ArgumentError("what: expected ids of tokens or texts, got none")
    _check_ids("what", ids, known)
    kept = torch.zeros(1, len(known.texts), dtype=torch.int64)
    kept[0, torch.tensor(ids, dtype=torch.int64)] = -1
    parts = [any_tokens(known), DeterministicAutomaton.from_table(kept, [0])]
    if texts:
        parts.append(known.lift(functools.reduce(operator.and_, map(avoiding, _texts("what", texts)))))
    return functools.reduce(operator.and_, parts)


def any_tokens(tokenizer: Any) -> DeterministicAutomaton:
    """Return the constraint of all texts: tokens that write text, then perhaps the end of it."""
    return vocabulary(tokenizer).lift(DeterministicAutomaton.from_table(torch.zeros(1, 256, dtype=torch.int64), [0]))


def force(tokens: Mapping[int, int | str], tokenizer: Any) -> DeterministicAutomaton:
    """Return the constraint that given positions hold given tokens.

    Args:
        tokens: by position, counted from the first that is generated: the id of a token, or a text that some tokens
            write alone, of which any will do.
        tokenizer: whose tokens are written.

    Raises:
        ArgumentError: no position, a negative one, an id out of range, or a text that no token writes.
    """
    known = vocabulary(tokenizer)
    if not tokens or any(not isinstance(position, int) or position < 0 for position in tokens):
        raise ArgumentError(f"tokens: expected positions from 0 on with their tokens, got {dict(tokens)}")
    num_free = max(tokens) + 1
    table = torch.arange(1, num_free + 2).clamp_max(num_free).unsqueeze(1).repeat(1, len(known.texts))
    for position, token in tokens.items():
        ids = known.ids_of(token) if isinstance(token, str) else [token]
        if not ids:
            raise ArgumentError(f"tokens: expected a text that is one token at position {position}, got {token!r}")
        _check_ids("tokens", ids, known)
        row = torch.full_like(table[0], -1)
        row[torch.tensor(ids)] = position + 1
        table[position] = row
    return DeterministicAutomaton.from_table(table, [num_free]) & any_tokens(known)


def length(least: int, most: int | None, tokenizer: Any) -> DeterministicAutomaton:
    """Return the constraint on the number of tokens before the end of the text.

    Args:
        least: at least so many.
        most: at most so many; None: any number.
        tokenizer: whose end-of-text tokens end the text.

    Raises:
        ArgumentError: not 0 <= least <= most.
    """
    if not isinstance(least, int) or least < 0 or (most is not None and (not isinstance(most, int) or most < least)):
        raise ArgumentError(f"least, most: expected 0 <= least <= most, got {least!r} and {most!r}")
    known = vocabulary(tokenizer)
    num_states = (least if most is None else most) + 1
    following = torch.arange(1, num_states + 1)
    following[-1] = num_states - 1 if most is None else -1
    table = torch.where(known.is_text, following.unsqueeze(1), -1)
    return known.ended(DeterministicAutomaton.from_table(table, range(least, num_states)))


def automaton(given: Automaton | DeterministicAutomaton, tokenizer: Any = None) -> DeterministicAutomaton:
    """Return an automaton of your own over token ids as a constraint.

    Args:
        given: its weights are 0 or -inf; it is determinised.
        tokenizer: then the automaton reads the tokens before the end of the text; None: it reads all up to the end of
            the canvas, and has to accept end-of-text tokens and the padding after them itself.

    Raises:
        ArgumentError: it is no automaton, or has other weights.
    """
    if isinstance(given, Automaton):
        given = _determinized(given)
    if not isinstance(given, DeterministicAutomaton):
        raise ArgumentError(f"given: expected an automaton of ct.queries, got {type(given).__name__}")
    return given if tokenizer is None else vocabulary(tokenizer).ended(given)


def _determinized(given: Automaton) -> DeterministicAutomaton:
    """The subset construction."""
    if any(bool(((weights != 0) & (weights > -torch.inf)).any()) for weights in vars(given).values()):
        raise ArgumentError("given: expected log-weights 0 or -inf, got others; give ct.ConstrainedDistribution those")
    columns, classes = torch.unique(given.log_transition.transpose(0, 1) > -torch.inf, dim=0, return_inverse=True)
    start, accept = given.log_start > -torch.inf, given.log_accept > -torch.inf
    number, waiting, rows = {tuple(start.tolist()): 0}, [start], []
    while waiting:
        subset = waiting.pop(0)
        row = []
        for column in columns:  # (S, S)
            reached = column[subset].any(0)
            if not bool(reached.any()):
                row.append(-1)
                continue
            key = tuple(reached.tolist())
            if key not in number:
                number[key] = len(number)
                waiting.append(reached)
            row.append(number[key])
        rows.append(row)
    accepting = torch.tensor([bool((torch.tensor(key) & accept.cpu()).any()) for key in number])
    return DeterministicAutomaton(classes.cpu(), torch.tensor(rows), accepting).minimized()


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not texts or any(not isinstance(text, str) or not text for text in texts):
        raise ArgumentError(f"{name}: expected a sequence of texts that are not empty, got {texts!r}")
    return list(texts)


def _check_ids(name: str, ids: Sequence[int], known: Vocabulary) -> None:
    for id in ids:
        if not isinstance(id, int) or not 0 <= id < len(known.texts):
            raise ArgumentError(f"{name}: expected ids from 0 to {len(known.texts) - 1}, got {id!r}")
