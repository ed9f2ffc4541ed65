"""From documents to tokens to windows: the text that small denoisers and their circuits are trained on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.digests import digest
from circuits.reading import read_bytes, short
from diffusion.errors import ArgumentError, CorpusError
from diffusion.text.gsm8k import FIELD, gsm8k_train
from diffusion.text.tables import is_table, open_table
from diffusion.text.tokenizer import is_text

ARITHMETIC_DOCUMENTS = 2_000
ARITHMETIC_LINES = (10, 40)
LARGEST_OPERAND = 6
_MOST_TEXT = 1 << 30
_FEW_BYTES = 1 << 26
_MOST_EXPANSION = 64
"""Of text that gzip compressed: prose is a third of its length, and repetitive lines of a log a thirtieth."""
_EQUATION = re.compile(rf"([1-{LARGEST_OPERAND}])\+([1-{LARGEST_OPERAND}])=([1-9][0-9]?)")


@dataclass(frozen=True)
class Corpus:
    """Documents for training, and documents that training never sees."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of all documents, and of which of them are held out."""
        return digest("train", *self.train, "held out", *self.held_out)


def load_corpus(
    source: str | Path, *, field: str | None = None, held_out_fraction: float = 0.1, seed: int = 0
) -> Corpus:
    """Read a corpus and split it by document.

    Args:
        source: ``"embedded"``, the language reference that comes with Python (``pydoc_data.topics``, a document per
            topic); ``"arithmetic"``, generated sums (``arithmetic_documents``); ``"gsm8k"``, its worked answers, which
            are downloaded once (:mod:`~diffusion.text.gsm8k`); the path of a ``.txt`` file, whose documents are
            separated by blank lines, of a ``.jsonl`` file with a document per line, or of a ``.fasta`` or ``.fa`` file,
            whose documents are its sequences, each of which may be compressed, with ``.gz`` appended to its name; of a
            ``.parquet`` file with a document per row; or ``"dataset:NAME:CONFIGURATION@SPLIT"``, a dataset of the hub
            or a folder with one, where configuration and split ("train") may be left out.
        field: the key that holds the text in each line of a ``.jsonl`` file; the column of a table, by default "text".
        held_out_fraction: share of the documents that is held out, in [0, 1).
        seed: chooses which documents are held out, and generates the arithmetic.

    Raises:
        CorpusError: the file is missing, not text, not in its format, empty, or has too few documents to split.
        ArgumentError: ``field`` is missing or superfluous, ``held_out_fraction`` outside [0, 1), or the package that
            reads a table is not installed.
    """
    if not 0 <= held_out_fraction < 1:
        raise ArgumentError(f"held_out_fraction: expected a share from 0 to below 1, got {held_out_fraction}")
    name = str(source)
    if name == "gsm8k":
        documents = _documents_of_jsonl(str(gsm8k_train()), field or FIELD)
        return _corpus(name, documents, held_out_fraction, seed)
    is_jsonl = name.removesuffix(".gz").endswith(".jsonl")
    if field is not None and not is_jsonl and not is_table(name):
        raise ArgumentError(
            f"field: expected none, for {name!r} is no .jsonl file and no table, got {field!r}; leave it out"
        )
    if name == "embedded":
        documents = _python_reference()
    elif name == "arithmetic":
        documents = arithmetic_documents(ARITHMETIC_DOCUMENTS, seed=seed)
    elif is_jsonl:
        if field is None:
            raise ArgumentError(f"field: expected the key that holds the text in each line of {name}, got none")
        documents = _documents_of_jsonl(name, field)
    elif is_table(name):
        documents = _documents_of_table(name, field or "text")
    elif name.removesuffix(".gz").endswith((".fasta", ".fa")):
        documents = _sequences_of_fasta(name)
    elif name.removesuffix(".gz").endswith(".txt"):
        documents = re.split(r"\n(?:[^\S\n]*\n)+", _read_text(name))
    else:
        raise CorpusError(
            "corpus: expected 'embedded', 'arithmetic', 'gsm8k', 'dataset:NAME', or a path that ends in .parquet, in "
            f".txt, .jsonl, .fasta or .fa, or one of these and .gz, got {name}; rename the file, or write it in one of "
            "these formats"
        )
    return _corpus(name, documents, held_out_fraction, seed)


