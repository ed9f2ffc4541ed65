"""What is not as it was written is not used: flipped bits, files cut short, two versions at once, NaN."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import circuits as ct
from circuits import store
from circuits.files import is_litter
from diffusion import (
    CoupledHead,
    HeadMixture,
    LogitCache,
    NoiseCalibration,
    TransformerConfig,
    TransformerDenoiser,
    cache_logits,
)
from diffusion import head as head_module
from diffusion.app.recipe import PRESETS, read_recipe, write_recipe
from diffusion.codd import CoddConfig
from diffusion.decoding.baselines import CausalHead, CopulaHead, load_head
from diffusion.denoisers import transformer
from diffusion.errors import ArgumentError, CheckpointError

V, L = 9, 4
SHAPE = TransformerConfig(
    vocab_size=V, mask_id=8, pad_id=7, eos_id=6, context_length=4, block_length=L, width=16, num_layers=1, num_heads=2
)
WINDOWS = torch.randint(6, (40, 8), generator=torch.Generator().manual_seed(0))


def new_denoiser(seed=0):
    return TransformerDenoiser(SHAPE, seed=seed)


def new_head(seed=0, **options):
    pc = ct.compile(ct.structures.hmm(L, 2, V), seed=seed)
    return CoupledHead(pc, temperature=1.0 + seed, calibration=NoiseCalibration(V, num_knots=2), **options)


def new_network(seed=0):
    return CausalHead(V, L, width=4, seed=seed)


def cached(path, denoiser=None, **options):
    options = {"block_length": L, "batch_size": 8, "top_k": 3} | options
    return cache_logits(denoiser or new_denoiser(), WINDOWS, path, progress=False, **options)


class Interrupted(Exception):
    pass


class Unreliable:
    """A denoiser that stops after some calls."""

    def __init__(self, num_calls):
        self.model, self.left = new_denoiser(), num_calls
        self.spec = self.model.spec

    def logits(self, tokens, **options):
        if not self.left:
            raise Interrupted
        self.left -= 1
        return self.model.logits(tokens, **options)


def interrupted_cache(path):
    """Leave a cache of which 16 of 40 examples are done; the first call is the fingerprint's."""
    with pytest.raises(Interrupted):
        cached(path, Unreliable(3))
    return path


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAVED = {
    "denoiser": (lambda path: new_denoiser().save(path), TransformerDenoiser.load),
    "head": (lambda path: new_head().save(path), CoupledHead.load),
    "mixture": (lambda path: HeadMixture([new_head()]).save(path), HeadMixture.load),
    "network": (lambda path: new_network().save(path), CausalHead.load),
    "copula": (lambda path: CopulaHead(new_head().pc).save(path), load_head),
    "cache": (cached, LogitCache.open),
    "interrupted cache": (interrupted_cache, cached),
}
FILES = {
    "denoiser": ["manifest.json", "config.json", "model.safetensors"],
    "head": ["manifest.json", "head.safetensors", "circuit/structure.json", "circuit/weights.safetensors"],
    "mixture": ["manifest.json", "mixture.safetensors", "head0/manifest.json", "head0/head.safetensors"],
    "network": ["manifest.json", "baseline.safetensors"],
    "copula": ["baseline.safetensors", "circuit/structure.json", "circuit/weights.safetensors"],
    "cache": ["meta.json", "tokens.npy", "masked.npy", "log_q.npy", "values.npy"],
    "interrupted cache": ["meta.json", "tokens.npy", "masked.npy", "log_q.npy", "values.npy"],
}
CASES = [(kind, file) for kind in SAVED for file in FILES[kind]]


def written_part(kind, file, content):
    """Return how many bytes of a file hold something; of an interrupted cache the rest is still to come."""
    if kind != "interrupted cache" or file == "meta.json":
        return len(content)
    header = 128
    return header + (len(content) - header) * 16 // 40


@pytest.mark.parametrize(("kind", "file"), CASES)
def test_flipped_bits_are_noticed(kind, file, tmp_path):
    save, load = SAVED[kind]
    save(tmp_path / "whole")
    draw, content = random.Random(file), (tmp_path / "whole" / file).read_bytes()
    for _ in range(50):
        place = tmp_path / "flipped"
        shutil.copytree(tmp_path / "whole", place)
        position, bit = draw.randrange(written_part(kind, file, content)), draw.randrange(8)
        flipped = content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        (place / file).write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load(place)
        assert (place / file).read_bytes() == flipped  # not repaired, nor made longer
        shutil.rmtree(place)


