"""The formats that are read, each with a small example, and ways to damage it."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import circuits as ct
from circuits.interop import load_jpc
from circuits.io.saving import _structure_hash
from diffusion import CoupledHead, LogitCache, NoiseCalibration, TransformerConfig, TransformerDenoiser, cache_logits
from diffusion.app.recipe import PRESETS, Recipe, read_recipe, write_recipe
from diffusion.codd import CoddConfig
from diffusion.denoisers.checkpoints import read_weights
from diffusion.text.corpus import load_corpus
from diffusion.text.tokenizer import TextTokenizer, train_tokenizer

V, L = 9, 4
SHAPE = TransformerConfig(
    vocab_size=V, mask_id=8, pad_id=7, eos_id=6, context_length=4, block_length=L, width=16, num_layers=1, num_heads=2
)
DATA = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format.

    Attributes:
        make: write an example into a folder.
        load: read it.
        is_sound: whether what was loaded is what was written or, where nothing in the file could tell, may be it.
        damage: the file of the folder to change and how, from a source of randomness; None: any file, its bytes.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    is_sound: Callable[[Any], bool] = lambda loaded: True
    damage: Callable[[Path, random.Random], None] | None = None


def damaged(form: Format, folder: Path, draw: random.Random) -> None:
    """Change one file of a folder."""
    if form.damage is not None:
        form.damage(folder, draw)
        return
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    path.write_bytes(changed_bytes(path.read_bytes(), draw))


TOKENS = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"\\ud800"]
TOKENS += [b"\x00", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"(", b")", b"'", b"\n", b"0" * 30, b"[" * 3000]
NUMBERS = [0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four changes."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        place, other = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        other = min(other, place + 64) if draw.random() < 0.7 else other
        kind = draw.randrange(8)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + content[other:]
        elif kind == 2:
            content = content[:other] + content[place:]
        elif kind == 3:
            content = content[:place] + draw.choice(TOKENS) + content[place:]
        elif kind == 4:
            content = content[:place] + draw.choice(TOKENS) + content[other:]
        elif kind == 5:
            content = content[:place] + draw.randbytes(other - place) + content[other:]
        elif kind == 6 and (found := list(re.finditer(rb"-?[0-9]+", content))):
            start, stop = draw.choice(found).span()
            content = content[:start] + str(draw.choice(NUMBERS)).encode() + content[stop:]
        elif place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    return content


VALUES = [
    None,
    True,
    False,
    "",
    "x",
    "\ud800",
    0.5,
    -1.5,
    math.nan,
    math.inf,
    1e308,
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    *NUMBERS,
]


def changed_json(content: Any, draw: random.Random) -> Any:
    """Change one to three values, keys or entries anywhere in what JSON can hold, in place."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(content))
        owner, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, list):
            owner.insert(key, json.loads(json.dumps(draw.choice(owner))))
        elif kind == 1:
            owner[draw.choice(["x", "", "kind", "tied_to", "name"])] = draw.choice(VALUES)
        elif kind == 2:
            other_owner, other = draw.choice(places)
            if _size(value := json.loads(json.dumps(other_owner[other]))) < 1000:
                owner[key] = value
        else:
            owner[key] = draw.choice(VALUES)
        if not list(_places(content)):
            break
    return content


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def _size(content: Any) -> int:
    return 1 + sum(1 for _ in _places(content))


def in_json(name: str, finish: Callable[[Path, Any], Any] | None = None) -> Callable[[Path, random.Random], None]:
    """Return a way to damage values of a JSON file; ``finish`` makes hashes fit again."""

    def damage(folder: Path, draw: random.Random) -> None:
        content = changed_json(json.loads((folder / name).read_bytes()), draw)
        if finish is not None:
            content = finish(folder, content)
        (folder / name).write_text(json.dumps(content))

    return damage


def in_file(name: str) -> Callable[[Path, random.Random], None]:
    """Return a way to damage the bytes of one file."""
    return lambda folder, draw: (folder / name).write_bytes(changed_bytes((folder / name).read_bytes(), draw)) and None