def _corpus(name: str, documents: list[str], held_out_fraction: float, seed: int) -> Corpus:
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CorpusError(f"{name}: expected text, got none; give a file that has some")
    train, held_out = _split(documents, held_out_fraction, seed)
    if not train or (held_out_fraction > 0 and not held_out):
        raise CorpusError(
            f"{name}: expected at least two different documents, some of which are held out, got {len(documents)}; "
            "separate documents by blank lines"
        )
    return Corpus(name, train, held_out)


def _python_reference() -> list[str]:
    from pydoc_data.topics import topics  # half a megabyte of text

    return list(topics.values())


def _read_text(name: str) -> str:
    try:
        content = read_bytes(name, limit=_MOST_TEXT)
        if name.endswith(".gz"):
            content = _decompressed(content, name)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise CorpusError(f"{name}: expected a file, got none there; look at the path") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{name}: expected a whole gzip file, got {error}; copy it again") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name}: expected UTF-8 text, got byte {error.start} of something else; convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise CorpusError(
            f"{name}: expected a file that can be read, got {error.strerror or error}; look at it and its permissions"
        ) from error
    if "\0" in text:
        raise CorpusError(f"{name}: expected text, got null characters in it; give a file of text")
    return text.replace("\r\n", "\n")


def _decompressed(content: bytes, name: str) -> bytes:
    """Return the text of a gzip file, unless it is many times as long as text can be."""
    most = min(_MOST_TEXT, max(_FEW_BYTES, _MOST_EXPANSION * len(content)))
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise CorpusError(f"{name}: expected at most {most} bytes of text in {len(content)} bytes, got more")
    return text


def _sequences_of_fasta(name: str) -> list[str]:
    """Return the sequences, each of whose lines are one after the other; headers begin with >."""
    header, *records = re.split(r"^>.*$", _read_text(name), flags=re.MULTILINE)
    if header.strip():
        raise CorpusError(f"{name}: expected FASTA, a line that begins with > first, got {header.strip()[:40]!r}")
    return ["".join(record.split()) for record in records]


def _documents_of_table(name: str, field: str) -> list[str]:
    documents, size = [], 0
    for (document,) in open_table(name).texts(field):
        documents.append(document)
        size += len(document)
        if size > _MOST_TEXT:
            raise CorpusError(f"{name}: expected at most {_MOST_TEXT:,} characters in {field!r}, got more")
    return documents


def _documents_of_jsonl(name: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{name}, line {number}: expected JSON, got something else: {error}") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{name}, line {number}: expected an object with keys, got {short(record)}")
        if field not in record:
            raise CorpusError(f"{name}, line {number}: expected a key {field!r}, got {', '.join(record):.200}")
        if not isinstance(record[field], str):
            raise CorpusError(f"{name}, line {number}: {field}: expected text, got {short(record[field])}")
        if not is_text(record[field]):
            raise CorpusError(f"{name}, line {number}: {field}: expected text, got half of a surrogate pair in it")
        documents.append(record[field])
    return documents


