"""How much of the factorization barrier each kind of head removes, on a test bed.

    python benchmarks/barrier.py --bed antibody            # prepares everything, fits, measures, prints the table
    python benchmarks/barrier.py --bed gsm8k --data train.jsonl.gz    # answers, under the denoiser of the demo
    python benchmarks/barrier.py --bed demo                # Python's documentation; trains its denoiser first
    python benchmarks/barrier.py --bed antibody --quick    # the same, tiny, in a folder of its own
    python benchmarks/barrier.py --bed antibody --columns one-step sequential   # these only: for two runs side by side
    python benchmarks/barrier.py --bed antibody --chains 32    # and whole chains in 1, 2, 4, 8, 16 calls

Losses are nats per masked token. *one-step*: the denoiser, all masked tokens independently; *circuit alone*: the
circuit of maximum likelihood; *plain*: their product, fitted; *calibrated*: with a calibration by noise; *potentials*,
*gates*, *low rank*, *all* (potentials and gates): heads that see the denoiser's hidden states too; *matched*: factors
under which the product's marginals become the denoiser's; *aligned ...*: of the bed's own circuit; *switched*: one
step, the circuit alone and all static heads behind a gate that reads the mask ratio, *switched potentials*: the heads
with potentials too; *sequential*: the denoiser, one token at a time; *tuned ...*: the same with the denoiser trained
further on the same text, for as long as *switched potentials* took. Every cell, a column on eight windows, is kept in
a file of ``--folder``: an interrupted run goes on where it was, and one with more ``--windows`` or ``--seeds`` computes
what is new.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from _barrier_chains import CALLS, chains, described, texts_of
from _barrier_fits import GATES, HEADS, QUICK, Fits, Sizes
from _barrier_losses import Losses, Masks, circuit_losses, head_losses, one_step_losses, sequential_losses
from _bed import Bed
from _bed_antibody import antibody_bed
from _bed_text import ANSWERS, TEXT, demo_bed, gsm8k_bed
from torch import Tensor

import diffusion as df
from circuits.files import replace_file
from diffusion.evaluation.gap import Estimate

BEDS = {
    "antibody": (antibody_bed, Sizes(states=128, epochs=4, masks=2, validation_masks=8, learning_rate=0.02)),
    "gsm8k": (gsm8k_bed, ANSWERS),
    "demo": (demo_bed, TEXT),
}
"""What prepares a bed, and how much of everything it is given."""
TUNED = tuple(f"tuned {name}" for name in ("one-step", "switched", "switched potentials", "sequential"))
COLUMNS = ("one-step", "circuit alone", *HEADS, *GATES, "sequential", *TUNED)
CONTEXTUAL = dict.fromkeys(("potentials", "gates", "low rank", "all"), "calibrated") | {
    "aligned potentials": "aligned",
    "matched potentials": "matched",
    "switched potentials": "switched",
    "tuned switched potentials": "tuned switched",
}
"""Heads that see hidden states, and the static ones that they are compared with."""
CHUNK = 8
"""Windows of a cell."""


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Path(os.environ.get("UNFACTOR_BARRIER", Path.home() / ".cache" / "unfactor" / "barrier"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=BEDS, default="antibody")
    parser.add_argument("--data", type=Path, default=os.environ.get("UNFACTOR_GSM8K"), help="GSM8K's train.jsonl[.gz]")
    parser.add_argument("--folder", type=Path, default=default, help="of what is prepared, fitted and measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of splits, masks and fits")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of each kind and seed, at most")
    parser.add_argument("--masks", type=int, help="noisy versions of every training window; the bed's own number")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, help="to measure in this run")
    parser.add_argument(
        "--held-out", nargs="+", help="kinds of held-out windows to measure in this run; all of the bed"
    )
    parser.add_argument(
        "--chains", type=int, default=0, help="whole chains to generate in 1, 2, 4, ... calls, antibody"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, the first seed")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, str]]]:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    prepare, sizes = BEDS[options.bed]
    sizes = replace(sizes, masks=options.masks or sizes.masks)
    seeds, windows = options.seeds, options.windows
    given = {"data": options.data} if options.bed == "gsm8k" else {}
    if options.quick:
        sizes, seeds, windows = QUICK, options.seeds[:1], 2
    home = options.folder / options.bed
    measures = []
    for seed in seeds:
        bed = prepare(home, seed=seed, is_quick=options.quick, **given)
        before = "quick" if options.quick else bed.name
        folder, common = (home / f"{before}-{which}-masks-{sizes.masks}" for which in (seed, "all"))
        fits = Fits(bed, folder, common if bed.is_shared else folder, sizes, seed)
        measure = Measure(fits, folder / "cells", windows)
        for kind in options.held_out or bed.held_out:
            for column in options.columns:
                measure.fill(kind, column)
        measures.append(measure)
    tables = {kind: rows_of(measures, kind) for kind in measures[0].bed.held_out}
    for kind, rows in ((kind, rows) for kind, rows in tables.items() if rows):
        print(f"\n{kind}, nats per masked token, and shares of the gap of the denoiser that a column is about:\n")
        print("\n".join(markdown(rows)))
    if options.chains:
        tables["chains"] = [row for measure in measures for row in chain_rows(measure, options.chains)]
        print(f"\n{options.chains} whole chains of each seed:\n")
        print("\n".join(markdown(tables["chains"])))
    with replace_file(home / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1), encoding="ascii")
    return tables


@dataclass(frozen=True)
class Measure:
    """The cells of one seed."""

    fits: Fits
    folder: Path
    num_windows: int

    @property
    def bed(self) -> Bed:
        """What is measured."""
        return self.fits.bed

    @cached_property
    def tuned(self) -> df.Denoiser:
        """The denoiser that was trained further."""
        assert self.bed.fine_tune is not None
        with torch.enable_grad():
            return self.bed.fine_tune(self.fits.folder / "tuned.safetensors", self.fits.seconds())

    @cached_property
    def forbidden(self) -> tuple[int, ...]:
        """Ids that no block of the bed has."""
        known = set(self.bed.vocabulary)
        return tuple(id for id in range(self.bed.denoiser.spec.vocab_size) if id not in known)

    def masks(self, kind: str) -> Masks:
        """Return the masks of all windows of a kind."""
        seed = self.fits.seed
        if kind in self.bed.parts:
            return Masks.of(self.bed.parts[kind], kind, seed=seed)
        return Masks.at_random(len(self.bed.held_out[kind]), self.bed.block_length, self.bed.ratios, seed=seed)

    def chunks(self, kind: str) -> list[slice]:
        """Return the windows of each cell."""
        total = min(self.num_windows, len(self.bed.held_out[kind]))
        return [slice(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]

    def path(self, kind: str, column: str, rows: slice) -> Path:
        """Return the file of a cell."""
        return self.folder / f"{kind}-{column.replace(' ', '-')}-{rows.start}-{rows.stop}.json"

    @torch.no_grad()
    def fill(self, kind: str, column: str) -> None:
        """Compute the cells of a column that are not there."""
        is_missing = column in TUNED and self.bed.fine_tune is None
        if is_missing or not self.fits.has(column):
            return
        windows, masks = self.bed.held_out[kind], self.masks(kind)
        missing = [rows for rows in self.chunks(kind) if not self.path(kind, column, rows).is_file()]
        measured = self.losses(column) if missing else None
        for rows in missing:
            assert measured is not None
            losses = measured(windows[rows], masks.rows(rows))
            with replace_file(self.path(kind, column, rows)) as temporary:
                cell = {name: loss.tolist() for name, loss in losses.items()}
                temporary.write_text(json.dumps(cell), encoding="ascii")
            print(kind, column, rows.stop, *(f"{float(loss.mean()):.3f}" for loss in losses.values()), flush=True)

    def losses(self, column: str) -> Callable[[Tensor, Masks], Losses]:
        """Return what a column's losses on some windows are."""
        is_tuned = column in TUNED
        denoiser = self.tuned if is_tuned else self.bed.denoiser
        name, what = ("tuned", column.removeprefix("tuned ")) if is_tuned else ("shipped", column)
        if what in ("one-step", "sequential"):
            of = one_step_losses if what == "one-step" else sequential_losses
            return lambda windows, masks: of(denoiser, windows, masks, self.forbidden)
        if what == "circuit alone":
            pc, ids = self.fits.alone(), torch.tensor(self.bed.vocabulary)
            length = self.bed.block_length
            return lambda windows, masks: circuit_losses(
                pc, torch.searchsorted(ids, windows[:, -length:].contiguous()), masks
            )
        with torch.enable_grad():
            head = self.fits.gate(denoiser, what, name) if what in GATES else self.fits.head(denoiser, what, name)
        forbidden = self.forbidden if what in GATES else head.spec_for(denoiser.spec).forbidden_ids
        return lambda windows, masks: head_losses(head.conditional_log_likelihood, denoiser, windows, masks, forbidden)

    def read(self, kind: str, column: str) -> dict[str, np.ndarray] | None:
        """Return a column's losses on all windows; None if a cell is not there."""
        paths = [self.path(kind, column, rows) for rows in self.chunks(kind)]
        if not all(path.is_file() for path in paths):
            return None
        cells = [json.loads(path.read_text("ascii")) for path in paths]
        return {name: np.concatenate([cell[name] for cell in cells]) for name in cells[0]}


