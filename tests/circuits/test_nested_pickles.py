"""Pickles of many containers in each other are refused long before their end, whatever they are nested by."""

import contextlib
import io

import pytest

import circuits as ct
from circuits.interop._pickle import read_pickle

MANY = 10**6
NESTED = {
    "lists": b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b".",
    "lists that are remembered": b"\x80\x04" + b"]\x94" * MANY + b"a" * (MANY - 1) + b".",
    "lists without an end": b"\x80\x02" + b"]" * MANY,
    "tuples": b"\x80\x02]N" + b"\x85" * MANY + b"a.",
    "tuples as keys": b"\x80\x02]}N" + b"\x85" * MANY + b"Nsa.",
    "tuples of marks": b"\x80\x02" + b"(" * MANY + b"t" * MANY + b".",
    "dictionaries": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * MANY + b"s" * MANY + b".",
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_million_containers_in_each_other_are_refused_long_before_their_end(kind):
    file = io.BytesIO(NESTED[kind])
    with pytest.raises(ct.CheckpointError, match="expected at most 64 containers in each other, got more"):
        read_pickle(file)
    assert file.tell() < len(NESTED[kind]) / 10


@pytest.mark.parametrize(("depth", "is_read"), [(64, True), (65, False)])
def test_a_few_are_read(depth, is_read):
    with contextlib.nullcontext() if is_read else pytest.raises(ct.CheckpointError, match="in each other"):
        assert repr(read_pickle(b"\x80\x02N" + b"\x85" * depth + b".")).count("(") == depth


def test_many_beside_each_other_are_read():
    batch = b"(" + b"]" * 1000 + b"e"  # as Python writes them
    assert read_pickle(b"\x80\x02]" + batch * 100 + b".") == [[]] * 100_000