def _split(documents: Sequence[str], held_out_fraction: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    # Ordered by a hash of the text, so that neither the order nor the presence of other documents decides the side.
    def key(document: str) -> bytes:
        return hashlib.blake2b(document.encode("utf-8", "surrogatepass"), key=str(seed).encode()).digest()

    ordered = sorted(documents, key=key)
    count = max(1, round(held_out_fraction * len(ordered))) if held_out_fraction > 0 else 0
    held_out = set(ordered[:count])
    # Copies of a held-out document must not be trained on: they go where the first copy went.
    train = tuple(document for document in documents if document not in held_out)
    return train, tuple(document for document in documents if document in held_out)


def arithmetic_documents(num_documents: int, seed: int) -> list[str]:
    """Generate documents of additions, one a line: ``5+6=11``.

    The operands are independent and uniform on 1..6, like two dice, but with their sum they determine each other:
    whoever fills in several characters independently gets wrong sums, and, as lines have 6 or 7 characters with their
    newline, one wrong length spoils the lines after it. A hidden Markov model with about 75 states is exact.

    Args:
        num_documents: how many; each has 10 to 40 lines, and ends with a newline.
        seed: the same seed gives the same documents.
    """
    if num_documents < 0:
        raise ArgumentError(f"num_documents: expected an integer >= 0, got {num_documents}")
    random = np.random.default_rng(seed)
    shortest, longest = ARITHMETIC_LINES
    documents = []
    for num_lines in random.integers(shortest, longest, size=num_documents, endpoint=True):
        operands = random.integers(1, LARGEST_OPERAND, size=(num_lines, 2), endpoint=True).tolist()
        documents.append("".join(f"{a}+{b}={a + b}\n" for a, b in operands))
    return documents


@dataclass(frozen=True)
class ArithmeticCheck:
    """How many of the complete lines of a text read like ``5+6=11``, and how many of those are true."""

    num_lines: int
    num_well_formed: int
    num_correct: int

    @property
    def ok(self) -> bool:
        """At least one line is complete, and all complete lines are well-formed and true."""
        return 0 < self.num_lines == self.num_correct


def check_arithmetic(context: str, text: str) -> ArithmeticCheck:
    """Judge the lines that ``text`` completes, as a continuation of ``context``.

    The first judged line is what follows the last newline of ``context``, continued by ``text``. A last line
    without its newline is ignored, for it may yet become anything. Lines of ``context`` alone are not judged.
    """
    unfinished = context.rpartition("\n")[2]
    lines = (unfinished + text).split("\n")[:-1]
    matches = [match for line in lines if (match := _EQUATION.fullmatch(line))]
    correct = sum(int(match[1]) + int(match[2]) == int(match[3]) for match in matches)
    return ArithmeticCheck(num_lines=len(lines), num_well_formed=len(matches), num_correct=correct)


def join_documents(token_docs: Sequence[Sequence[int]], *, eos_id: int) -> Tensor:
    """Concatenate tokenised documents, each followed by the end-of-text token; int64, of all their lengths together."""
    length = sum(len(tokens) + 1 for tokens in token_docs)
    stream = chain.from_iterable(chain(tokens, (eos_id,)) for tokens in token_docs)
    return torch.from_numpy(np.fromiter(stream, dtype=np.int64, count=length))


def windows(stream: Tensor, *, length: int, max_windows: int | None = None) -> Tensor:
    """Cut a token stream into consecutive windows that do not overlap; a shorter rest is dropped.

    Args:
        stream: int64 token ids, shape (N,), from ``join_documents``.
        length: tokens a window.
        max_windows: keep at most this many, spread evenly over the stream.

    Returns:
        int64, shape (number of windows, length), the same for every call.

    Raises:
        CorpusError: the stream is shorter than one window.
        ArgumentError: ``length`` or ``max_windows`` is not positive, or ``stream`` is not a vector of int64.
    """
    _check_stream(stream, length)
    count = stream.numel() // length
    cut = stream[: count * length].view(count, length)
    if max_windows is None:
        return cut
    if max_windows < 1:
        raise ArgumentError(f"max_windows: expected an integer >= 1, got {max_windows}")
    kept = min(max_windows, count)
    return cut[torch.arange(kept) * count // kept]


def windows_and_rest(stream: Tensor, *, length: int, max_windows: int) -> tuple[Tensor, Tensor]:
    """Return :func:`windows` spread over a stream, at most half of them all, and the others to compare with.

    Returns:
        int64, (number of windows, length) and (number of others, length).

    Raises:
        CorpusError: the stream is shorter than four windows.
    """
    everything = windows(stream, length=length)
    if len(everything) < 4:
        raise CorpusError(
            f"corpus: expected at least {4 * length} held-out tokens to compare text with, got {stream.numel()}; "
            "take a longer text"
        )
    kept = min(max_windows, len(everything) // 2)
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[torch.arange(kept) * len(everything) // kept] = True
    return everything[chosen], everything[~chosen]


def random_windows(
    stream: Tensor, *, length: int, num_windows: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw windows of a token stream at uniformly random offsets, with replacement.

    Args:
        stream: int64 token ids, shape (N,), from ``join_documents``.
        length: tokens a window.
        num_windows: how many to draw.
        generator: source of randomness, on the stream's device.

    Returns:
        int64, shape (num_windows, length).

    Raises:
        CorpusError: the stream is shorter than one window.
        ArgumentError: ``length`` is not positive, or ``stream`` is not a vector of int64.
    """
    _check_stream(stream, length)
    starts = torch.randint(stream.numel() - length + 1, (num_windows, 1), generator=generator, device=stream.device)
    return stream[starts + torch.arange(length, device=stream.device)]


def _check_stream(stream: Tensor, length: int) -> None:
    if stream.ndim != 1 or stream.dtype != torch.int64:
        raise ArgumentError(f"stream: expected a vector of int64, got {stream.dtype} of shape {tuple(stream.shape)}")
    if length < 1:
        raise ArgumentError(f"length: expected an integer >= 1, got {length}")
    if stream.numel() < length:
        raise CorpusError(f"stream: expected at least one window of {length} tokens, got {stream.numel()}")
