"""Results of a measurement of many settings, a file each, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits import CompiledCircuit
from circuits.digests import digest, named_digest
from diffusion.denoisers.base import Denoiser
from diffusion.denoisers.questions import raw_logits
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.head import SETTINGS, CoupledHead
from diffusion.json_files import read_json, write_json

FORMAT = "unfactor-kept-point"
_DECIMALS = 2
_NUM_ASKED = 4


class KeptPoints:
    """A folder with the result of each setting, and what it depends on; results of anything else are measured anew.

    A file is written when its setting is done, atomically. One that is damaged, or was written for another model, other
    data or options, is as good as none. Without a folder nothing is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, str]) -> None:
        if not isinstance(folder, str | os.PathLike | None):
            raise ArgumentError(f"folder: expected a path or None, got {folder!r:.60}")
        self.folder = None if folder is None else Path(folder)
        self.identity = dict(identity)

    @property
    def way_on(self) -> str | None:
        """How a measurement goes on that was stopped, in words; None where nothing is kept."""
        return None if self.folder is None else f"the same call goes on from what is kept in {self.folder}"

    def get(self, name: str, options: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a setting as JSON has it: the one that is kept, or a new one, which is kept.

        The setting's name names the file; ``options`` are what else this result depends on.
        """
        if self.folder is None:
            return measure()
        slug = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)
        path = self.folder / f"{slug}.json"
        depends_on = {**self.identity, "options": options}
        kept = _read(path, depends_on)
        if kept is None:
            kept = json.loads(json.dumps(measure()))
            content = {"depends_on": depends_on, "result": kept}
            write_json(path, {"format": FORMAT, **content, "sha256": _hash(content)})
        return kept


def _read(path: Path, depends_on: Mapping[str, str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = read_json(path)
        content = {"depends_on": found["depends_on"], "result": found["result"]}
        is_whole = found["format"] == FORMAT and found["sha256"] == _hash(content)
    except (CheckpointError, KeyError, TypeError):
        return None
    return dict(found["result"]) if is_whole and found["depends_on"] == depends_on else None


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identity_of(denoiser: Denoiser, head: CoupledHead | None, data: Tensor) -> dict[str, str]:
    """Return hashes that change whenever a denoiser, a head or the data, int64 (N, T), do.

    A denoiser is known by its weights, where it or what it holds is a module, and by what it says of some of the data.
    """
    return {
        "denoiser": digest(type(denoiser).__qualname__, repr(denoiser.spec), _weights(denoiser), _said(denoiser, data)),
        "head": "none" if head is None else _of_head(head),
        "data": digest(data),
    }


def _weights(denoiser: Denoiser) -> str:
    if isinstance(denoiser, nn.Module):
        return named_digest(denoiser.state_dict())
    modules = {name: value for name, value in getattr(denoiser, "__dict__", {}).items() if isinstance(value, nn.Module)}
    return named_digest({name: named_digest(module.state_dict()) for name, module in modules.items()})


@torch.no_grad()
def _said(denoiser: Denoiser, data: Tensor) -> str:
    """Return a hash of the best tokens of some texts' masked halves, and how probable these are, roughly."""
    canvas = data[:_NUM_ASKED].clone()
    canvas[:, 1::2] = denoiser.spec.mask_id
    logits = raw_logits(denoiser, canvas, valid=None, t=None, window=(0, canvas.shape[1]))[:, 1::2]
    best = torch.softmax(logits.float(), -1).max(-1)
    return digest(best.indices, (best.values * 10**_DECIMALS).round().to(torch.int64))


def circuit_digest(pc: CompiledCircuit) -> str:
    """Return a hash of a circuit, its structure and its weights."""
    return digest(repr(pc.circuit), named_digest(pc.state_dict()))


def _of_head(head: CoupledHead) -> str:
    vocabulary = None if head.vocabulary is None else head.vocabulary.tolist()
    settings = [getattr(head, name) for name in SETTINGS] + [vocabulary]
    conditioners = [(type(made).__qualname__, made.settings()) for made in head.conditioners]
    return digest(repr(head.pc.circuit), str(settings), str(conditioners), named_digest(head.state_dict()))