# Circuits -------------------------------------------------------------------------------------------------------------


def circuit() -> ct.CompiledCircuit:
    """Return a circuit with several families, shared parameters and names."""
    leaves = [ct.inputs(0, 2, ct.Categorical(3), name="first")]
    leaves += [ct.inputs(1, 2, ct.Categorical(3), tied_to=leaves[0]), ct.inputs(2, 2, ct.Binomial(2))]
    inner = ct.sum(ct.product(*leaves[:2]), num_units=2)
    return ct.compile(ct.Circuit(ct.sum(ct.product(inner, leaves[2]), num_units=1)), seed=0)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same weights."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def normalises(pc: ct.CompiledCircuit) -> bool:
    """Whether a circuit is a distribution: its partition function is 1."""
    log_z = ct.queries.log_partition(pc, ct.Evidence.nothing(1, pc.circuit.num_vars))
    return bool((log_z.exp() - 1).abs().max() < 1e-3)


def rehashed(folder: Path, structure: Any) -> Any:
    """Make the hash of a structure that somebody has changed on purpose, and take the manifest away."""
    (folder / "manifest.json").unlink(missing_ok=True)
    if isinstance(structure, dict):
        structure.pop("sha256", None)
        structure = {"sha256": _structure_hash(structure), **structure}
    return structure


def damaged_weights(folder: Path, draw: random.Random) -> None:
    """Write other numbers or shapes, and the hash of them."""
    from circuits.files import file_hash

    path = folder / "weights.safetensors"
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    kind, tensor = draw.randrange(5), tensors[name]
    if kind == 0:
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([math.nan, math.inf, -math.inf, 1e38, 0.0])
    elif kind == 1:
        tensors[name] = tensor.to(draw.choice([torch.float16, torch.int64, torch.bool, torch.float64]))
    elif kind == 2:
        tensors[name] = tensor.reshape(-1).clone()
    elif kind == 3:
        tensors[draw.choice(["x", "", "a" * 1000])] = tensors.pop(name)
    else:
        tensors[name] = torch.zeros(0)
    save_file(tensors, path)
    structure = json.loads((folder / "structure.json").read_bytes())
    structure["weights_sha256"] = file_hash(path)
    (folder / "structure.json").write_text(json.dumps(rehashed(folder, structure)))


# PyJuice's checkpoints ------------------------------------------------------------------------------------------------


def jpc_records() -> list[dict[str, Any]]:
    """Return the nodes of a small circuit as PyJuice lists them."""
    random_numbers = np.random.default_rng(0)
    family = b"cpyjuice.nodes.distributions.categorical\nCategorical\n)\x81}X\x08\x00\x00\x00num_catsK\x03sb."
    sizes = {"num_node_blocks": 2, "block_size": 2}
    leaves = [
        {"type": "Input", **sizes, "chs": (), "scope": [var], "dist": family, "params": _table(random_numbers, 12)}
        for var in range(2)
    ]
    straight = np.array([[0, 0], [1, 1]])
    product = {"type": "Product", **sizes, "chs": (0, 1), "edge_ids": straight}
    top = {"type": "Sum", "num_node_blocks": 1, "block_size": 1, "chs": (2,), "edge_ids": np.array([[0, 0], [0, 1]])}
    return [*leaves, product, top | {"params": _table(random_numbers, 4).reshape(2, 1, 2)}]


def _table(random_numbers: np.random.Generator, size: int) -> np.ndarray:
    return random_numbers.random(size, dtype=np.float32) + 0.1


def damaged_records(folder: Path, draw: random.Random) -> None:
    """Pickle records with other values in them."""
    records: Any = jpc_records()
    values = [*VALUES, np.zeros(3), np.zeros((2, 2), np.int64), np.array([[0, 99], [5, -1]]), b"", (), ((),), (0, 0)]
    for _ in range(draw.choice([1, 1, 2, 3])):
        record = draw.choice(records)
        key = draw.choice([*record, "source_node", "external_params", "zero_param_mask"])
        kind = draw.randrange(4)
        if kind == 0:
            record.pop(key, None)
        elif kind == 1:
            records.insert(draw.randrange(len(records)), draw.choice([record, dict(record)]))
        elif kind == 2 and isinstance(record.get(key), np.ndarray):
            array = record[key] = record[key].copy()
            array.reshape(-1)[draw.randrange(array.size)] = draw.choice([0, -1, 1, 7, 2**31 - 1])
        else:
            record[key] = draw.choice(values)
    (folder / "model.jpc").write_bytes(pickle.dumps(records, draw.choice([2, 3, 4, 5])))


