"""The benchmark of the factorization barrier: its losses, the split of antibodies, a run on wheels of a tiny model."""

import itertools
import json
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from circuits.files import file_hash
from diffusion.errors import CorpusError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, that import what lies beside them

import _antibody_data as antibody
import _antibody_mutations as mutations
import _barrier_chains as drawn
import _barrier_fits as fits
import _barrier_losses as losses
import _bed_antibody as bed
import _bed_text as text
import barrier

BASES = "GCTTGTGATGAATTTGGTCATATTAAACTTATGAATCCTCAACGTAGCACTGTTTGGTAT"
CODONS = {residue: BASES[3 * place : 3 * place + 3] for place, residue in enumerate("ACDEFGHIKLMNPQRSTVWY")}
"""A codon of every residue."""


def chain(loop, seed=0):
    """Return a chain of 107 residues with this third loop; its frame is drawn."""
    drawn = torch.randint(18, (107 - 14 - len(loop),), generator=torch.Generator().manual_seed(seed))
    frame = "".join("ADEFGHIKLMNPQRSTVY"[index] for index in drawn)
    return f"{frame}C{loop}WGQGTLVTVSSA"


def read(chain, *, frame=0, reverse=False):
    bases = "A" * frame + "".join(CODONS[residue] for residue in chain)
    return bases.translate(str.maketrans("ACGT", "TGCA"))[::-1] if reverse else bases


def test_reads_are_translated_in_all_six_frames():
    one, two, three = chain("ARDYYG", 1), chain("AKGSFDYV", 2), chain("AWWWWW", 3)
    fasta = f">a\n{read(one)}\n>b\n{read(two, frame=2).lower()}\n>c\n{read(three, frame=1, reverse=True)}\n>d\nACGT\n"
    found = antibody.chains_of(fasta)
    for expected in (one, two, three):
        assert any(expected in chain for chain in found)
    assert antibody.translated("ATGTGATTTNNNTGG") == "M*FXW"


