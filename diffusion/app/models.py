"""The models that a command works with: those of a folder of ours, or a real denoiser with a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

from diffusion.app.option_groups import OptionGroup, flag, optional
from diffusion.decoding.head_mixture import MIXTURE_FILE, HeadMixture
from diffusion.decoding.joint import JointHead
from diffusion.decoding.names import MODELS, elsewhere, flags
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead

DEFAULT_OUT = Path("unfactor-demo")
BLOCK_LENGTH = 32
"""Tokens of a block where neither a head nor the denoiser says."""
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Models:
    """What decodes and is evaluated, and the name of its folder or model for messages."""

    name: str
    denoiser: Denoiser
    tokenizer: Any
    head: JointHead | None
    device: torch.device

    @property
    def block_length(self) -> int:
        """Tokens of a block: the head's, or else those of the denoiser's training."""
        if self.head is not None:
            return self.head.block_length
        return int(getattr(getattr(self.denoiser, "config", None), "block_length", BLOCK_LENGTH))


def open_models(
    out: Path | None = None,
    *,
    model: str | None = None,
    head: Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_circuit: bool = True,
) -> Models:
    """Load a folder's models, or a real denoiser by name, and the head on top of it.

    Args:
        out: the folder, where no model is named; by default ``unfactor-demo``.
        model: a name on the hub or a folder, see :func:`~diffusion.denoisers.pretrained.load_denoiser`.
        head: a saved head, or a circuit of PyJuice's as CoDD has them (a ``.jpc`` file, or a folder or repository with
            one); by default the folder's, and none for a named model.
        device: "cpu", "cuda", or "auto".
        dtype: of a named model's weights: "float32", "bfloat16" or "float16"; by default as they are stored.
        revision: of a named model.
        trust_remote_code: whether a named model may run code of its own.
        use_circuit: whether a head is loaded at all.
    """
    device = chosen_device(device)
    own_head = _head_at(head, device) if use_circuit and head is not None else None
    if model is None:
        return _of_folder(out or DEFAULT_OUT, own_head, device, use_circuit, given=(dtype, revision))
    if out is not None:
        raise ArgumentError(f"out: expected a folder or a model, got both ({out} and {model}); leave out one of them")
    if dtype is not None and dtype not in _DTYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    from diffusion.denoisers.pretrained import load_denoiser
    from diffusion.text.hub_tokenizer import load_tokenizer

    denoiser = load_denoiser(
        model,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(model, revision=revision)
    if own_head is not None:
        own_head.check_tokenizer(tokenizer.fingerprint)
    return Models(name=model, denoiser=denoiser, tokenizer=tokenizer, head=own_head, device=torch.device(device))


def _head_at(path: Path, device: str) -> CoupledHead | HeadMixture:
    if (path / MIXTURE_FILE).is_file():
        return HeadMixture.load(path, device=device)
    if path.is_dir() and not any(path.glob("*.jpc")):
        return CoupledHead.load(path, device=device)
    return CoupledHead.from_jpc(path, device=device)


def _of_folder(
    folder: Path, head: JointHead | None, device: str, use_circuit: bool, given: tuple[str | None, ...]
) -> Models:
    from diffusion.app.workspace import Workspace

    if any(value is not None for value in given):
        raise ArgumentError("model: expected its name with dtype or revision, got none; name it with --model")
    workspace = Workspace(folder, progress=False, device=device)
    if use_circuit and head is None:
        head = workspace.head()
    return workspace.models(head)


def chosen_device(name: str) -> str:
    """Return the device that "auto" stands for, or the one that was named."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


class ModelOptions(OptionGroup):
    """Which models to use: those of a folder, or a real one."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "out": optional(Path, "Folder of the models.", "--out", shown=str(DEFAULT_OUT)),
        "model": optional(
            str,
            f"In place of a folder: a model by its name on the hub, or a path.{elsewhere('model')}",
            *("--model", *flags("model")),
        ),
        "model_alias": optional(
            str,
            "A model by CoDD's name: "
            + ", ".join(f"{alias} is {name}" for alias, name in MODELS.items())
            + "; --model says where else it is.",
        ),
        "head": optional(
            Path,
            "A saved head, or a mixture of heads; or a circuit that PyJuice wrote, as CoDD has them: a .jpc file, or a "
            f"folder or repository of the hub with one.{elsewhere('head')}",
            *("--head", *flags("head")),
            shown="the folder's; none with --model",
        ),
        "dtype": optional(str, f"Of a named model's weights: {', '.join(_DTYPES)}.", shown="as stored"),
        "revision": optional(str, "Of a named model."),
        "trust_remote_code": flag("Let a named model run code of its own.", "--trust-remote-code"),
        "device": Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto'.")],
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"trust_remote_code": False, "device": "auto"}

    @property
    def is_named(self) -> bool:
        """Whether a model is named, in place of a folder."""
        return self.model is not None or self.model_alias is not None

    def open(self, *, use_circuit: bool = True) -> Models:
        """Load them; raises as :func:`open_models`."""
        given = dict(self.given)
        alias = given.pop("model_alias")
        if alias is not None and alias not in MODELS:
            raise ArgumentError(f"model_alias: expected {' or '.join(MODELS)}, got {alias!r}; name it with --model")
        return open_models(**{**given, "model": given["model"] or MODELS.get(alias)}, use_circuit=use_circuit)