OPCODES = [b"(", b"]", b"}", b")", b"N", b"\x88", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"t", b"R", b"b"]
OPCODES += [b"\x94", b"\x81", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"K\x05", b"cos\nsystem\n", b"0", b"2", b"\x93"]
OPCODES += [b"X\x01\x00\x00\x00a", b"I9999\n", b"L" + b"9" * 500 + b"L\n", b"\x8a\xff" + b"\x7f" * 255, b"F1e400\n"]
OPCODES += [b"P1\n", b"Q", b"\x8d" + b"\xff" * 7 + b"\x0f", b"\x8b\xff\xff\xff\x7f"]


def soup(folder: Path, draw: random.Random) -> None:
    """Write random instructions of a pickle, some of them again and again."""
    parts = [draw.choice(OPCODES) * draw.choice([1, 1, 1, 1, 2, 50, 20_000]) for _ in range(draw.randrange(2, 30))]
    (folder / "model.jpc").write_bytes(b"\x80\x02]" + b"".join(parts) + draw.choice([b"a.", b".", b"", b"e."]))


# The rest -------------------------------------------------------------------------------------------------------------


def is_finite(model: torch.nn.Module) -> bool:
    """Whether all weights of a model are finite."""
    return all(bool(weight.isfinite().all()) for weight in model.state_dict().values())


def made_cache(folder: Path) -> None:
    """Write a cache of a denoiser's predictions."""
    windows = torch.randint(6, (8, 8), generator=torch.Generator().manual_seed(0))
    cache_logits(TransformerDenoiser(SHAPE), windows, folder, block_length=L, batch_size=8, top_k=3, progress=False)


def made_checkpoint(folder: Path) -> None:
    """Learn a little and keep the checkpoint."""
    fit(folder)


def fit(folder: Path) -> ct.CompiledCircuit:
    """Learn one epoch, or go on where a checkpoint says that all of it was done."""
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    ct.learning.fit(pc, DATA, num_epochs=1, checkpoint_path=folder / "run.safetensors", progress=False, seed=0)
    return pc


def first_format(folder: Path) -> None:
    """Write a denoiser as the first version of the format did, without any hash."""
    model = TransformerDenoiser(SHAPE)
    content = {"format": "unfactor-transformer", "format_version": 1, **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "model.safetensors")


def made_recipe(folder: Path) -> None:
    """Write a recipe."""
    write_recipe(PRESETS["tiny"], folder / "recipe.json", {})


def without_hash(folder: Path, content: Any) -> Any:
    """Take the hash of a file that somebody has changed on purpose away."""
    if isinstance(content, dict):
        content.pop("sha256", None)
    return content


def made_corpus(folder: Path) -> None:
    """Write a corpus twice, the second time compressed."""
    lines = "".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20)).encode()
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


def read_text_of_lines(folder: Path) -> Any:
    """Read the corpus and train a tokenizer on it."""
    corpus = load_corpus(folder / "text.jsonl.gz", field="text")
    return train_tokenizer(corpus.train).encode_documents(corpus.train)


def damaged_lines(folder: Path, draw: random.Random) -> None:
    """Damage the text inside of a whole gzip file."""
    path = folder / "text.jsonl.gz"
    path.write_bytes(gzip.compress(changed_bytes(gzip.decompress(path.read_bytes()), draw), mtime=0))


def read_folder_of_weights(folder: Path) -> Any:
    """Read all weights of a published model."""
    return dict(read_weights(folder))


