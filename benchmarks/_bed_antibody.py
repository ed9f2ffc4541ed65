"""Antibodies: AntiBERTy, a real pretrained masked model, on the last 100 residues of reads of heavy chains.

``olga==1.3.0`` (GPL-3; Sethna et al. 2019, arXiv 1807.04425) draws rearrangements of germline genes. It is run as a
program of its own; with the germline genes that it knows a drawn CDR3 becomes a whole chain without mutations, as many
as a circuit asks for.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from _antibody_data import LENGTH, RESIDUES, VOCABULARY, prepare, translated, wheel
from _antibody_mutations import LOOP, Chain, Mutations
from _bed import Bed
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import one_hot

import circuits as ct
import diffusion as df
from circuits.files import replace_file, write_safetensors

GENES = "olga/default_models/human_B_heavy"
MUTATIONS = 3
"""Versions of each germline chain."""
SAME_CLUSTER = 80
"""Residues of 100 in a common subsequence: no alignment finds more equal ones."""


def antibody_bed(folder: Path, *, seed: int, is_quick: bool) -> Bed:
    """Prepare model, reads and germline chains in a folder, and divide the reads by a seed."""
    model, chains = prepare(folder)
    windows = sorted({chain[-LENGTH:] for chain in chains.read_text("ascii").split() if len(chain) >= LENGTH})
    if is_quick:
        windows = windows[::8]
    split = split_reads(windows, seed=seed)
    tail = Counter(read[read.rfind("VSS") + 3 :] for read in split["train"] if "VSS" in read).most_common(1)[0][0]
    germline = germline_chains(folder, 200 if is_quick else 8000, seed=seed)
    germline = [chain for chain in germline if len("".join(chain)) + len(tail) >= LENGTH]
    mutations = Mutations.of(split["train"], *map(tuple, map(dict.values, germline_genes(folder))))
    drawn = [
        ids_of([(chain + tail)[-LENGTH:] for chain in mutations.mutated(germline, seed=one)])
        for one in range(seed, seed + 100 * MUTATIONS, 100)
    ]
    train = ids_of(split["train"])
    loops = [cdr3(read) for read in split["far"]]
    whole = df.load_denoiser(model)
    assert isinstance(whole, df.MaskedLMDenoiser)
    denoiser = in_bfloat16(whole)
    return Bed(
        name="learnt",
        denoiser=denoiser,
        num_features=denoiser.model.config.hidden_size,  # type: ignore[union-attr,arg-type]
        block_length=LENGTH,
        vocabulary=tuple(VOCABULARY.index(residue) for residue in RESIDUES),
        text=torch.cat([*drawn, train.repeat(8, 1)]),
        train=train,
        more=drawn[0][torch.randperm(len(drawn[0]), generator=torch.Generator().manual_seed(seed))[:1000]],
        aligned=lambda states, categories: aligned_chain(states, categories, seed=seed),
        validation=ids_of(split["validation"]),
        held_out={
            "far": ids_of(split["far"]),
            "random": ids_of(split["random"]),
            "CDR3": ids_of([read for read, loop in zip(split["far"], loops, strict=True) if loop]),
        },
        parts={"CDR3": places_of([loop for loop in loops if loop])},
        fine_tune=lambda path, seconds: in_bfloat16(fine_tuned(whole, train, path, seconds=seconds, seed=seed)),
    )


def in_bfloat16(denoiser: df.MaskedLMDenoiser) -> df.MaskedLMDenoiser:
    """Return the model in half the precision: on one core half the time, and 0.0002 nats a masked residue apart."""
    made = copy.deepcopy(denoiser)
    made.model.bfloat16()  # type: ignore[attr-defined]
    return made


def cdr3(window: str) -> range:
    """Return the places of the third loop, between the C and the WGxG of the conserved motif; none: it is not there."""
    found = LOOP.search(window)
    return range(*found.span(1)) if found else range(0)


def places_of(loops: list[range]) -> Tensor:
    """Return where loops are, bool (N, 100)."""
    return torch.tensor([[place in loop for place in range(LENGTH)] for loop in loops]).view(-1, LENGTH)


def aligned_chain(num_states: int, categories: Tensor, *, seed: int) -> ct.Circuit:
    """Return a hidden Markov model with tables of its own at every position, whose states begin as drawn chains.

    Chains end at the same place, so position says much; and a state that means the same lineage at all positions is
    what heads that read one map at all positions need. So state k says residues of the k-th drawn chain with
    probability 0.6, and those of the position's frequencies otherwise; and it is left with probability 0.1.

    Args:
        num_states: N.
        categories: int64 (n >= N, L), chains to draw from.
        seed: of the draw, and of where states go when they are left.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = one_hot(categories[torch.randperm(len(categories), generator=generator)[:num_states]], len(RESIDUES))
    frequencies = one_hot(categories, len(RESIDUES)).double().mean(0) + 1e-3
    emission = 0.6 * drawn.double().transpose(0, 1) + 0.4 * (frequencies / frequencies.sum(1, keepdim=True))[:, None]
    away = torch.rand(LENGTH - 1, num_states, num_states, generator=generator, dtype=torch.float64)
    transition = 0.9 * torch.eye(num_states).double() + 0.1 * away / away.sum(2, keepdim=True)
    return ct.structures.hmm(
        LENGTH, num_states, len(RESIDUES), homogeneous=False, transition=transition, emission=emission
    )


def ids_of(windows: list[str]) -> Tensor:
    """Return the model's ids, int64 (N, 100)."""
    return torch.tensor([[VOCABULARY.index(residue) for residue in window] for window in windows])


