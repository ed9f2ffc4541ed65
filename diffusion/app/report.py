"""One page that shows what was measured: self-contained, readable on a phone and without a mouse, without a network.

What texts say is never markup: the page's own parts are escaped, and the fillings are data that its script writes as
text.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from circuits.files import replace_file
from diffusion.decoding.pictures import PLACEHOLDER
from diffusion.errors import ArgumentError

if TYPE_CHECKING:
    from diffusion.decoding.generation import Generation

_TEMPLATE = Path(__file__).with_name("report_template.html")
Frame = tuple[tuple[str, str], ...]
"""The pieces of a text at one step, each with its state: "masked", "new" or "old"."""


@dataclass(frozen=True)
class Filling:
    """How the text after a prompt filled in, decoded in different ways.

    Attributes:
        prompt: the text before it.
        sides: of every way its name and its frames, the first of which is before the first call.
    """

    prompt: str
    sides: tuple[tuple[str, tuple[Frame, ...]], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, words, a table, a picture, in this order; what is missing is left out.

    Attributes:
        heading: its title.
        words: a paragraph.
        cells: a table, a title row first.
        is_text: whether the cells are texts, of which every line feed and space is shown.
        picture: a PNG file, which becomes part of the page.
        alt: what is on the picture, in words.
    """

    heading: str
    words: str = ""
    cells: Sequence[Sequence[str]] = ()
    is_text: bool = False
    picture: Path | None = None
    alt: str = ""


def frames_of(out: Generation, tokenizer: Any, mask_id: int, *, row: int = 0) -> tuple[Frame, ...]:
    """Return how a generated text filled in, a frame for the start and one after every call.

    Args:
        out: what ``generate`` returned, with ``record=True``.
        tokenizer: with a method ``decode``, from ids to text.
        mask_id: of the mask token.
        row: which text of the batch.

    Raises:
        ArgumentError: nothing was recorded.
    """
    if out.trajectory is None:
        raise ArgumentError("out: expected a recorded trajectory, got none; decode with record=True")
    states = out.trajectory[:, row, out.prompt_length :].tolist()
    frames, before = [], states[0]
    for ids in states:
        pieces = []
        for id, earlier in zip(ids, before, strict=True):
            state = "masked" if id == mask_id else "new" if earlier == mask_id else "old"
            pieces.append((PLACEHOLDER if id == mask_id else str(tokenizer.decode([id])), state))
        frames.append(tuple(pieces))
        before = ids
    return tuple(frames)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str = "",
    sections: Sequence[Section] = (),
    fillings: Sequence[Filling] = (),
) -> None:
    """Write the page, in one piece.

    Args:
        path: an .html file.
        title: of the page.
        summary: a line below it.
        sections: its parts, in this order.
        fillings: texts to step through, shown after the first section; all decoded in the same ways.
    """
    parts = [_section(section) for section in sections]
    if fillings:
        parts.insert(1, _player(fillings))
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        summary=html.escape(summary),
        body="\n".join(parts),
        fillings=_as_data([_described(filling) for filling in fillings]),
    )
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.heading)}</h2>"]
    if section.words:
        parts.append(f"<p>{html.escape(section.words)}</p>")
    if section.cells:
        parts.append(_table(section.cells, "text" if section.is_text else ""))
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        parts.append(f'<figure><img alt="{html.escape(section.alt)}" src="data:image/png;base64,{data}"></figure>')
    return "\n".join([*parts, "</section>"])


def _table(cells: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table; on narrow screens each row is a list, whose entries are called by ``data-label``."""
    titles, *rows = cells
    head = "".join(f'<th role="columnheader" scope="col">{html.escape(title)}</th>' for title in titles)
    lines = [
        '<tr role="row">'
        + "".join(
            f'<td role="cell" class="{kind}" data-label="{html.escape(title)}">{html.escape(cell)}</td>'
            for title, cell in zip(titles, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    head = f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
    return (
        f'<table role="table" class="{kind and "texts"}">\n{head}\n<tbody role="rowgroup">\n'
        + "\n".join(lines)
        + "\n</tbody></table>"
    )


def _player(fillings: Sequence[Filling]) -> str:
    first = fillings[0]
    last = max(len(frames) for _, frames in first.sides) - 1
    prompts = "".join(
        f'<button type="button" data-prompt="{number}" aria-pressed="false">Prompt {number + 1}</button>'
        for number in range(len(fillings))
    )
    sides = "".join(
        f'<div class="side"><h3>{html.escape(name)}</h3><div class="text" id="side{number}"></div></div>'
        for number, (name, _) in enumerate(first.sides)
    )
    return f"""<section id="player" hidden>
<h2>Step by step</h2>
<p class="soft">Tokens of the last call are highlighted; masked ones are {PLACEHOLDER}.</p>
<div class="controls" role="group" aria-label="Prompt">{prompts}</div>
<div class="controls"><button type="button" id="play" aria-pressed="false">Play</button>
<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" aria-label="Denoiser calls">
<output id="said" aria-live="polite"></output></div>
<p class="text given" id="prompt"></p>
<div class="sides">{sides}</div>
</section>"""


def _described(filling: Filling) -> dict[str, Any]:
    return {"prompt": filling.prompt, "sides": [{"name": name, "frames": frames} for name, frames in filling.sides]}


def _as_data(content: Any) -> str:
    """Return JSON that can stand inside a script element: nothing in it opens or closes one."""
    text = json.dumps(content)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
