"""The benchmark of antibodies: chains and their split, and the whole run on wheels of a tiny model."""

import json
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from circuits.files import file_hash

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, that import what lies beside them

import _antibody_data as antibody
import antibody as benchmark

pytest.importorskip("transformers", reason="AntiBERTy runs on the BERT classes of transformers")

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


def test_windows_end_behind_the_motif():
    assert antibody.window_of(chain("ARDYYG")) == chain("ARDYYG")[:-1][-100:]
    assert len(antibody.window_of(chain("ARDYYG") + "WWWW")) == 100
    assert antibody.window_of(chain("ARDYYG")[20:]) is None


def test_near_duplicates_are_never_on_both_sides():
    chains = [
        chain(f"AR{'DEFGHIKLMN'[number % 10]}{'PQRSTVY'[number % 7]}{'A' * (number % 5)}V", number)
        for number in range(60)
    ]
    mutated = ["W" + one[1:30] + "K" + one[31:] for one in chains[:20]]  # two residues
    split = antibody.split_windows([*chains, *mutated], held_out=0.5)
    differ = (split.train.unsqueeze(1) != split.held_out).sum(-1)
    assert int(differ.min()) > 5
    start = [antibody.cdr3_start(text(row)) for row in (*split.train, *split.held_out)]
    loops = [text(row)[first:90] for row, first in zip((*split.train, *split.held_out), start, strict=True)]
    for one in loops[: len(split.train)]:
        assert max(antibody.alike(one, other) for other in loops[len(split.train) :]) < 0.8
    assert len(split.held_out) == round(split.num_clusters / 2)


def text(ids):
    return "".join(antibody.VOCABULARY[id] for id in ids)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Write wheels with a tiny BERT, which has heads that are left out, and with reads."""
    import transformers

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
    reads = [read(chain("A" * (number % 9) + "RDYWG"[number % 5 :] + "KV", number)) for number in range(24)]
    with zipfile.ZipFile(tmp_path / "abstar-0.8.0-py3-none-any.whl", "w") as archive:
        archive.writestr(antibody.READS_MEMBER, "".join(f">{number}\n{one}\n" for number, one in enumerate(reads)))
    for requirement in antibody.WHEELS:
        name, version = requirement.split("==")
        digest = file_hash(tmp_path / f"{name}-{version}-py3-none-any.whl")
        monkeypatch.setitem(antibody.WHEELS, requirement, digest)
    return tmp_path


def test_a_run_prepares_fits_and_prints_and_is_printed_again_without_measuring(wheels, capsys, monkeypatch):
    options = ["--folder", str(wheels), "--windows", "2", "--states", "2", "--epochs", "2", "--masks", "1"]
    options += ["--steps", "2", "--ratios", "0.02", "0.04", "--latent-potentials"]
    table = benchmark.main(options)
    assert [row.num_masked for row in table.rows] == [2, 4]
    assert table.num_windows == 2
    assert "| 0.02 |" in capsys.readouterr().out
    monkeypatch.setattr(benchmark.df.evaluation, "misspecification_gap", None)
    assert benchmark.main(options) == table


def test_another_wheel_is_refused(wheels, monkeypatch):
    monkeypatch.setitem(antibody.WHEELS, "abstar==0.8.0", "0" * 64)
    with pytest.raises(SystemExit, match="SHA-256"):
        antibody.prepare(wheels)
