"""Files are read within bounds: regular ones, no larger than expected, and headers of a known form."""

import io
import json
import math
import os
import re
import tracemalloc
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest

import circuits as ct
from circuits.errors import CheckpointError
from circuits.files import read_tensors
from circuits.reading import (
    Range,
    open_regular,
    parsed_json,
    read_array_header,
    read_bytes,
    read_json,
    read_text,
    record_of,
    regular_size,
)


def peak_of(read):
    """Return the most bytes that reading takes beside what was there."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        read()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


WORST = {"objects": b'{"a":1},', "lists": b"[1.5,1],", "numbers": b"1.5,", "texts": b'"ab",'}


@pytest.mark.parametrize("kind", WORST)
def test_json_takes_no_more_than_forty_times_its_bytes(kind):
    content = b"[" + WORST[kind] * (200_000 // len(WORST[kind])) + b"0]"
    assert peak_of(lambda: parsed_json(content)) < 40 * len(content)


def test_the_structure_of_a_circuit_takes_ten_times_its_bytes_in_json(tmp_path):
    ct.save(ct.compile(ct.structures.hmm(200, 2, 2), seed=0), tmp_path)
    path = tmp_path / "structure.json"
    assert peak_of(lambda: read_json(path, way_out="save it again")) < 10 * path.stat().st_size


def no_regular_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nothing")
    return ["pipe", "folder", "zero", "loop", "gone", "absent", "n" * 300]


def test_what_is_no_regular_file_is_neither_waited_for_nor_read(tmp_path):
    for name in no_regular_files(tmp_path):
        for read in (regular_size, open_regular, read_bytes, read_text):
            with pytest.raises(OSError, match=r"."):
                read(tmp_path / name)
        with pytest.raises(CheckpointError, match="; make it again"):
            read_json(tmp_path / name, way_out="make it again")


def test_a_file_larger_than_expected_is_not_read(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no place
    with pytest.raises(OSError, match="1099511627776 bytes, more than 100"):
        read_bytes(tmp_path / "huge", limit=100)
    (tmp_path / "small").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "small", limit=100) == b"x" * 100
    with pytest.raises(OSError, match="100 bytes, more than 99"):
        read_bytes(tmp_path / "small", limit=99)


def test_text_of_files_that_have_no_size_is_not_read():
    """Files of the kernel say that they have no bytes, whatever they have."""
    assert read_bytes("/proc/self/status") == b""


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10**5, b"\xff", b"\xff\xfe1\x00", b'"\xed\xa0\x80"', b"1" * 5000]
)
def test_what_is_not_json_is_refused(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file.json: expected JSON, got .*; make it again"):
        read_json(tmp_path / "file.json", way_out="make it again")


def test_json_is_read_in_memory_bounded_by_its_length():
    assert parsed_json(json.dumps([{"a": [1, 2]}] * 10_000).encode()) == [{"a": [1, 2]}] * 10_000
    with pytest.raises(ValueError, match="lists and objects"):
        parsed_json(b"[" + b"[]," * 10**6 + b"[]]")  # 56 bytes each, and 8 for the place in the list


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63])
def test_headers_that_cannot_be_are_refused(length, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(CheckpointError, match="save it again"):
        read_tensors(tmp_path / "x.safetensors", format="x", versions=(1,), way_out="save it again")


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 7), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ["i4", "f2", "f8", "?", "u1"])
def test_headers_that_numpy_writes_are_read_as_numpy_reads_them(shape, dtype):
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype))
    file.seek(0)
    header = read_array_header(file)
    assert (header.shape, header.dtype, header.start) == (shape, np.dtype(dtype).str, file.tell())
    assert len(file.read()) == np.zeros(shape, dtype).nbytes


def test_headers_with_anything_else_are_refused():
    whole = "{'descr': '<f2', 'fortran_order': False, 'shape': (40, 4), }"
    others = [
        whole.replace("40", text) for text in ("-40", "4e1", "10" * 20, "None", "'a'", "(" * 200, "1+" * 200 + "1")
    ]
    others += [whole.replace("False", "True"), whole.replace("<f2", "|O"), whole.replace("<f2", ">f2"), whole[:-3], ""]
    for text in others:
        content = (text + "\n").encode()
        start = b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little")
        with pytest.raises(ValueError, match="expected"):
            read_array_header(io.BytesIO(start + content))
    for start in (b"", b"\x93NUMPY\x02\x00\x10\x00", b"\x93NUMPY\x01\x00\xff\xff", b"PK\x03\x04" * 3):
        with pytest.raises(ValueError, match="expected"):
            read_array_header(io.BytesIO(start))


# Records --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Annotated[float, Range(0, 1)] = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: Annotated[int, Range(1, 10)]
    sizes: tuple[int, ...] = ()
    name: str | None = None
    is_done: bool = False
    inner: Inner = field(default_factory=Inner)


def test_a_record_that_json_has_is_the_object_again():
    whole = Outer(count=3, sizes=(1, 2), name="x", is_done=True, inner=Inner(rate=0.25, kind="b"))
    assert record_of(Outer, json.loads(json.dumps(asdict(whole)))) == whole
    assert record_of(Outer, {"count": 3}) == Outer(count=3)
    assert record_of(Inner, {"rate": 1}) == Inner(rate=1.0)
    with pytest.raises(CheckpointError, match="keys: expected is_done, got none"):
        record_of(Outer, {"count": 3, "sizes": [], "name": None}, optional=["inner"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "count: expected an integer from 1 to 10, got 0"),
        ({"count": 10**30}, "count: expected an integer from 1 to 10, got a number beyond 64 bits"),
        ({"count": "3"}, "count: expected an integer"),
        ({"count": True}, "count: expected an integer"),
        ({"count": 3.0}, "count: expected an integer"),
        ({"count": None}, "count: expected an integer"),
        ({"sizes": 7}, "sizes: expected"),
        ({"sizes": [1, [2]]}, "sizes: expected an integer"),
        ({"sizes": [1 << 60]}, "sizes: expected an integer from"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"is_done": 1}, "is_done: expected bool, got 1"),
        ({"inner": 1}, "inner: expected an object"),
        ({"inner": {"rate": 1.5}}, "inner: rate: expected a number from 0 to 1, got 1.5"),
        ({"inner": {"rate": math.nan}}, "rate: expected a number"),
        ({"inner": {"kind": "c"}}, "kind: expected one of a, b, got 'c'"),
        ({"inner": {"kind": ["a"]}}, "kind: expected one of a, b"),
        ({"other": 1}, "keys: expected no others, got 'other'"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused(changes, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        record_of(Outer, {"count": 1} | changes)
    with pytest.raises(CheckpointError, match="keys: expected count, got none"):
        record_of(Outer, {})
    with pytest.raises(CheckpointError, match="expected an object with keys, got a list of 1"):
        record_of(Outer, [1])