def losses_of(measures: list[Measure], kind: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the losses of one kind of windows, those of all seeds together, by column and mask."""
    found = {column: [measure.read(kind, column) for measure in measures] for column in COLUMNS}
    return {
        column: {name: np.concatenate([part[name] for part in parts if part]) for name in parts[0] or ()}
        for column, parts in found.items()
        if all(part is not None for part in parts)
    }


def rows_of(measures: list[Measure], kind: str, num_bootstrap: int = 2000) -> list[dict[str, str]]:
    """Return the table of one kind of windows: a row for each column, with losses and shares of each mask.

    The windows of all seeds are taken together, and resampled together in all columns: so intervals of shares are of
    differences window by window. Heads that see hidden states also say by how many nats they are below the static ones.
    """
    titles = {str(ratio): f"{ratio:.2f}" for ratio in measures[0].bed.ratios}
    rows: list[dict[str, str]] = []
    losses = losses_of(measures, kind)
    if not losses:
        return rows
    num_windows = len(next(iter(next(iter(losses.values())).values())))
    resamples = np.random.default_rng(0).integers(num_windows, size=(num_bootstrap, num_windows))
    for column, by_mask in losses.items():
        before = "tuned " if column in TUNED else ""
        ends = [losses.get(f"{before}{end}") for end in ("one-step", "sequential")]
        row = {"column": column, "windows": str(num_windows)}
        for name, loss in by_mask.items():
            title = titles.get(name, name)
            row[title] = str(Decimals.of(loss.mean(), loss[resamples].mean(1)))
            if ends[0] is not None and ends[1] is not None and not column.endswith(("one-step", "sequential")):
                row[f"share {title}"] = share(ends[0][name], loss, ends[1][name], resamples)
            static = losses.get(CONTEXTUAL.get(column, ""))
            if static is not None:
                less = static[name] - loss
                row[f"below static {title}"] = str(Decimals.of(less.mean(), less[resamples].mean(1)))
        rows.append(row)
    return rows


@torch.no_grad()
def chain_rows(measure: Measure, number: int) -> list[dict[str, str]]:
    """Return what whole chains are like that a seed's denoiser draws in few calls, alone and with three heads."""
    denoiser, seed = measure.bed.denoiser, measure.fits.seed
    training = texts_of(measure.bed.train)
    heads: dict[str, df.JointHead | None] = {
        "": None,
        "aligned potentials": measure.fits.head(denoiser, "aligned potentials", "shipped"),
        "aligned matched": measure.fits.head(denoiser, "aligned matched", "shipped"),
        "switched potentials": measure.fits.gate(denoiser, "switched potentials", "shipped"),
    }
    rows = [
        {"seed": str(seed), "calls": "", "head": "far reads"}
        | described(denoiser, texts_of(measure.bed.held_out["far"][:number]), training, measure.forbidden, seed=seed)
    ]
    for calls in CALLS:
        for name, chosen in heads.items():
            path = measure.folder / f"chains-{calls}-{number}{'-' + name.replace(' ', '-') if name else ''}.json"
            drawn = chains(denoiser, chosen, calls, number, path, seed=seed)
            known = described(denoiser, drawn, training, measure.forbidden, seed=seed)
            rows.append({"seed": str(seed), "calls": str(calls), "head": name, **known})
    return rows


class Decimals(Estimate):
    """An estimate that is written with three decimals."""

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Decimals:
        """Return a value with the interval of its resamples."""
        low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
        return cls(float(value), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(one_step: np.ndarray, loss: np.ndarray, sequential: np.ndarray, resamples: np.ndarray) -> str:
    """Return the share of the gap that is closed, or a dash where there is none: its interval reaches 0."""
    gap = one_step - sequential
    if np.quantile(gap[resamples].mean(1), 0.025) <= 0:
        return "-"
    closed = one_step - loss
    value = Decimals.of(closed.mean() / gap.mean(), closed[resamples].mean(1) / gap[resamples].mean(1))
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Return a table's lines."""
    titles = list(dict.fromkeys(name for row in rows for name in row if name != "windows"))
    lines = [titles, ["---"] * len(titles), *([row.get(name, "") for name in titles] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
