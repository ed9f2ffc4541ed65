"""What the program prints in the terminal: lines, and tables of results. No text that it is given is markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(message: str, *, title: str = "") -> None:
    """Print a line, however long it is, behind a title in bold."""
    Console(soft_wrap=True, highlight=False).print(Text.assemble((f"{title} " if title else "", "bold"), message))


def new_table(title: str) -> Table:
    """Return an empty table with a title; none with ""."""
    return Table(title=Text(title, style="table.title") if title else None, title_justify="left")


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
    closed = f"{seen}: the circuit closes {row.share_closed} of the gap, in nats"
    return f"{closed} ({ABOVE_ONE})." if row.share_closed.value > 1 else f"{closed}."


def print_gap(table: Any) -> None:
    """Print the gap table."""
    from diffusion.evaluation.gap import MODELS, rounded

    rows = []
    for row in table.rows:
        share = with_interval(row.share_closed) if row.is_meaningful else Text("not\nmeaningful")
        rows.append((Text(rounded(row.mask_ratio)), *(with_interval(getattr(row, name)) for name in MODELS), share))
    title = f"Perplexity of masked tokens, {table.num_windows} held-out blocks (95 % interval)"
    titles = ("mask ratio", "one-step", "circuit alone", "coupled", "sequential", "share closed")
    _print_numbers(title, titles, rows, table.notes)


def _print_numbers(
    title: str, titles: Iterable[str], rows: Iterable[Iterable[Text]], notes: Iterable[str] = ()
) -> None:
    shown = new_table(title)
    for name in titles:
        shown.add_column(Text(name), justify="right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    for note in notes:
        say(f"({note})")


def print_texts(cells: Any, title: str) -> None:
    """Print texts side by side, a title row first; nothing in them is markup."""
    Console(soft_wrap=True, highlight=False).print(Text(title, style="italic"))  # a table would break it
    shown = Table(show_lines=True)
    for column in cells[0]:
        shown.add_column(Text(column), overflow="fold")
    for row in cells[1:]:
        shown.add_row(*map(Text, row))
    Console().print(shown)


def print_annotations(table: Any) -> None:
    """Print the share of right calculator annotations at each number of calls."""
    titles, *rows = table.cells()
    title = f"Calculator annotations that are right, {table.num_texts} texts (95 % interval)"
    _print_numbers(title, titles, (map(Text, row) for row in rows), table.notes)


def print_few_steps(table: Any) -> None:
    """Print the share of right texts at each number of steps."""
    rows = ((Text(str(row.num_steps)), *map(with_interval, (row.without, row.coupled))) for row in table.rows)
    titles = ("steps per block", "without circuit", f"with circuit ({table.decode})")
    _print_numbers(f"Share of {table.num_texts} texts: {table.criterion} (95 % interval)", titles, rows)


def print_curve(table: Any) -> None:
    """Print the few-step curve."""
    titles, *rows = table.cells()
    title = f"{table.block_length} tokens in few calls, {table.num_texts} texts (nats per token, 95 % intervals)"
    print_cells(title, [[name.replace("-", "-\n") for name in titles], *rows], overflow="fold")


def with_interval(estimate: Any) -> Text:
    """Write the interval below the value, so that six columns fit a terminal of 80."""
    from diffusion.evaluation.gap import rounded

    low, high = (rounded(end, 2 if estimate.high < 10 else 1) for end in (estimate.low, estimate.high))
    return Text.assemble(rounded(estimate.value), "\n", (f"{low}..{high}", "dim"))


def print_cells(title: str, cells: Any, overflow: Literal["fold", "ellipsis"] = "ellipsis") -> None:
    """Print a table of words, a title row first; the first column is text, and the others are numbers.

    Cells are broken where they can be: many columns are to fit a terminal of 80.
    """
    titles, *rows = cells
    shown = new_table(title)
    for column, name in enumerate(titles):
        shown.add_column(Text(name), justify="right" if column else "left", overflow=overflow)
    for name, *numbers in rows:
        broken = name.replace(", ", ",\n").replace(" (", "\n(")
        shown.add_row(Text(broken), *(Text(number.replace(" [", "\n[")) for number in numbers))
    Console().print(shown)