def split_reads(windows: list[str], *, seed: int) -> dict[str, list[str]]:
    """Divide reads into ``train``, ``validation``, ``far`` and ``random``.

    ``far``: one read of each of some clusters that are held out as a whole; so no training read has 80 % of its
    residues in common with it. ``validation``: the same, of other clusters. ``random``: reads whose relatives may be
    among the training reads. Clusters of more than a twentieth of the reads are for training, and ``random``.
    """
    groups = clusters(windows)
    generator = torch.Generator().manual_seed(seed)
    order = [groups[number] for number in torch.randperm(len(groups), generator=generator).tolist()]
    small = [group for group in order if 20 * len(group) <= len(windows)]
    share = len(small) // 6
    held_out = [one for group in small[: 2 * share] for one in group]
    rest = sorted(set(range(len(windows))) - set(held_out))
    rest = [rest[number] for number in torch.randperm(len(rest), generator=generator).tolist()]
    taken = {"far": [group[0] for group in small[:share]], "random": rest[:share], "train": rest[share:]}
    taken["validation"] = [group[0] for group in small[share : 2 * share]]
    return {name: [windows[one] for one in numbers] for name, numbers in taken.items()}


def clusters(windows: list[str]) -> list[list[int]]:
    """Return groups of windows: two with a common subsequence of 80 residues are in one, and so are chains of such."""
    places = [dict.fromkeys(RESIDUES, 0) for _ in windows]
    for place, window in zip(places, windows, strict=True):
        for number, residue in enumerate(window):
            place[residue] |= 1 << number
    group = list(range(len(windows)))
    for one, place in enumerate(places):
        for other in range(one):
            if group[one] != group[other] and common(place, windows[other]) >= SAME_CLUSTER:
                old, new = group[one], group[other]
                group = [new if number == old else number for number in group]
    found: dict[int, list[int]] = {}
    for one, number in enumerate(group):
        found.setdefault(number, []).append(one)
    return list(found.values())


def common(places: dict[str, int], window: str) -> int:
    """Return the length of the longest common subsequence (Hyyrö 2004), given one text's places by residue in bits."""
    everything = (1 << LENGTH) - 1
    state = everything
    for residue in window:
        equal = state & places[residue]
        state = ((state + equal) | (state - equal)) & everything
    return LENGTH - state.bit_count()


def germline_chains(folder: Path, number: int, *, seed: int) -> list[Chain]:
    """Return chains that rearrange germline genes without mutations: V, a drawn CDR3, and J; kept in the folder."""
    path, (before, after) = folder / f"germline-{number}-{seed}.tsv", germline_genes(folder)
    if not path.is_file():
        with replace_file(path) as temporary:
            command = [sys.executable, "-m", "olga.generate_sequences", "--humanIGH", "--time_updates_off"]
            command += ["-n", str(number), f"--seed={seed}", "--delimiter=tab", "-o", str(temporary)]
            environment = {**os.environ, "PYTHONPATH": str(olga(folder))}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    with open(path, encoding="ascii") as file:
        drawn = [row[1:4] for row in csv.reader(file, delimiter="\t")]
    known = [Chain(before[v], loop, after[j]) for loop, v, j in drawn if v in before and j in after]
    return sorted({chain for chain in known if set("".join(chain)) <= set(RESIDUES)})


def olga(folder: Path) -> Path:
    """Return the folder of the program that draws rearrangements, which is unpacked first if it is not there."""
    program = folder / "olga-1.3.0"
    if not (program / GENES).is_dir():
        with zipfile.ZipFile(wheel(folder, "olga==1.3.0")) as archive:
            archive.extractall(program)
    return program


def germline_genes(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the residues of V genes before the C that CDR3 begins with, and of J genes after its last; by gene."""
    folder = olga(folder) / GENES
    parameters = (folder / "model_params.txt").read_text("ascii")
    bases = dict(re.findall(r"^%(IGH[VJ][^;]*);([ACGT]+);", parameters, re.MULTILINE))
    parts: list[dict[str, str]] = []
    for kind in "VJ":
        genes: dict[str, str] = {}
        with open(folder / f"{kind}_gene_CDR3_anchors.csv", encoding="ascii") as file:
            for row in csv.DictReader(file):
                gene, anchor = row["gene"], int(row["anchor_index"])
                text = bases[gene][anchor % 3 : anchor] if kind == "V" else bases[gene][anchor + 3 :]
                genes.setdefault(gene.partition("*")[0], translated(text))  # the first allele
        parts.append({gene: text for gene, text in genes.items() if set(text) <= set(RESIDUES)})
    return parts[0], parts[1]


def fine_tuned(
    denoiser: df.MaskedLMDenoiser, windows: Tensor, path: Path, *, seconds: float, seed: int, batch_size: int = 16
) -> df.MaskedLMDenoiser:
    """Return the model trained further: AdamW, masks at t ~ U(0, 1), the mean loss of a block's masked residues."""
    tuned = copy.deepcopy(denoiser)
    if path.is_file():
        tuned.model.load_state_dict(load_file(path))
        return tuned
    model, generator = tuned.model.train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    began, updates = time.process_time(), 0
    while (share := (time.process_time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1.0, (updates + 1) / 10) * (1 + math.cos(math.pi * share)) / 2
        rows = windows[torch.randint(len(windows), (batch_size,), generator=generator)]
        times = df.masking.sample_times(batch_size, generator=generator)
        noisy, masked = df.masking.mask_tokens(rows, times, mask_id=tuned.spec.mask_id, generator=generator)
        said = df.Prediction.ask(tuned, noisy)
        loss = -said.log_prob_of(rows).masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp_min(1)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        updates += 1
    print(f"fine-tuned by {updates} updates of {batch_size} reads in {seconds:.0f} s of processor time")
    model.eval()
    with replace_file(path) as temporary:
        write_safetensors(temporary, {name: weight.detach().clone() for name, weight in model.state_dict().items()})
    return tuned