def longest_common(one, other):
    """Return the length of the longest common subsequence, by the table of Wagner and Fischer."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, j in itertools.product(range(len(one)), range(len(other))):
        equal = table[i, j] + 1 if one[i] == other[j] else 0
        table[i + 1, j + 1] = max(equal, table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def related_reads():
    """Return forty windows, twelve of which have a relative; one of these is moved by two places."""
    windows = [chain("ARDV", number)[-100:] for number in range(40)]
    return windows + [one[:20] + "WWWWW" + one[25:] for one in windows[:11]] + ["WW" + windows[11][:-2]]


def test_reads_far_from_training_share_less_than_80_residues_with_every_one():
    split = bed.split_reads(related_reads(), seed=1)
    assert all(len(split[name]) >= 5 for name in ("train", "far", "random", "validation"))
    for name in ("far", "validation"):
        assert max(longest_common(one, other) for one in split[name] for other in split["train"]) < 80
    assert not set(split["random"]) & {*split["train"], *split["far"], *split["validation"]}


def test_relatives_are_in_one_cluster():
    groups = bed.clusters(related_reads())
    assert sorted(map(len, groups)) == [1] * 28 + [2] * 12
    assert all(later == first + 40 for first, later in (group for group in groups if len(group) == 2))


def random_denoiser(seed=0):
    config = df.TransformerConfig(
        vocab_size=6, mask_id=5, pad_id=4, eos_id=4, forbidden_ids=(4, 5), context_length=3, block_length=8, width=16,
        num_layers=1, num_heads=2,
    )  # fmt: skip
    return df.TransformerDenoiser(config, seed=seed).eval()


@torch.no_grad()
def test_losses_of_nested_masks_are_those_of_the_gap():
    """At one ratio at a time ``misspecification_gap`` measures the same, token by token too, with masks of its own."""
    denoiser, ratios = random_denoiser(), (0.25, 0.75)
    windows = torch.randint(0, 4, (5, 11), generator=torch.Generator().manual_seed(0))
    masks = losses.Masks.at_random(5, 8, ratios, seed=0)
    one_by_one = losses.sequential_losses(denoiser, windows, masks, (4, 5))
    at_once = losses.one_step_losses(denoiser, windows, masks, (4, 5))
    for row, ratio in itertools.product(range(5), ratios):
        count = round(8 * ratio)
        canvas = windows[row : row + 1].clone()
        canvas[0, 3 + masks.order[row, 8 - count :]] = 5
        asked = torch.log_softmax(denoiser.logits(canvas)[0, :, :4], -1)
        last = 3 + masks.order[row, 8 - count :]
        expected = -asked[last, windows[row, last]].mean()
        torch.testing.assert_close(at_once[str(ratio)][row], expected.double(), atol=1e-5, rtol=0)
        total = 0.0
        for place in last:
            total -= float(torch.log_softmax(denoiser.logits(canvas)[0, place, :4], -1)[windows[row, place]])
            canvas[0, place] = windows[row, place]
        assert float(one_by_one[str(ratio)][row]) == pytest.approx(total / count, abs=1e-5)


@torch.no_grad()
def test_a_part_of_each_window_is_masked_exactly_and_revealed_one_token_at_a_time():
    denoiser = random_denoiser()
    windows = torch.randint(0, 4, (3, 8), generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(3, 8, dtype=torch.bool)
    masked[0, 2:7], masked[1, 4], masked[2, ::3] = True, True, True
    masks = losses.Masks.of(masked, "loop", seed=0)
    assert torch.equal(masks.masked(masks.counts["loop"]), masked)
    found = losses.sequential_losses(denoiser, windows, masks, (4, 5))["loop"]
    for row, count in enumerate((5, 1, 3)):
        canvas, total = windows[row : row + 1].masked_fill(masked[row], 5), 0.0
        for place in masks.order[row, 8 - count :]:
            total -= float(torch.log_softmax(denoiser.logits(canvas)[0, place, :4], -1)[windows[row, place]])
            canvas[0, place] = windows[row, place]
        assert float(found[row]) == pytest.approx(total / count, abs=1e-5)


def test_the_third_loop_is_between_the_cysteine_and_the_motif():
    one, other = "A" * 60 + "YYC" + "ARDCYG" + "WGQGTLV", "A" * 60 + "YYC" + "ARDCYG" + "WAQGTLV"
    assert bed.cdr3(one) == range(63, 69)
    assert bed.cdr3(other) == range(0)
    assert bed.places_of([range(1, 3)]).nonzero().tolist() == [[0, 1], [0, 2]]


def test_a_mutation_that_no_read_has_changes_one_base_of_a_codon():
    """M has one codon, ATG: I is behind three of its nine changes, L (TTG, CTG) behind two, K, T, R, V behind one."""
    assert sorted(mutations.neighbours()["M"]) == sorted("IIILLKTRV")
    learnt = mutations.Mutations.of([], ["M" * 60], ["M" * 10])
    drawn = learnt.mutated([mutations.Chain("M" * 60, "C" + "M" * 8 + "W", "M" * 10)] * 200, seed=0)
    assert set("".join(drawn)) <= set("MIKLTRVCW" + "".join(map(mutations.neighbours().get, "CW")))
    changed = [sum(residue != "M" for residue in chain[:60]) for chain in drawn]
    assert np.mean(changed) == pytest.approx(60 * mutations.MOST_MUTATED / 2, rel=0.2)
    assert max(changed) > 15


def test_mutations_are_learnt_by_place_and_residue():
    """Reads of a gene whose third place from the end is always K, the fifth after CDR3 sometimes S, all else kept."""
    before, after = "M" * 30, "WGQGTLVTVSS"[1:]
    reads = [
        "M" * 27 + "KMM" + "CARDYYAW" + after[:4] + ("S" if number % 2 else "L") + after[5:] for number in range(400)
    ]
    learnt = mutations.Mutations.of(reads, ["A" * 30, before], [after])
    assert learnt.before[2] > 10 > 0.5 > learnt.before[[0, 1, 3, 10]].max()
    assert learnt.after[4] > 5 > 0.5 > learnt.after[[0, 3, 5]].max()
    assert learnt.at[2].argmax() == mutations.RESIDUES.index("K")
    assert learnt.at.sum() == 400
    assert learnt.becomes[mutations.RESIDUES.index("M")].argmax() == mutations.RESIDUES.index("K")
    drawn = learnt.mutated([mutations.Chain(before, "CARDYYAW", after)] * 100, seed=1)
    changed = np.array([[one != "M" for one in chain[:30]] for chain in drawn]).mean(0)
    assert changed[27] > 0.7 > 0.15 > np.delete(changed, 27).max()
    assert drawn == learnt.mutated([mutations.Chain(before, "CARDYYAW", after)] * 100, seed=1)


def test_states_of_an_aligned_chain_begin_as_chains():
    """Of two chains that never agree each state says one with probability 0.6 + 0.4 / 2, but for smoothing."""
    chains = torch.stack([torch.arange(100) % 7, torch.arange(100) % 7 + 7])
    pc = ct.compile(bed.aligned_chain(2, chains, seed=0))
    expected = 100 * np.log(0.8) + np.log(0.5) + 99 * np.log(0.95)
    assert pc(chains).tolist() == pytest.approx([expected] * 2, abs=5)


@torch.no_grad()
def test_residues_are_predicted_once_with_a_quarter_of_the_chain_masked():
    denoiser = random_denoiser()
    windows = torch.randint(0, 4, (2, 8), generator=torch.Generator().manual_seed(1))
    found = drawn.quarter_losses(denoiser, windows, (4, 5), seed=3)
    order = torch.rand(windows.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    for row in range(2):
        total = 0.0
        for part in range(4):
            places = order[row, 2 * part : 2 * part + 2]
            canvas = windows[row : row + 1].clone()
            canvas[0, places] = 5
            said = torch.log_softmax(denoiser.logits(canvas)[0, :, :4], -1)
            total -= float(said[places, windows[row, places]].sum())
        assert found[row] == pytest.approx(total / 8, abs=1e-5)


def test_distances_are_what_no_alignment_can_match():
    one, other = chain("ARDV", 3)[-100:], chain("AKDV", 4)[-100:]
    assert drawn.distances([one], [one, other]).tolist() == [[0, 100 - longest_common(one, other)]]


def test_a_share_is_of_the_gap_and_there_is_none_without_a_gap():
    resamples = np.random.default_rng(0).integers(6, size=(100, 6))
    one_step, noise = np.full(6, 2.0), np.linspace(-0.1, 0.1, 6)
    assert barrier.share(one_step, one_step - 0.75, one_step - 1.0, resamples) == "0.75 [0.75, 0.75]"
    assert barrier.share(one_step, one_step - 0.75, one_step + noise, resamples) == "-"


def test_a_head_that_sees_hidden_states_is_compared_with_the_static_one_window_by_window():
    """Windows differ by ten nats, the heads on each of them by one half."""
    of_windows = {"calibrated": np.array([1.0, 11.0]), "potentials": np.array([0.5, 10.5])}
    read = {column: {"0.5": losses} for column, losses in of_windows.items()}
    measure = SimpleNamespace(bed=SimpleNamespace(ratios=(0.5,)), read=lambda kind, column: read.get(column))
    static, potentials = barrier.rows_of([measure], "held-out")
    assert potentials["below static 0.50"] == "0.500 [0.500, 0.500]"
    assert static["0.50"] == "6.000 [1.000, 11.000]"
    assert "below static 0.50" not in static


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Write wheels with a tiny BERT, which has heads that are left out, and with reads."""
    transformers = pytest.importorskip("transformers", reason="AntiBERTy runs on the BERT classes of transformers")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=25, max_position_embeddings=128, pad_token_id=0, **shape)
    model = transformers.BertForMaskedLM(config)
    weights = {**model.state_dict(), "cls.species.bias": torch.zeros(3), "bert.pooler.dense.bias": torch.zeros(8)}
    pickled = BytesIO()
    torch.save(weights, pickled)
    with zipfile.ZipFile(tmp_path / "antiberty-0.1.3-py3-none-any.whl", "w") as archive:
        described = config.to_dict() | {"architectures": ["AntiBERTy"]}
        archive.writestr(f"{antibody.MODEL_MEMBERS}/config.json", json.dumps(described))
        archive.writestr(f"{antibody.MODEL_MEMBERS}/pytorch_model.bin", pickled.getvalue())
    reads = [read(chain("A" * (number % 9) + "RDYWG"[number % 5 :] + "KV", number)) for number in range(400)]
    with zipfile.ZipFile(tmp_path / "abstar-0.8.0-py3-none-any.whl", "w") as archive:
        archive.writestr(antibody.READS_MEMBER, "".join(f">{number}\n{one}\n" for number, one in enumerate(reads)))
    with zipfile.ZipFile(tmp_path / "olga-1.3.0-py3-none-any.whl", "w") as archive:
        archive.writestr("olga/__init__.py", "")
        archive.writestr("olga/generate_sequences.py", PROGRAM)
        for name, text in GENES.items():
            archive.writestr(f"{bed.GENES}/{name}", text)
    for requirement in antibody.WHEELS:
        name, version = requirement.split("==")
        digest = file_hash(tmp_path / f"{name}-{version}-py3-none-any.whl")
        monkeypatch.setitem(antibody.WHEELS, requirement, digest)
    return tmp_path


