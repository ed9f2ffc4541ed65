"""Circuits and heads from one form of file to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import circuits as ct
from circuits.interop import save_jpc
from diffusion.app.commands.common import app, one_of
from diffusion.app.terminal import say
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead

_FORMS = {
    "folder": "a head of this program, for --head; its circuit is in the folder's circuit/",
    "jpc": "a checkpoint that pyjuice.load reads",
    "codd": "the same with the inputs that CoDD's decoder needs",
}


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A .jpc file, a folder or repository of the hub with one, a saved head, a saved circuit."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder or the .jpc file to write.")],
    to: Annotated[
        str, typer.Option(help=" ".join(f"{form}: {meaning}." for form, meaning in _FORMS.items()))
    ] = "folder",
    revision: Annotated[str | None, typer.Option(help="Of a repository.", show_default=False)] = None,
) -> None:
    """Turn a circuit that PyJuice wrote, such as CoDD's, into a head of this program, or back.

    Nothing in a file that is read is executed. Writing needs PyJuice, and nothing but the circuit is written.
    """
    form = one_of("to", to, tuple(_FORMS))
    head = _head_at(source, revision)
    if form == "folder":
        head.save(out)
        say(f"{head.pc.circuit} is in {out}/; next: unfactor generate --model MODEL --head {out}")
        return
    lost = [type(conditioner).__name__ for conditioner in head.conditioners]
    lost += [f"normalization {head.normalization!r}"] if head.normalization != "global" else []
    if lost:
        raise ArgumentError(
            f"source: expected a head without conditioners, of global normalization, got {', '.join(lost)}, which a "
            f".jpc file does not hold; its circuit alone is {Path(source) / 'circuit'}"
        )
    save_jpc(head.pc, out, for_="codd" if form == "codd" else "pyjuice")
    settings = f"--pc_frac {head.activation_threshold:g} --pc_temperature {head.temperature:g}"
    say(f"{head.pc.circuit} is in {out}" + (f"; the head's settings are {settings}" if form == "codd" else ""))


def _head_at(source: str, revision: str | None) -> CoupledHead:
    folder = Path(source)
    if (folder / "head.safetensors").exists():
        return CoupledHead.load(folder)
    if (folder / "structure.json").exists():
        return CoupledHead(ct.load(folder))
    return CoupledHead.from_jpc(source, revision=revision)
