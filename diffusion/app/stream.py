"""Text in the terminal as it fills in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from diffusion.decoding.generation import Step
from diffusion.decoding.pictures import PLACEHOLDER, written_text

SEPARATOR = "-" * 40
"""Between texts, which may have several lines."""


@contextmanager
def streamed(tokenizer: Any, console: Console | None = None) -> Iterator[Callable[[Step], None]]:
    """Yield an ``on_step`` that draws the texts of every step in place; where there is no terminal, a line per text."""
    console = console or Console()

    def texts(step: Step) -> list[str]:
        return [written_text(row, tokenizer, tokenizer.mask_id) for row in step.tokens.tolist()]

    if not console.is_terminal:

        def print_lines(step: Step) -> None:
            for text in texts(step):
                console.out(f"{step.number}: {' '.join(text.split())}", highlight=False)

        yield print_lines
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def draw(step: Step) -> None:
            shown = Text(f"\n{SEPARATOR}\n".join(texts(step)))
            shown.highlight_regex(f"{PLACEHOLDER}+", "dim")
            live.update(shown, refresh=True)

        yield draw
