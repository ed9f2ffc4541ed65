"""Redesign the CDR3 loop of an antibody with a real pretrained model: a given length, no cysteine, few model calls.

AntiBERTy (Ruffolo, Gray, Sulam 2021) predicts masked residues one by one; a circuit that was fitted to 1,000 reads of
human antibodies ties them together. Both come from the Python package registry (100 MB, kept in a folder); two
minutes on two cores. Needs transformers, the extra [hf].
Run: python examples/antibody_cdr3.py
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch

import circuits as ct
import diffusion as df

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from _antibody_data import LENGTH, RESIDUES, prepare  # downloads the packages' files and runs nothing of them

CDR3 = re.compile(r".*C([A-Z]{4,40})WG[A-Z]G")
"""What stands between the conserved C and W; the last such place of a chain."""
BLOCK = 48
"""The head is over the last residues of a chain, where the loop is."""


def parsed() -> argparse.Namespace:
    default = Path(os.environ.get("UNFACTOR_BARRIER", Path.home() / ".cache" / "unfactor" / "barrier")) / "antibody"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default, help="for model, reads and caches")
    parser.add_argument("--length", type=int, help="residues of the new loop; as many as the old one has")
    parser.add_argument("--designs", type=int, default=8, help="with each number of model calls")
    return parser.parse_args()


def fitted_head(denoiser: df.Denoiser, windows: torch.Tensor, vocabulary: list[int], folder: Path) -> df.CoupledHead:
    """Fit a hidden Markov model of the chains, and make it the denoiser's output layer."""
    categories = torch.searchsorted(torch.tensor(vocabulary), windows[:, -BLOCK:].contiguous())
    pc = ct.compile(ct.structures.hmm(BLOCK, 64, len(vocabulary), homogeneous=False), seed=0)  # chains are aligned
    ct.learning.fit(pc, categories, optimizer="minibatch_em", num_epochs=10, progress=False)
    cache = df.cache_logits(denoiser, windows, folder / "example-logits", block_length=BLOCK, features=True)
    conditioners = [df.NoiseCalibration(len(vocabulary)), df.LatentPotentials.for_hmm(pc, cache.features.shape[-1])]
    head = df.CoupledHead(pc, conditioners=conditioners, vocabulary=vocabulary)
    df.fit_coupled(head, cache, config=df.CircuitTraining(steps=180, batch_size=64, learning_rate=0.01))
    return head


@torch.no_grad()
def loss_of_loops(denoiser: df.Denoiser, head: df.CoupledHead, reads: torch.Tensor, loops: torch.Tensor) -> list[float]:
    """Return the nats per residue of loops that are there, all of one masked at once: without and with the head."""
    canvas = reads.masked_fill(loops, denoiser.spec.mask_id)
    spec = head.spec_for(denoiser.spec)
    said = df.Prediction.ask(
        denoiser, canvas, window=(LENGTH - BLOCK, LENGTH), features=True, forbidden_ids=spec.forbidden_ids
    )
    block, masked = reads[:, -BLOCK:], loops[:, -BLOCK:]
    alone = said.log_prob_of(block).masked_fill(~masked, 0.0).sum(1)
    coupled = head.conditional_log_likelihood(said, block, masked)
    return [float(-(log_p / masked.sum(1)).mean()) for log_p in (alone, coupled)]


def main() -> None:
    options = parsed()
    model, chains = prepare(options.folder)
    denoiser, tokenizer = df.load_denoiser(model), df.load_tokenizer(model)
    reads = sorted({chain[-LENGTH:] for chain in chains.read_text("ascii").split() if len(chain) >= LENGTH})
    reads = [read for read in reads if (found := CDR3.match(read)) and found.start(1) >= LENGTH - BLOCK]
    windows = torch.tensor([tokenizer.encode(read) for read in reads])
    loops = torch.zeros_like(windows, dtype=torch.bool)
    for row, read in zip(loops, reads, strict=True):
        row[slice(*CDR3.match(read).span(1))] = True

    vocabulary = sorted(tokenizer.encode(RESIDUES))
    is_held_out = torch.arange(len(reads)) % 20 == 0
    head = fitted_head(denoiser, windows[~is_held_out], vocabulary, options.folder)
    alone, coupled = loss_of_loops(denoiser, head, windows[is_held_out], loops[is_held_out])
    print(
        f"nats per residue of {int(is_held_out.sum())} loops in one call each: {alone:.2f}, with the head {coupled:.2f}"
    )

    read = reads[0]  # the antibody to redesign: one that is held out
    found = CDR3.match(read)
    assert found is not None
    before, loop, after = read[: found.start(1)], found[1], read[found.end(1) :]
    length = options.length or len(loop)
    before = before[max(0, len(before) + length + len(after) - LENGTH) :]  # the head is over at most LENGTH residues
    canvas = tokenizer.encode(before) + [denoiser.spec.mask_id] * length + tokenizer.encode(after)
    no_cysteine = f"[{RESIDUES.replace('C', '')}]{{{length}}}"
    constraint = df.constraints.template(before + "{loop}" + after, tokenizer, loop=no_cysteine)
    print(f"CDR3 of one of them: {loop}; designs of {length} residues without cysteine:\n\ncalls  head  different")
    for num_steps in (1, 4, length):
        for name, chosen in (("no", None), ("yes", head)):
            out = df.infill(
                denoiser,
                torch.tensor(canvas).repeat(options.designs, 1),
                num_steps=num_steps,
                head=chosen,
                constraint=constraint,
                temperature=1.0,
                seeds=range(options.designs),
            )
            made = out.tokens[:, len(before) : len(before) + length].tolist()
            texts = ["".join(tokenizer.decode(row).split()) for row in made]
            assert all("C" not in text and len(text) == length for text in texts)
            print(f"{num_steps:5}  {name:4}  {len(set(texts)):9}  {'  '.join(texts[:3])}")


if __name__ == "__main__":
    main()
