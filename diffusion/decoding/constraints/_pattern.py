"""A parser of regular expressions: the part of Python's syntax that describes regular languages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffusion.decoding.constraints._characters import LAST, Range, complement, merged
from diffusion.errors import ArgumentError


@dataclass(frozen=True)
class Characters:
    """One character out of a set."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Sequence:
    """One part after the other; without parts the empty text."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True)
class Choice:
    """Any of several alternatives."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True)
class Repeat:
    """A part several times in a row."""

    part: Pattern
    least: int
    most: int | None


Pattern = Characters | Sequence | Choice | Repeat

_DIGIT = ((ord("0"), ord("9")),)
_WORD = (*_DIGIT, (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z")))
_SPACE = ((9, 13), (32, 32))
_SETS = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_HEX = {"x": 2, "u": 4, "U": 8}
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
ANY = Characters(complement([(10, 10)]))
"""What ``.`` matches: every character but the line feed."""


def text(literal: str) -> Sequence:
    """Return the pattern of exactly this text."""
    return Sequence(tuple(Characters(((ord(c), ord(c)),)) for c in literal))


def parse(pattern: str) -> Pattern:
    """Parse a regular expression; raises ArgumentError for what is malformed, not regular, or an anchor."""
    if not isinstance(pattern, str):
        raise ArgumentError(f"pattern: expected a string, got {type(pattern).__name__}")
    parser = _Parser(pattern)
    parsed = parser.choice()
    if parser.position < len(pattern):
        raise parser.error("expected no ')' without its '('")
    return parsed


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.position = 0

    def error(self, what: str) -> ArgumentError:
        return ArgumentError(f"pattern: {what}, got {self.pattern!r} at position {self.position}")

    def choice(self) -> Pattern:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def sequence(self) -> Pattern:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def repeated(self) -> Pattern:
        if self.count() is not None:
            raise self.error("expected something to repeat before a quantifier")
        part = self.atom()
        start = self.position
        count = self.count(consume=True)
        if count is None:
            return part
        self.take("?")  # a lazy quantifier matches the same texts
        if self.peek() == "+" or self.count() is not None:
            raise self.error("expected one quantifier at a time; use a group (?:...)")
        least, most = count
        if most is not None and most < least:
            self.position = start
            raise self.error("expected {m,n} with m <= n")
        return Repeat(part, least, most)

    def count(self, *, consume: bool = False) -> tuple[int, int | None] | None:
        """Return the quantifier that stands here, least and most; None if there is none."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        found, length = simple.get(self.peek()), 1
        if found is None:
            match = _COUNT.match(self.pattern, self.position)
            if match is None or not (match[1] or match[2]):
                return None
            least = int(match[1] or 0)
            found = least, (int(match[3]) if match[3] else None) if match[2] else least
            length = len(match[0])
        if consume:
            self.position += length
        return found

    def atom(self) -> Pattern:
        character = self.next()
        if character == "(":
            return self.group()
        if character == "[":
            return self.set()
        if character == ".":
            return ANY
        if character in "^$":
            self.position -= 1
            raise self.error("expected no anchors: the whole text is matched anyway")
        if character == "\\":
            return Characters(self.escape())
        return Characters(((ord(character), ord(character)),))

    def group(self) -> Pattern:
        if self.take("?") and not self.take(":"):
            if not self.take("P<"):
                raise self.error("expected (...), (?:...) or (?P<name>...): lookaround and flags are not supported")
            self.position = self.pattern.find(">", self.position) + 1 or len(self.pattern)
        inner = self.choice()
        if not self.take(")"):
            raise self.error("expected ')'")
        return inner

    def set(self) -> Characters:
        is_negated = self.take("^")
        ranges: list[Range] = []
        is_first = True
        while is_first or self.peek() != "]":
            is_first = False
            low = self.member()
            is_range = self.peek() == "-" and self.pattern[self.position + 1 : self.position + 2] not in ("]", "")
            if not is_range:
                ranges += low
                continue
            self.next()
            high = self.member()
            ends = [*low, *high]
            if len(ends) != 2 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or low[0][0] > high[0][0]:
                raise self.error("expected a range a-z of two characters in order")
            ranges.append((low[0][0], high[0][0]))
        self.next()
        return Characters(complement(ranges) if is_negated else merged(ranges))

    def member(self) -> tuple[Range, ...]:
        character = self.next()
        return self.escape(in_set=True) if character == "\\" else ((ord(character), ord(character)),)

    def escape(self, *, in_set: bool = False) -> tuple[Range, ...]:
        kind = self.next()
        if kind.lower() in _SETS:
            ranges = _SETS[kind.lower()]
            return ranges if kind.islower() else complement(ranges)
        if kind in _HEX:
            digits = self.pattern[self.position : self.position + _HEX[kind]]
            if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX[kind]}}}", digits) or int(digits, 16) > LAST:
                raise self.error(f"expected \\{kind} and {_HEX[kind]} hexadecimal digits of a character")
            self.position += _HEX[kind]
            return ((int(digits, 16), int(digits, 16)),)
        if kind == "b" and in_set:
            return ((8, 8),)
        if kind == "0":
            return ((0, 0),)
        if kind.isascii() and kind.isalnum() and kind not in _CONTROLS:
            self.position -= 2
            raise self.error(f"expected no \\{kind}: back references, boundaries and the like are not supported")
        code = ord(_CONTROLS.get(kind, kind))
        return ((code, code),)

    def peek(self) -> str:
        return self.pattern[self.position : self.position + 1]

    def next(self) -> str:
        if self.position >= len(self.pattern):
            raise self.error("expected more, an escape or a set is not closed")
        self.position += 1
        return self.pattern[self.position - 1]

    def take(self, expected: str) -> bool:
        is_here = self.pattern.startswith(expected, self.position)
        self.position += len(expected) * is_here
        return is_here
