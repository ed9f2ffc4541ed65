"""The factorization barrier of a real pretrained model that needs no hub: AntiBERTy on antibody chains, with an HMM.

    python benchmarks/antibody.py                     # prepares model and reads, fits a circuit, prints the gap table
    python benchmarks/antibody.py --latent-potentials # the circuit's latents see the model's hidden states too

Model and reads come from the Python package registry (see ``_antibody_data.py``) and are kept in ``--folder``, by
default ``$UNFACTOR_ANTIBODY`` or ``~/.cache/unfactor/antibody``. Every stage is kept there too: an interrupted run goes
on where it was, a finished one is only reported again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _antibody_data import LENGTH, RESIDUES, VOCABULARY, Split, prepare, split_windows
from torch import Tensor

import circuits as ct
import diffusion as df
from circuits.digests import digest
from circuits.files import replace_file
from diffusion.evaluation.gap import Estimate, GapRow, GapTable

DEFAULT_FOLDER = Path(os.environ.get("UNFACTOR_ANTIBODY", Path.home() / ".cache" / "unfactor" / "antibody"))
AMINO_ACIDS = tuple(VOCABULARY.index(residue) for residue in RESIDUES)
RATIOS = (0.25, 0.5, 0.75, 1.0)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of model, reads, and all that is made")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 100 residues to measure on")
    parser.add_argument("--states", type=int, default=256, help="of the hidden Markov model")
    parser.add_argument("--epochs", type=int, default=30, help="of maximum likelihood, before the coupled objective")
    parser.add_argument("--masks", type=int, default=2, help="noisy versions of every training window")
    parser.add_argument("--steps", type=int, default=120, help="updates on the coupled objective")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="shares of the window that are masked")
    parser.add_argument("--latent-potentials", action="store_true", help="let the latents see the hidden states")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> GapTable:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    began = time.process_time()
    model, chains = prepare(options.folder)
    split = split_windows(chains.read_text(encoding="ascii").split(), seed=options.seed)
    denoiser = df.load_denoiser(model)
    print(
        f"{len(split.train)} windows of {LENGTH} residues to train on, {len(split.held_out)} held out, of "
        f"{split.num_clusters} clusters; {options.windows} of the held-out ones are measured"
    )
    out = options.folder / run_name(options)
    likeliest, head = fitted(denoiser, split, options, out)
    table = measured(denoiser, head, likeliest, split.held_out[: options.windows], options, out)
    print(table)
    print(f"{time.process_time() - began:.0f} s of processor time, in this call")
    return table


def run_name(options: argparse.Namespace) -> str:
    """Return a folder for what depends on these options."""
    named = {
        name: value for name, value in vars(options).items() if name not in ("folder", "threads", "windows", "ratios")
    }
    return f"run-{digest(json.dumps(named, sort_keys=True))[:12]}"


def fitted(
    denoiser: df.MaskedLMDenoiser, split: Split, options: argparse.Namespace, out: Path
) -> tuple[ct.CompiledCircuit, df.CoupledHead]:
    """Return the circuit of maximum likelihood, and the head that was fitted from there on the coupled objective."""
    if not (out / "likeliest" / "structure.json").is_file():
        pc = ct.compile(ct.structures.hmm(LENGTH, options.states, len(RESIDUES)), seed=options.seed)
        categories = split.train - AMINO_ACIDS[0]
        ct.learning.fit(pc, categories, optimizer="em", num_epochs=options.epochs, pseudocount=0.1, progress=True)
        ct.save(pc, out / "likeliest")
    likeliest, pc = ct.load(out / "likeliest"), ct.load(out / "likeliest")
    cache = df.cache_logits(
        denoiser,
        split.train,
        out / "logits",
        block_length=LENGTH,
        features=options.latent_potentials,
        masks_per_window=options.masks,
        batch_size=16,
        seed=options.seed,
    )
    counts = torch.bincount(split.train.flatten() - AMINO_ACIDS[0], minlength=len(RESIDUES))
    conditioners: list[df.Conditioner] = [df.NoiseCalibration.dividing_out(counts)]
    if options.latent_potentials:
        conditioners.append(df.LatentPotentials.for_hmm(pc, denoiser.model.config.hidden_size))  # type: ignore[union-attr,arg-type]
    head = df.CoupledHead(pc, conditioners=conditioners, vocabulary=AMINO_ACIDS)
    settings = df.CircuitTraining(steps=options.steps, batch_size=32, learning_rate=0.03, checkpoint_every=20)
    df.fit_coupled(head, cache, config=settings, checkpoint_path=out / "fit.safetensors")
    head.save(out / "head")
    return likeliest, head


def measured(
    denoiser: df.MaskedLMDenoiser,
    head: df.CoupledHead,
    likeliest: ct.CompiledCircuit,
    windows: Tensor,
    options: argparse.Namespace,
    out: Path,
) -> GapTable:
    """Return the gap table; each of its rows is kept in a file of its own, for asking one residue at a time is slow."""
    rows = []
    for ratio in options.ratios:
        path = out / f"gap-{ratio}-{options.windows}.json"
        if not path.is_file():
            began = time.process_time()
            table = df.evaluation.misspecification_gap(
                denoiser,
                head,
                windows,
                mask_ratios=(ratio,),
                circuit_alone=likeliest,
                batch_size=8,
                seed=options.seed,
                progress=True,
            )
            seconds = time.process_time() - began
            with replace_file(path) as temporary:
                temporary.write_text(json.dumps({"row": asdict(table.rows[0]), "seconds": seconds}), encoding="ascii")
        rows.append(row_of(json.loads(path.read_text(encoding="ascii"))["row"]))
    return GapTable(tuple(rows), len(windows), options.seed)


def row_of(content: dict[str, Any]) -> GapRow:
    """Return a row of the table as it was before it was written."""
    return GapRow(**{name: Estimate(**value) if isinstance(value, dict) else value for name, value in content.items()})


if __name__ == "__main__":
    main()