GENES = {
    "model_params.txt": "#GeneChoice;V_gene\n%IGHV1*01;AGCTTGTGATGT;0\n%IGHV1*02;TTT;1\n%IGHJ1*01;TTTGGGTAT;0\n",
    "V_gene_CDR3_anchors.csv": "gene,anchor_index,function\nIGHV1*01,7,F\nIGHV1*02,0,F\n",
    "J_gene_CDR3_anchors.csv": "gene,anchor_index,function\nIGHJ1*01,3,F\n",
}
PROGRAM = """
import sys
path = sys.argv[sys.argv.index("-o") + 1]
with open(path, "w") as file:
    for number in range(int(sys.argv[sys.argv.index("-n") + 1])):
        file.write("TGT\\tC" + "AR" * (number % 60) + "W\\tIGHV1\\tIGHJ1\\n")
    file.write("TGT\\tCARW\\tIGHV9\\tIGHJ1\\n")
"""


def test_germline_chains_are_v_gene_drawn_loop_and_j_gene(wheels):
    """V: AGC TTG TGA TGT from base 7 % 3 on is GCT TGT; J: TTT GGG TAT behind GGG is TAT."""
    found = sorted(bed.germline_chains(wheels, 3, seed=0), key=lambda chain: len(chain.loop))
    assert found == [("AC", "CW", "Y"), ("AC", "CARW", "Y"), ("AC", "CARARW", "Y")]


