"""From a folder with trained models to one that can be shipped, and from the shipped one back to a folder.

What is shipped is a folder like any other, see :mod:`diffusion.app.workspace`, with the denoiser's weights in half
precision, held-out documents in place of the whole text, and MODEL_CARD.md.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from circuits.files import replace_file
from circuits.store import locked, replace_folder
from diffusion.app.folder import HELD_OUT, check_unused
from diffusion.app.model_card import model_card
from diffusion.app.recipe import read_recipe, write_recipe
from diffusion.app.sources import read_digests
from diffusion.app.workspace import Workspace
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.text.gsm8k import FIELD

SHIPPED = Path(__file__).parent / "shipped"
"""The models that come with the distribution."""
LARGEST = 12_000_000
"""Bytes of a packed folder, at most."""
_MODELS = ("recipe.json", "tokenizer.json", "denoiser", "likelihood", "head", HELD_OUT, "MODEL_CARD.md")


def pack(workspace: Workspace, path: str | os.PathLike[str], *, corpus: str = "gsm8k", documents: int = 512) -> int:
    """Write a folder's models, and held-out documents of theirs, into one that can be shipped.

    Args:
        workspace: with a denoiser and a head; its tables, where it has some, become part of the model card.
        path: the folder to write, swapped in as a whole.
        corpus: what the recipe is to call the text, for a path of this machine says nothing elsewhere.
        documents: how many held-out documents at most, spread evenly over them.

    Returns:
        Its size in bytes.

    Raises:
        ArgumentError: it would be larger than 12 MB, or ``path`` holds something else.
        CheckpointError: the folder lacks a model.
    """
    recipe, denoiser = workspace.recipe(), workspace.denoiser()
    head = workspace.head()
    held_out = workspace.held_out(recipe)
    kept = [held_out[index * len(held_out) // documents] for index in range(documents)]
    kept = list(held_out) if documents >= len(held_out) else kept
    text = replace(recipe.text, corpus=corpus, field=FIELD if corpus == "gsm8k" else recipe.text.field)
    with replace_folder(path, _MODELS, kind="a packed folder") as folder:
        denoiser.half().save(folder / "denoiser")  # loading makes float32 of it
        head.save(folder / "head")
        shutil.copytree(workspace.path / "likelihood", folder / "likelihood")
        shutil.copy(workspace.path / "tokenizer.json", folder / "tokenizer.json")
        write_documents(kept, folder / HELD_OUT)
        write_recipe(replace(recipe, text=text), folder / "recipe.json", read_digests(workspace.path))
        card = model_card(replace(recipe, text=text), workspace, num_held_out=len(kept))
        (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST:
            raise ArgumentError(
                f"path: expected at most {LARGEST:,} bytes to ship, got {size:,}; take a smaller denoiser or fewer "
                "documents"
            )
    return size


def write_documents(documents: list[str], path: Path) -> None:
    """Write documents as a compressed JSON object in each line, the same bytes for the same documents."""
    lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    with replace_file(path) as temporary:
        temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))


def unpack(path: str | os.PathLike[str]) -> None:
    """Copy the shipped models into a folder of the user's, where they can be used, tuned and measured like any.

    A folder that has them already is left as it is. Raises CheckpointError if there are none to copy, or the folder
    holds something else.
    """
    folder, source = Path(path), SHIPPED
    if not (source / "recipe.json").exists():
        raise CheckpointError(
            f"{source}: expected models, got none: this copy of the library came without them; train some: "
            "unfactor demo --from-scratch"
        )
    found = folder / "recipe.json"
    if found.exists():
        if read_recipe(found) == read_recipe(source / "recipe.json") and (folder / HELD_OUT).exists():
            return
        raise CheckpointError(f"{folder}: expected the models that are shipped, got others; choose another --out")
    check_unused(folder)
    with locked(folder), replace_folder(folder, (*_MODELS, "results"), kind="a folder of models") as new:
        for name in _MODELS:
            copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
            copy(source / name, new / name)
        (new / "results").mkdir()
