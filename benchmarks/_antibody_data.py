"""AntiBERTy and antibody reads from the Python package registry, as a model folder and a file of chains.

``antiberty==0.1.3`` (MIT; Ruffolo, Gray, Sulam 2021, arXiv 2112.07782) holds a BERT of 25.8 M parameters,
``abstar==0.8.0`` (MIT) 1,000 nucleotide reads of human antibodies. Both are wheels: nothing of them is installed or
executed. That of ``olga==1.3.0`` is unpacked and run as a program of its own, see ``_bed_antibody.py``.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import zipfile
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