@pytest.mark.parametrize(("kind", "file"), CASES)
def test_files_that_are_cut_short_or_longer_or_no_files_are_refused(kind, file, tmp_path):
    save, load = SAVED[kind]
    save(tmp_path / "whole")
    content = (tmp_path / "whole" / file).read_bytes()
    damages = {
        "half": lambda path: path.write_bytes(content[: len(content) // 2]),
        "short by one": lambda path: path.write_bytes(content[:-2]),
        "longer": lambda path: path.write_bytes(content + b"\1"),
        "empty": lambda path: path.write_bytes(b""),
        "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        "folder": lambda path: (path.unlink(), path.mkdir()),
    }
    for name, damage in damages.items():
        place = tmp_path / name
        shutil.copytree(tmp_path / "whole", place)
        damage(place / file)
        with pytest.raises(CheckpointError):
            load(place)


HEADERS = {
    "open bracket": b"{'descr': '<f2', 'fortran_order': False, 'shape': (40, 4, 4",
    "many signs": b"-" * 9000 + b"1",
    "deep sum": b"1+" * 4000 + b"1",
    "huge length": b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000000000, 4, 4), }",
    "negative length": b"{'descr': '<f2', 'fortran_order': False, 'shape': (-20, 4, 4), }",
    "longest length": b"{'descr': '<f2', 'fortran_order': False, 'shape': (1" + b"0" * 30 + b", 4, 4), }",
    "unhashable key": b"{[]: '<f2', 'fortran_order': False, 'shape': (40, 4, 4), }",
    "text as shape": b"{'descr': '<f2', 'fortran_order': False, 'shape': ('a', 4, 4), }",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (40, 4, 4), }",
    "columns first": b"{'descr': '<f2', 'fortran_order': True, 'shape': (40, 4, 4), }",
    "other bytes first": b"{'descr': '>f2', 'fortran_order': False, 'shape': (40, 4, 4), }",
    "nulls": b"\0" * 50,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_numpy_chokes_on_are_refused(header, tmp_path):
    cached(tmp_path)
    path = tmp_path / "log_q.npy"
    content = path.read_bytes()
    path.write_bytes(b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + content[128:])
    with pytest.raises(CheckpointError, match="delete the folder and cache again"):
        LogitCache.open(tmp_path)


def test_the_bits_of_a_cache_that_is_done_are_continued_and_no_others(tmp_path):
    """What is not done yet may hold anything: it is written again."""
    whole = cached(tmp_path / "whole")
    place = interrupted_cache(tmp_path / "interrupted")
    content = bytearray((place / "log_q.npy").read_bytes())
    content[-1] ^= 1
    (place / "log_q.npy").write_bytes(content)
    continued = cached(place)
    for name in ("tokens", "masked", "log_q", "values"):
        np.testing.assert_array_equal(getattr(continued, name), getattr(whole, name))
    assert continued.digest == whole.digest
    assert np.array_equal(LogitCache.open(place).log_q, whole.log_q)


def test_a_cache_that_was_interrupted_while_it_was_created_is_begun_again(tmp_path):
    names = ["tokens.npy", "masked.npy", "log_q.npy", "values.npy"]
    whole = cached(tmp_path / "whole")
    for count in range(len(names) + 1):
        place = tmp_path / str(count)
        with pytest.raises(Interrupted):
            cached(place, Unreliable(1))  # of which nothing is done
        for name in names[count:]:
            (place / name).unlink()
        (place / ".0a1b2c3d.tmp.log_q.npy").write_bytes(b"")
        assert cached(place).digest == whole.digest
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".0a1b2c3d.tmp.meta.json").write_text("{")
    assert cached(tmp_path / "new").digest == whole.digest


# Two versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["read_tensors", "circuit_hash", "ct.load"])
def test_a_reader_of_a_head_who_is_overtaken_gets_one_version(place, tmp_path, monkeypatch):
    """Heads 0 and 1 differ in circuit and temperature; the second is saved after some step of reading the first."""
    first, second = new_head(0), new_head(1)
    first.save(tmp_path / "head")
    module, name = (head_module.ct, "load") if place == "ct.load" else (head_module, place)
    step, calls = getattr(module, name), []

    def overtaken(*arguments, **options):
        result = step(*arguments, **options)
        calls.append(arguments)
        if len(calls) == 1:
            with monkeypatch.context() as without:
                without.setattr(module, name, step)
                second.save(tmp_path / "head")
        return result

    monkeypatch.setattr(module, name, overtaken)
    loaded = CoupledHead.load(tmp_path / "head")
    assert loaded.temperature == second.temperature
    assert same(loaded, second)


def test_a_reader_of_a_denoiser_who_is_overtaken_gets_one_version(tmp_path, monkeypatch):
    """They have the same shapes, and end texts with different tokens."""
    first = new_denoiser()
    second = TransformerDenoiser(TransformerConfig(**vars(SHAPE) | {"eos_id": 5}), seed=1)
    first.save(tmp_path / "model")
    read = transformer.read_json

    def overtaken(path, **options):
        content = read(path, **options)
        if content["eos_id"] == 6:
            second.save(tmp_path / "model")
        return content

    monkeypatch.setattr(transformer, "read_json", overtaken)
    loaded = TransformerDenoiser.load(tmp_path / "model")
    assert loaded.config == second.config
    assert same(loaded, second)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["denoiser", "head", "network"])
