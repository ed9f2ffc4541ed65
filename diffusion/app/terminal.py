"""What the program prints in the terminal: lines with markup, and tables of results."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(message: str) -> None:
    """Print a line with markup, however long it is."""
    Console(soft_wrap=True, highlight=False).print(message)


def conclusion(row: Any) -> str:
    """Say in words what a row of the gap table shows, and what it does not."""
    from diffusion.evaluation.gap import ABOVE_ONE, NOT_MEANINGFUL, rounded

    one_step, coupled, sequential = (rounded(getattr(row, n).value, 1) for n in ("one_step", "coupled", "sequential"))
    masked = "every token of a block" if row.mask_ratio == 1 else f"a share of {rounded(row.mask_ratio)} of a block"
    seen = (
        f"with {masked} masked, one step of the denoiser alone has perplexity {one_step}, with the circuit {coupled}, "
        f"one token at a time {sequential}"
    )
    if not row.is_meaningful:
        return f"{seen}. What share of the gap the circuit closes is {NOT_MEANINGFUL}; train it longer."
    closed = f"{seen}: the circuit closes {row.share_closed} of the gap, in nats".replace("[", "\\[")  # not markup
    return f"{closed} ({ABOVE_ONE})." if row.share_closed.value > 1 else f"{closed}."


def print_gap(table: Any) -> None:
    """Print the gap table."""
    from diffusion.evaluation.gap import MODELS, rounded

    shown = Table(
        title=f"Perplexity of masked tokens, {table.num_windows} held-out blocks (95 % interval)", title_justify="left"
    )
    for column in ("mask ratio", "one-step", "circuit alone", "coupled", "sequential", "share closed"):
        shown.add_column(column, justify="right")
    for row in table.rows:
        share = with_interval(row.share_closed) if row.is_meaningful else "not\nmeaningful"
        shown.add_row(rounded(row.mask_ratio), *(with_interval(getattr(row, name)) for name in MODELS), share)
    Console().print(shown)
    for note in table.notes:
        say(f"({note})")


def print_texts(cells: Any, title: str) -> None:
    """Print texts side by side, a title row first; nothing in them is markup."""
    Console(soft_wrap=True, highlight=False).print(Text(title, style="italic"))  # a table would break it
    shown = Table(show_lines=True)
    for column in cells[0]:
        shown.add_column(column, overflow="fold")
    for row in cells[1:]:
        shown.add_row(*map(Text, row))
    Console().print(shown)


def print_annotations(table: Any) -> None:
    """Print the share of right calculator annotations at each number of calls."""
    shown = Table(
        title=f"Calculator annotations that are right, {table.num_texts} texts (95 % interval)", title_justify="left"
    )
    titles, *rows = table.cells()
    for title in titles:
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)
    for note in table.notes:
        say(f"({note})")


def print_few_steps(table: Any) -> None:
    """Print the share of right texts at each number of steps."""
    shown = Table(title=f"Share of {table.num_texts} texts: {table.criterion} (95 % interval)", title_justify="left")
    for column in ("steps per block", "without circuit", f"with circuit ({table.decode})"):
        shown.add_column(column, justify="right")
    for row in table.rows:
        shown.add_row(str(row.num_steps), with_interval(row.without), with_interval(row.coupled))
    Console().print(shown)


def print_curve(table: Any) -> None:
    """Print the few-step curve."""
    titles, *rows = table.cells()
    shown = Table(
        title=f"{table.block_length} tokens in few calls, {table.num_texts} texts (nats per token, 95 % intervals)",
        title_justify="left",
    )
    for column, title in enumerate(titles):
        shown.add_column(title.replace("-", "-\n"), justify="right" if column else "left", overflow="fold")
    for row in rows:
        name, *numbers = row
        lines = (number.replace(" [", "\n\\[") for number in numbers)  # so that seven columns fit a terminal of 80
        shown.add_row(name.replace(", ", ",\n").replace(" (", "\n("), *lines)
    Console().print(shown)


def with_interval(estimate: Any) -> str:
    """Write the interval below the value, so that six columns fit a terminal of 80."""
    from diffusion.evaluation.gap import rounded

    low, high = (rounded(end, 2 if estimate.high < 10 else 1) for end in (estimate.low, estimate.high))
    return f"{rounded(estimate.value)}\n[dim]{low}..{high}[/]"


def print_cells(title: str, cells: Any) -> None:
    """Print a table of words, a title row first; the first column is text, and the others are numbers.

    Args:
        title: of the table; "" for none.
        cells: its rows.
    """
    titles, *rows = cells
    shown = Table(title=title or None, title_justify="left")
    for column, name in enumerate(titles):
        shown.add_column(name, justify="right" if column else "left")
    for row in rows:
        name, *numbers = row
        broken = name.replace(", ", ",\n").replace(" (", "\n(")  # so that as many columns as can fit a terminal of 80
        shown.add_row(broken, *(number.replace(" [", "\n\\[") for number in numbers))
    Console().print(shown)