def made_weights(folder: Path) -> None:
    """Write weights in two files with their index."""
    for number in range(2):
        save_file({f"w{number}": torch.arange(6.0).reshape(2, 3)}, folder / f"model-{number}.safetensors")
    table = {f"w{number}": f"model-{number}.safetensors" for number in range(2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


PC, DENOISER = circuit(), TransformerDenoiser(SHAPE)
HEAD = CoupledHead(ct.compile(ct.structures.hmm(L, 2, V), seed=0), calibration=NoiseCalibration(V, num_knots=2))
GRAPH = ct.RegionGraph.random_binary_tree(num_vars=6, depth=2, num_repetitions=2, seed=0)
CODD = {"num_steps": 8, "gen_length": 16, "mask_id": 3, "base_model_id": "x", "cfg_scale": 0.5}

FORMATS = {
    "circuit": Format(make=lambda f: ct.save(PC, f), load=ct.load, is_sound=lambda pc: same_weights(pc, PC)),
    "circuit, hashes made again": Format(
        make=lambda f: ct.save(PC, f), load=ct.load, is_sound=normalises, damage=in_json("structure.json", rehashed)
    ),
    "circuit, other weights": Format(
        make=lambda f: ct.save(PC, f), load=ct.load, is_sound=normalises, damage=damaged_weights
    ),
    "head": Format(make=HEAD.save, load=CoupledHead.load, is_sound=lambda head: same_weights(head, HEAD)),
    "denoiser": Format(
        make=DENOISER.save, load=TransformerDenoiser.load, is_sound=lambda model: same_weights(model, DENOISER)
    ),
    "denoiser without hashes": Format(make=first_format, load=TransformerDenoiser.load, is_sound=is_finite),
    "configuration": Format(
        make=first_format, load=TransformerDenoiser.load, is_sound=is_finite, damage=in_json("config.json")
    ),
    "cache": Format(make=made_cache, load=LogitCache.open),
    "jpc": Format(
        make=lambda f: (f / "model.jpc").write_bytes(pickle.dumps(jpc_records(), 4)),
        load=lambda f: load_jpc(f / "model.jpc", seed=0),
        is_sound=normalises,
    ),
    "jpc, other records": Format(
        make=lambda f: (f / "model.jpc").write_bytes(pickle.dumps(jpc_records(), 4)),
        load=lambda f: load_jpc(f / "model.jpc", seed=0),
        is_sound=normalises,
        damage=damaged_records,
    ),
    "jpc, instructions": Format(
        make=lambda f: (f / "model.jpc").write_bytes(pickle.dumps(jpc_records(), 4)),
        load=lambda f: load_jpc(f / "model.jpc", seed=0),
        is_sound=normalises,
        damage=soup,
    ),
    "region graph": Format(
        make=lambda f: GRAPH.save(f / "graph.json"), load=lambda f: ct.RegionGraph.load(f / "graph.json")
    ),
    "region graph, other values": Format(
        make=lambda f: GRAPH.save(f / "graph.json"),
        load=lambda f: ct.RegionGraph.load(f / "graph.json"),
        damage=in_json("graph.json"),
    ),
    "recipe": Format(
        make=made_recipe,
        load=lambda f: read_recipe(f / "recipe.json"),
        is_sound=lambda recipe: isinstance(recipe, Recipe),
        damage=in_json("recipe.json", without_hash),
    ),
    "tokenizer": Format(
        make=lambda f: train_tokenizer(["some text"]).save(f), load=lambda f: TextTokenizer.load(f).encode("text")
    ),
    "checkpoint": Format(make=made_checkpoint, load=fit, damage=in_file("run.safetensors")),
    "corpus": Format(make=made_corpus, load=read_text_of_lines),
    "corpus, other text": Format(make=made_corpus, load=read_text_of_lines, damage=damaged_lines),
    "settings of CoDD": Format(
        make=lambda f: (f / "codd_config.json").write_text(json.dumps(CODD)),
        load=lambda f: CoddConfig.read(f / "codd_config.json"),
    ),
    "published weights": Format(make=made_weights, load=read_folder_of_weights),
}
