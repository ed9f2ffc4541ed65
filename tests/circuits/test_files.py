"""Files and folders are found whole or not at all; tensors in them have a hash; what is no file is not waited for."""

import hashlib
import os
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import circuits as ct
from circuits import digests, files, interop

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.zeros(0, 2, dtype=torch.int64)}
OPTIONS = {"format": "test", "version": 2, "metadata": {"text": "ä"}}
READ = {"format": "test", "versions": (1, 2), "way_out": "write it again"}


def test_a_digest_is_the_hash_of_types_shapes_and_values():
    """Written out: what of each value goes into SHA-256, in which order."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    told = b"torch.float32(2, 3)" + values.tobytes() + b"none" + b"text 2 " + "ä".encode()
    assert digests.digest(torch.from_numpy(values), None, "ä") == hashlib.sha256(told).hexdigest()
    transposed = torch.from_numpy(np.ascontiguousarray(values.T)).t()
    assert digests.digest(transposed, None, "ä") == hashlib.sha256(told).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"] + 0.5},
        {"a": TENSORS["a"].double()},
        {"a": TENSORS["a"].view(3, 2)},
        {"A": TENSORS["a"]},
        {"a": torch.tensor([[-0.0, 1, 2], [3, 4, 5]])},
        {"a": TENSORS["a"], "b": None},
        {},
    ],
)
def test_any_other_tensors_have_another_digest(other):
    assert digests.named_digest(other) != digests.named_digest({"a": TENSORS["a"]})


def test_the_order_of_names_does_not_matter_and_nan_equals_itself():
    one, other = {"a": torch.tensor(torch.nan), "b": "text"}, {"b": "text", "a": torch.tensor(torch.nan)}
    assert digests.named_digest(one) == digests.named_digest(other)


def test_tensors_are_read_as_they_were_written(tmp_path):
    files.write_tensors(tmp_path / "x", TENSORS, **OPTIONS)
    metadata, tensors = files.read_tensors(tmp_path / "x", **READ)
    assert metadata == {"format": "test", "format_version": "2", "text": "ä"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_flipped_bits_of_tensors_and_texts_are_noticed(tmp_path):
    path, draw = tmp_path / "x", random.Random(0)
    files.write_tensors(path, TENSORS, **OPTIONS)
    content = path.read_bytes()
    for _ in range(500):
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        with pytest.raises(ct.CheckpointError, match="write it again"):
            files.read_tensors(path, **READ)


def test_only_files_of_versions_without_it_may_lack_the_hash(tmp_path):
    path = tmp_path / "x"
    save_file(TENSORS, path, {"format": "test", "format_version": "1"})
    texts, _ = files.read_tensors(path, **READ, unhashed=(1,))
    assert texts == {"format": "test", "format_version": "1"}
    for unhashed in ((), (2,)):
        with pytest.raises(ct.CheckpointError, match="expected the content that its hash is of"):
            files.read_tensors(path, **READ, unhashed=unhashed)
    files.write_tensors(path, TENSORS, **OPTIONS | {"version": 1})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(TENSORS | {"a": TENSORS["a"] + 1}, path, metadata)
    with pytest.raises(ct.CheckpointError, match="its hash is of"):  # one that is there counts
        files.read_tensors(path, **READ, unhashed=(1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "other"}, "expected the format test, got 'other'; write it again"),
        ({"version": 3}, "x: format version: expected 1, 2, got '3'; install a newer unfactor, or write it again"),
    ],
)
def test_other_formats_and_versions_are_named(options, message, tmp_path):
    files.write_tensors(tmp_path / "x", TENSORS, **OPTIONS | options)
    with pytest.raises(ct.CheckpointError, match=message):
        files.read_tensors(tmp_path / "x", **READ)


LOADERS = {
    "circuit": (ct.load, "circuit/structure.json"),
    "weights": (ct.load, "circuit/weights.safetensors"),
    "region graph": (ct.RegionGraph.load, "graph.json"),
    "jpc": (interop.load_jpc, "circuit.jpc"),
    "checkpoint": (lambda path: fitted(path), "run.safetensors"),
}


def fitted(path):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    ct.learning.fit(pc, torch.zeros(4, 3, dtype=torch.int64), num_epochs=1, checkpoint_path=path, progress=False)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(loader, kind, tmp_path):
    load, name = LOADERS[loader]
    ct.save(ct.compile(ct.structures.hmm(3, 2, 2), seed=0), tmp_path / "circuit")
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ct.CheckpointError, match="expected a file that can be read, got no regular file"):
        load(path.parent if path.parent.name == "circuit" else path)
