"""Redesign the CDR3 loop of an antibody with a real pretrained model: a given length, no cysteine, few model calls.

AntiBERTy (Ruffolo, Gray, Sulam 2021) predicts masked residues one by one; a circuit that was fitted to 1,000 reads of
human antibodies ties them together. Both come from the Python package registry (100 MB, kept in a folder); about a
minute on two cores. Run: python examples/antibody_cdr3.py
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


def parsed() -> argparse.Namespace:
    default = Path(os.environ.get("UNFACTOR_BARRIER", Path.home() / ".cache" / "unfactor" / "barrier")) / "antibody"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default, help="for model, reads and caches")
    parser.add_argument("--length", type=int, help="residues of the new loop; as many as the old one has")
    parser.add_argument("--designs", type=int, default=8, help="with each number of model calls")
    return parser.parse_args()


def fitted_head(denoiser: df.Denoiser, windows: torch.Tensor, vocabulary: list[int], folder: Path) -> df.CoupledHead:
    """Fit a hidden Markov model of the chains, and make it the denoiser's output layer."""
    categories = torch.searchsorted(torch.tensor(vocabulary), windows)
    pc = ct.compile(ct.structures.hmm(LENGTH, 64, len(vocabulary)), seed=0)
    ct.learning.fit(pc, categories, optimizer="minibatch_em", num_epochs=10, progress=False)
    head = df.CoupledHead(pc, calibration=df.NoiseCalibration(len(vocabulary)), vocabulary=vocabulary)
    cache = df.cache_logits(denoiser, windows[::4], folder / "example-logits", block_length=LENGTH)
    df.fit_coupled(head, cache, config=df.CircuitTraining(steps=100, batch_size=32))
    return head


@torch.no_grad()
def pseudo_log_likelihood(denoiser: df.Denoiser, tokens: torch.Tensor, places: range) -> torch.Tensor:
    """Return the mean log-probability of each place's residue given all others, (B,): it is no judge of our own."""
    losses = []
    for place in places:
        hidden = tokens.clone()
        hidden[:, place] = denoiser.spec.mask_id
        losses.append(df.Prediction.ask(denoiser, hidden).log_prob_of(tokens)[:, place])
    return torch.stack(losses).mean(0)


def main() -> None:
    options = parsed()
    model, chains = prepare(options.folder)
    denoiser, tokenizer = df.load_denoiser(model), df.load_tokenizer(model)
    reads = sorted({chain[-LENGTH:] for chain in chains.read_text("ascii").split() if len(chain) >= LENGTH})
    *train, read = (read for read in reads if CDR3.match(read))  # the last one is the antibody to redesign

    vocabulary = sorted(tokenizer.encode(RESIDUES))
    windows = torch.tensor([tokenizer.encode(read) for read in train])
    head = fitted_head(denoiser, windows, vocabulary, options.folder)

    found = CDR3.match(read)
    assert found is not None
    before, loop, after = read[: found.start(1)], found[1], read[found.end(1) :]
    length = options.length or len(loop)
    before = before[max(0, len(before) + length + len(after) - LENGTH) :]  # the head is over at most LENGTH residues
    canvas = tokenizer.encode(before) + [denoiser.spec.mask_id] * length + tokenizer.encode(after)
    no_cysteine = f"[{RESIDUES.replace('C', '')}]{{{length}}}"
    constraint = df.constraints.template(before + "{loop}" + after, tokenizer, loop=no_cysteine)
    places = range(len(before), len(before) + length)
    own = pseudo_log_likelihood(denoiser, torch.tensor([tokenizer.encode(read)]), range(found.start(1), found.end(1)))
    print(
        f"CDR3 of this read: {loop} ({float(own):.2f}); {options.designs} designs of {length} residues without cysteine\n"
    )
    print("calls  head  log-likelihood of a residue given all others  different  first design")
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
            loops = out.tokens[:, places.start : places.stop]
            texts = ["".join(tokenizer.decode(row).split()) for row in loops.tolist()]
            assert all("C" not in text and len(text) == length for text in texts)
            score = pseudo_log_likelihood(denoiser, out.tokens, places).mean()
            print(f"{num_steps:5}  {name:4}  {float(score):44.2f}  {len(set(texts)):9}  {texts[0]}")


if __name__ == "__main__":
    main()