def test_a_run_prepares_fits_and_prints_and_is_printed_again_without_measuring(wheels, capsys, monkeypatch):
    home = wheels / "out" / "antibody"
    home.parent.mkdir()
    home.symlink_to(wheels)
    options = ["--folder", str(wheels / "out"), "--quick", "--seeds", "0", "--chains", "2"]
    monkeypatch.setattr(barrier, "CALLS", (1, 2))
    tables = barrier.main(options)
    assert [row["column"] for row in tables["far"]] == list(barrier.COLUMNS)
    assert [row["column"] for row in tables["CDR3"]] == list(barrier.COLUMNS)
    assert [row["calls"] for row in tables["chains"]] == ["", *(str(calls) for calls in (1, 2) for _ in range(4))]
    assert "| calibrated |" in capsys.readouterr().out
    assert json.loads((home / "tables.json").read_text()) == tables
    monkeypatch.setattr(barrier.Measure, "losses", None)
    assert barrier.main(options) == tables


def test_another_wheel_is_refused(wheels, monkeypatch):
    monkeypatch.setitem(antibody.WHEELS, "abstar==0.8.0", "0" * 64)
    with pytest.raises(SystemExit, match="SHA-256"):
        antibody.prepare(wheels)


@pytest.mark.parametrize("name", ["gsm8k", "demo"])
def test_text_is_measured_at_all_ratios_up_to_one(name, tmp_path, capsys):
    columns = ["one-step", "circuit alone", "potentials"]
    options = ["--bed", name, "--folder", str(tmp_path), "--quick", "--columns", *columns]
    (row, *_) = rows = barrier.main(options)["held-out"]
    assert [row["column"] for row in rows] == columns
    assert list(row) == ["column", "windows", "0.25", "0.50", "0.75", "1.00"]


def test_seeds_measure_windows_that_have_nothing_in_common():
    beds = [text.gsm8k_bed(Path(), seed=seed, is_quick=True) for seed in range(3)]
    held_out = [{tuple(window) for window in bed.held_out["held-out"].tolist()} for bed in beds]
    assert len(set.union(*held_out)) == sum(map(len, held_out))
    assert not set.union(*held_out) & {tuple(window) for bed in beds for window in bed.validation.tolist()}


def test_seeds_of_a_text_bed_share_what_has_no_random_start_and_no_other_bed_does():
    of = {}
    for seed, is_shared in itertools.product((0, 1), (False, True)):
        bed = replace(text.gsm8k_bed(Path(), seed=seed, is_quick=True), is_shared=is_shared)
        of[seed, is_shared] = fits.Fits(bed, Path(f"{seed}"), Path("all" if is_shared else f"{seed}"), fits.QUICK, seed)
    assert of[0, True].path("calibrated", "a") == of[1, True].path("calibrated", "a") == Path("all/a-calibrated")
    assert of[1, True].path("potentials", "a") == of[1, False].path("potentials", "a") == Path("1/a-potentials")
    assert of[1, False].path("calibrated", "a") == Path("1/a-calibrated")
    assert [of[1, is_shared].common_seed for is_shared in (False, True)] == [1, 0]


def test_another_text_than_that_of_the_denoiser_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"answer": "one"}\n{"answer": "two"}\n')
    with pytest.raises(CorpusError, match="made from"):
        text.gsm8k_bed(tmp_path, seed=0, is_quick=True, data=tmp_path / "train.jsonl")


def test_a_chain_of_the_text_beds_is_grown_from_half_its_states():
    data = torch.tensor(list(itertools.product(range(3), repeat=4)))
    of_four = text.grown(4, data.flatten(), block_length=4, num_categories=3, num_blocks=50, growth=((0.4,), (0.2,)))
    assert of_four.log_weights("transition0").shape == (4, 4)
    torch.testing.assert_close(of_four(data).exp().sum().item(), 1.0)
