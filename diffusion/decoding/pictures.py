"""Pictures of decoding: how a text filled in. Pillow and matplotlib's font are loaded when one is drawn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from circuits.arguments import checked_count
from circuits.files import replace_file
from diffusion.errors import ArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

    from diffusion.decoding.generation import Generation

PLACEHOLDER = "░"
"""Of a masked token, in text."""

State = Literal["given", "masked", "new", "old", "gone"]
_COLOURS: dict[State, tuple[str, str | None]] = {  # of text and background
    "given": ("#8a8a8a", None),
    "masked": ("#d9d9d9", "#e9e9e9"),
    "new": ("#ffffff", "#1f6fb4"),
    "old": ("#1d1d1d", None),
    "gone": ("#ffffff", None),
}
_SHOWN = {"\n": "↵", "\t": "→", "": "∎"}
_FONT_SIZE, _MARGIN, _LINE, _MOST_PANELS = 20, 16, 28, 12
_FRAME, _LAST_FRAME = 400, 2500  # milliseconds


def written_text(ids: Sequence[int], tokenizer: Any, mask_id: int, *, placeholder: str = PLACEHOLDER) -> str:
    """Return the text of token ids, with a placeholder for every mask."""
    runs = itertools.groupby(ids, key=lambda id: id == mask_id)
    return "".join(
        placeholder * len(list(run)) if is_mask else str(tokenizer.decode(list(run))) for is_mask, run in runs
    )


def draw_trajectory(
    out: Generation,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    row: int = 0,
    width: int = 64,
    mask_id: int | None = None,
) -> None:
    """Draw how a text filled in: as a picture with the steps below each other, or as an animation.

    Tokens of a step are blue, those of earlier steps black, what was given grey, masks are boxes. Line feeds are shown
    as ↵, ends of text as ∎. A picture of more than 12 states shows some of them.

    Args:
        out: what ``generate`` or ``infill`` returned, with ``record=True``.
        tokenizer: with a method ``decode``, from ids to text.
        path: a .png or .gif file, replaced in one piece.
        row: which text of the batch.
        width: characters in a line.
        mask_id: of the mask token; by default the tokenizer's.

    Raises:
        ArgumentError: nothing was recorded, another suffix, no such row, or the mask token is not known.
    """
    suffix = checked_picture(path)
    if out.trajectory is None:
        raise ArgumentError("out: expected a recorded trajectory, got none; decode with record=True")
    if not 0 <= row < len(out.tokens):
        raise ArgumentError(f"row: expected 0 to {len(out.tokens) - 1}, got {row}")
    checked_count("width", width)
    mask_id = getattr(tokenizer, "mask_id", getattr(tokenizer, "mask_token_id", None)) if mask_id is None else mask_id
    if mask_id is None:
        raise ArgumentError("mask_id: expected the id of the mask token, the tokenizer does not know it; give it here")
    shots = _Shots(out, tokenizer, row, width, mask_id)
    with replace_file(path) as temporary:
        if suffix == ".png":
            shots.picture().save(temporary, format="PNG")
            return
        frames = [shots.frame(index, index - 1) for index in range(shots.count)]
        durations = [_FRAME] * (len(frames) - 1) + [_LAST_FRAME]
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1
        )


def checked_picture(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a picture's file name, in small letters; raises ArgumentError if it is not .png or .gif."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".gif"):
        raise ArgumentError(f"path: expected a .png or .gif file, got {str(path)!r}")
    return suffix


class _Shots:
    """A text at every step, on a grid of characters that stays the same: a token has room for all it ever was."""

    def __init__(self, out: Generation, tokenizer: Any, row: int, width: int, mask_id: int) -> None:
        assert out.trajectory is not None
        states = out.trajectory[:, row].tolist()
        first, final, valid = states[0], out.tokens[row].tolist(), out.valid[row].tolist()
        begins = [ids != mask_id for ids in first]
        kept = [place for place in range(len(final)) if valid[place] or not begins[place]]
        while kept and not valid[kept[-1]]:  # no room for what is after the end
            kept.pop()
        self.mask_id = mask_id
        self.ids = [[ids[place] for place in kept] for ids in states]
        self.valid, self.given = [valid[place] for place in kept], [begins[place] for place in kept]
        known = {id: _printable(str(tokenizer.decode([id]))) for id in {id for ids in self.ids for id in ids}}
        self.texts = known | {mask_id: ""}
        sizes = [max(1, *(len(self.texts[ids[i]]) for ids in self.ids)) for i in range(len(kept))]
        self.cells: list[tuple[int, int]] = []  # line and column of each token
        line = column = 0
        for size in sizes:
            if column and column + size > width:
                line, column = line + 1, 0
            self.cells.append((line, column))
            column += size
        self.sizes, self.num_lines = sizes, line + 1
        self.columns = max([24, *(column + size for (_, column), size in zip(self.cells, sizes, strict=True))])

    @property
    def count(self) -> int:
        """How many states there are: the beginning, and one per step."""
        return len(self.ids)

    def state(self, place: int, index: int, before: int) -> State:
        """Return what a token is at a step, as against another one before it."""
        if self.given[place]:
            return "given"
        if not self.valid[place]:
            return "gone" if self.ids[index][place] != self.mask_id else "masked"
        if self.ids[index][place] == self.mask_id:
            return "masked"
        is_old = before >= 0 and self.ids[before][place] == self.ids[index][place]
        return "old" if is_old else "new"

    def frame(self, index: int, before: int) -> Image:
        """Draw one state, with what is new since another one."""
        from PIL import Image, ImageDraw

        font = _font()
        advance = round(font.getlength("M"))
        size = 2 * _MARGIN + self.columns * advance, _MARGIN + (self.num_lines + 1) * _LINE + _MARGIN // 2
        image = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(image)
        label = f"step {index} of {self.count - 1}" if index else "before the first step"
        draw.text((_MARGIN, _MARGIN // 2), label, font=font, fill="#b0b0b0")
        for place, (line, column) in enumerate(self.cells):
            state = self.state(place, index, before)
            colour, background = _COLOURS[state]
            x, y = _MARGIN + column * advance, _MARGIN // 2 + (line + 1) * _LINE
            if background is not None:
                right = x + self.sizes[place] * advance - (2 if state == "masked" else 1)
                draw.rectangle((x, y, right, y + _LINE - 4), fill=background)
            if state not in ("masked", "gone"):
                draw.text((x, y), self.texts[self.ids[index][place]], font=font, fill=colour)
        return image

    def picture(self) -> Image:
        """Draw the states below each other, the first and the last among them."""
        from PIL import Image

        panels = min(self.count, _MOST_PANELS)
        chosen = sorted({round(i * (self.count - 1) / max(1, panels - 1)) for i in range(panels)})
        frames = [self.frame(index, before) for before, index in itertools.pairwise([-1, *chosen])]
        height = frames[0].height
        image = Image.new("RGB", (frames[0].width, height * len(frames)), "white")
        for number, frame in enumerate(frames):
            image.paste(frame, (0, number * height))
        return image


def _printable(text: str) -> str:
    return _SHOWN.get(text) or "".join(_SHOWN.get(c, c if c.isprintable() else "·") for c in text)


def _font() -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", _FONT_SIZE)
