"""The results of ``gpu.py`` as Markdown."""

from __future__ import annotations

from typing import Any

_COLUMNS = ("case", "candidate", "ms", "least to greatest", "x floor", "peak MB")


def markdown(results: dict[str, Any]) -> str:
    """Return one table a section, below what the figures depend on."""
    lines = [f"- {name}: {value}" for name, value in results["environment"].items()]
    if results["is_quick"]:
        lines.append("- tiny sizes: a smoke test, no measurement")
    for name, section in results["sections"].items():
        lines += ["", f"### {name.replace('_', ' ').capitalize()}", ""]
        if section["problem"]:
            lines += [f"This section ended early: {_cell(section['problem'])}", ""]
        if section["rows"]:
            lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
            lines += [_line(row) for row in section["rows"]]
        if section["notes"]:
            lines += ["", *(f"- {_cell(note)}" for note in section["notes"])]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    spread = "" if row["least"] is None else f"{_number(row['least'])} to {_number(row['greatest'])}"
    cells = [row["case"], row["name"], _number(row["milliseconds"]), spread, _number(row["times_floor"])]
    if row["problem"]:
        cells[3] = row["problem"]
    return "| " + " | ".join(_cell(text) for text in (*cells, _number(row["peak_megabytes"]))) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