def test_a_writer_who_is_killed_leaves_the_version_before_or_the_new_one(kind, tmp_path, monkeypatch):
    make = {"denoiser": new_denoiser, "head": new_head, "network": new_network}[kind]
    load = SAVED[kind][1]
    first, second, place = make(0), make(1), tmp_path / "saved"
    for num_renames in range(20):
        first.save(place)
        done = []

        def until_killed(original, done=done, limit=num_renames):
            def wrapped(*arguments, **options):
                if len(done) >= limit:  # a killed process does not clean up either
                    raise Killed
                done.append(arguments)
                return original(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:
            steps = ((store, "_exchange"), (Path, "rename"), (os, "replace"), (shutil, "rmtree"))
            for owner, name in steps:
                patch.setattr(owner, name, until_killed(getattr(owner, name)))
            try:
                second.save(place)
            except Killed:
                pass
            else:
                break
        loaded = load(place)
        assert same(loaded, first) or same(loaded, second)
    assert num_renames > 2
    assert same(load(place), second)
    for path in tmp_path.iterdir():  # nobody else writes: what a process holds goes with it, and this one lives
        assert path.name == "saved" or is_litter(path.name)


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    for save in (new_denoiser().save, new_head().save):
        place = tmp_path / "thesis"
        place.mkdir()
        (place / "thesis.tex").write_text("ten years of work")
        with pytest.raises(ArgumentError, match="is not a saved"):
            save(place)
        assert (place / "thesis.tex").read_text() == "ten years of work"
        shutil.rmtree(place)


def test_a_tokenizer_beside_a_denoiser_stays(tmp_path):
    new_denoiser().save(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    new_denoiser(1).save(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert same(TransformerDenoiser.load(tmp_path / "model"), new_denoiser(1))


def test_files_of_two_denoisers_do_not_fit_together(tmp_path):
    new_denoiser().save(tmp_path / "one")
    TransformerDenoiser(TransformerConfig(**vars(SHAPE) | {"eos_id": 5})).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "one" / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: expected the content that its hash is of"):
        TransformerDenoiser.load(tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()  # there was none before
    with pytest.raises(CheckpointError, match=r"config.json: expected the one of model.safetensors, got another"):
        TransformerDenoiser.load(tmp_path / "one")


# Numbers that are none, and files of before ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(bad, tmp_path):
    head, denoiser = new_head(), new_denoiser()
    with torch.no_grad():
        head.calibration.bias[0, 0] = bad
        denoiser.output_bias[0] = bad
    for model in (head, denoiser):
        with pytest.raises(ArgumentError, match="NaN or infinite"):
            model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    for model, fresh in ((head, new_head()), (denoiser, new_denoiser())):
        as_before(fresh, tmp_path / "model", tensors=model.state_dict())
        with pytest.raises(CheckpointError, match="expected finite numbers, got NaN or infinite ones"):
            type(model).load(tmp_path / "model")
        shutil.rmtree(tmp_path / "model")


def as_before(model, folder, tensors=None):
    """Write a model as the first format version had it, without hashes of tensors and settings."""
    model.save(folder)
    (folder / "manifest.json").unlink()
    if isinstance(model, TransformerDenoiser):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"format_version": 1}))
        save_file(tensors or load_file(folder / "model.safetensors"), folder / "model.safetensors")
        return
    with safe_open(folder / "head.safetensors", "pt") as file:
        metadata = file.metadata()
    del metadata["sha256"], metadata["conditioners"]  # it knew a calibration only
    prefix = "conditioners.0."
    state = tensors or model.state_dict()
    calibration = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    save_file(calibration, folder / "head.safetensors", metadata | {"format_version": "1"})


@pytest.mark.parametrize(
    "model",
    [
        new_denoiser(),
        new_head(top_k=3, normalization="local"),
        CoupledHead(ct.compile(ct.structures.hmm(L, 2, V), seed=0)),
    ],
    ids=["denoiser", "calibrated head", "plain head"],
)
def test_what_was_written_before_there_were_hashes_still_loads(model, tmp_path):
    as_before(model, tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert same(loaded, model)
    if isinstance(model, CoupledHead):
        assert (loaded.top_k, loaded.normalization) == (model.top_k, model.normalization)
    loaded.save(tmp_path / "model")
    assert same(type(model).load(tmp_path / "model"), model)


# Files of settings are small, whatever JSON they may hold


def made_recipe(folder):
    write_recipe(PRESETS["tiny"], folder / "recipe.json", {})


def made_codd(folder):
    (folder / "codd_config.json").write_text("{}")


SMALL = {
    "manifest.json": (lambda folder: new_head().save(folder), CoupledHead.load),
    "config.json": (lambda folder: as_before(new_denoiser(), folder), TransformerDenoiser.load),
    "recipe.json": (made_recipe, lambda folder: read_recipe(folder / "recipe.json")),
    "codd_config.json": (made_codd, lambda folder: CoddConfig.read(folder / "codd_config.json")),
    "meta.json": (cached, LogitCache.open),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_of_a_large_size_is_not_read(name, tmp_path):
    make, load = SMALL[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    load(folder)
    limit = 1 << (24 if name == "meta.json" else 20)
    for size in (limit, limit + 1):
        path = folder / name
        path.write_bytes(path.read_bytes().ljust(size))  # with spaces it says what it did
        if size == limit:
            load(folder)
            continue
        with pytest.raises(CheckpointError, match=rf"{name}: expected a file .*, got {size} bytes, more than {limit};"):
            load(folder)
