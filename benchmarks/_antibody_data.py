"""AntiBERTy and antibody reads from the Python package registry, as a model folder and a file of chains.

``antiberty==0.1.3`` (MIT; Ruffolo, Gray, Sulam 2021, arXiv 2112.07782) holds a BERT of 25.8 M parameters,
``abstar==0.8.0`` (MIT) 1,000 nucleotide reads of human antibodies. Both are wheels: nothing of them is installed or
executed.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save_file

from circuits.files import file_hash, replace_file
from circuits.store import replace_folder

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *RESIDUES)
LENGTH = 100
"""Residues of a window."""
AFTER_MOTIF = 7
"""Residues of a window that follow WGxG: TxVTVSS in most heavy chains. So windows are aligned at their end."""

WHEELS = {
    "antiberty==0.1.3": "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
    "abstar==0.8.0": "c3c25dd4c0ebcd8173fdd4737539957dfd2f5ca25a0a71cc7a1f2643cdb898f4",
    "olga==1.3.0": "8ede22a43da951923ab28e1e0566185252e0851401f4d4d1456b83f0c39a7408",
}
"""The SHA-256 of each wheel, as the registry has it."""
MODEL_MEMBERS = "antiberty/trained_models/AntiBERTy_md_smooth"
READS_MEMBER = "abstar/test_data/test_1k.fasta"

_NOT_OURS = ("bert.pooler", "cls.species", "cls.chain", "cls.graft", "bert.embeddings.position_ids")
"""Weights of heads that a masked language model does not have."""
_MOTIF = re.compile("WG[A-Z]G")
_CHAIN = re.compile("C[A-Z]{4,40}WG[A-Z]G")


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return the folder of the model and the file of chains, which are made first if they are not there."""
    model, chains = prepare_model(folder), folder / "chains.txt"
    if not chains.is_file():
        with zipfile.ZipFile(wheel(folder, "abstar==0.8.0")) as archive:
            found = chains_of(archive.read(READS_MEMBER).decode("ascii"))
        with replace_file(chains) as temporary:
            temporary.write_text("\n".join(found) + "\n", encoding="ascii")
    return model, chains


def prepare_model(folder: Path) -> Path:
    """Return the folder of the model, which is made first if it is not there."""
    if not (folder / "model" / "config.json").is_file():
        write_model(wheel(folder, "antiberty==0.1.3"), folder / "model")
    return folder / "model"


def wheel(folder: Path, requirement: str) -> Path:
    """Return a package's wheel, which is downloaded first if it is not there, and compared with its hash."""
    name, version = requirement.split("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
    if file_hash(path) != WHEELS[requirement]:
        raise SystemExit(f"{path}: expected the wheel with SHA-256 {WHEELS[requirement]}, got another; delete it")
    return path


def write_model(wheel: Path, folder: Path) -> None:
    """Write a folder that ``df.load_denoiser`` reads: config, safetensors, tokenizer. No code of the wheel is run."""
    with zipfile.ZipFile(wheel) as archive:
        config = json.loads(archive.read(f"{MODEL_MEMBERS}/config.json"))
        file = BytesIO(archive.read(f"{MODEL_MEMBERS}/pytorch_model.bin"))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    kept = {name: tensor.clone() for name, tensor in weights.items() if not name.startswith(_NOT_OURS)}
    config |= {"architectures": ["BertForMaskedLM"]}
    tokens = {token: id for id, token in enumerate(VOCABULARY)}
    from transformers import BertTokenizer

    with replace_folder(folder, ("config.json", "model.safetensors"), kind="a model") as temporary:
        BertTokenizer(vocab=tokens, do_lower_case=False, model_max_length=512).save_pretrained(temporary)
        save_file(kept, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="ascii")


def chains_of(fasta: str) -> list[str]:
    """Return the chains that reads hold, without repetition: translated in all six frames, with the motif C...WGxG."""
    found = []
    for read in (record.partition("\n")[2] for record in fasta.split(">")[1:]):
        bases = "".join(read.split()).upper()
        for strand in (bases, bases.translate(str.maketrans("ACGT", "TGCA"))[::-1]):
            for frame in range(3):
                parts = re.split("[*X]", translated(strand[frame:]))
                found += [part for part in parts if _CHAIN.search(part)]
    return sorted(set(found))


def translated(bases: str) -> str:
    """Return the residues of the codons, by the standard code; "*": stop, "X": unreadable."""
    codons = map("".join, itertools.product("TCAG", repeat=3))
    table = dict(zip(codons, "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG", strict=True))
    return "".join(table.get(bases[start : start + 3], "X") for start in range(0, len(bases) - 2, 3))


def window_of(chain: str) -> str | None:
    """Return the 100 residues that end seven behind the last WGxG; None of a chain that has fewer."""
    end = max(match.end() for match in _MOTIF.finditer(chain)) + AFTER_MOTIF
    return chain[end - LENGTH : end] if end >= LENGTH and end <= len(chain) else None


@dataclass(frozen=True)
class Split:
    """Windows of chains, ids int64 (N, 100): none of one part is a near duplicate of one of another.

    Attributes:
        train: to fit on.
        held_out: to measure on.
        num_clusters: groups of near duplicates, which are never divided.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    num_clusters: int


def split_windows(chains: list[str], *, held_out: float = 0.25, seed: int = 0) -> Split:
    """Divide windows into training and held-out ones, whole clusters at a time; a cluster held out gives one window.

    Two windows are near duplicates, and so are chains of such pairs, if at most five of their 100 residues differ, or
    if the third loops (CDR3, from the C before it to the W behind it) are equally long and at least 80 % alike, by
    which reads are usually taken for one clone. Relatives by the same germline genes are in both parts: they are what
    there is to learn.
    """
    windows = sorted({window for window in map(window_of, chains) if window is not None})
    ids = torch.tensor([[VOCABULARY.index(residue) for residue in window] for window in windows])
    cluster = list(range(len(windows)))

    def root(one: int) -> int:
        while cluster[one] != one:
            one = cluster[one]
        return one

    loops = [window[cdr3_start(window) : LENGTH - AFTER_MOTIF - 3] for window in windows]
    differ = (ids.unsqueeze(1) != ids).sum(-1)
    for one, other in itertools.combinations(range(len(windows)), 2):
        if int(differ[one, other]) <= 5 or alike(loops[one], loops[other]) >= 0.8:
            cluster[root(one)] = root(other)
    members: dict[int, list[int]] = {}
    for one in range(len(windows)):
        members.setdefault(root(one), []).append(one)
    groups = list(members.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    num_held_out = round(held_out * len(groups))
    train = [one for group in order[num_held_out:] for one in groups[group]]
    return Split(ids[train], ids[[groups[group][0] for group in order[:num_held_out]]], len(groups))


def cdr3_start(window: str) -> int:
    """Return where the last C before the motif stands."""
    return window.rindex("C", 0, LENGTH - AFTER_MOTIF - 4)


def alike(one: str, other: str) -> float:
    """Return the share of equal residues of two loops; 0 if one is longer."""
    return sum(map(str.__eq__, one, other)) / len(one) if len(one) == len(other) else 0.0
