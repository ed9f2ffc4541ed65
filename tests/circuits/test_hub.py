"""Circuits travel through folders and a hub that is played by a folder; nothing here touches the network."""

import subprocess
import sys

import pytest
import torch

import circuits as ct


@pytest.fixture
def pc():
    return ct.compile(ct.structures.hmm(4, 3, 5), dtype=torch.float64, seed=0)


def same(one, other):
    return repr(one.circuit) == repr(other.circuit) and all(torch.equal(one.bank[k], other.bank[k]) for k in one.bank)


def test_a_folder_holds_the_circuit_and_a_card(pc, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for _ in range(2):  # a second time replaces the first
        ct.hub.save_pretrained(pc, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"structure.json", "weights.safetensors", "README.md"}
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    card = (tmp_path / "README.md").read_text()
    assert "probabilistic-circuit" in card
    assert str(pc.circuit) in card
    assert "ct.hub.from_pretrained(" in card
    assert "Needed" not in card
    loaded = ct.hub.from_pretrained(tmp_path)
    assert same(loaded, pc)
    assert loaded.dtype == torch.float64
    assert ct.hub.from_pretrained(str(tmp_path), dtype=torch.float32).dtype == torch.float32
    assert same(ct.load(tmp_path), pc)


def test_a_folder_of_save_is_loaded_too(pc, tmp_path):
    ct.save(pc, tmp_path / "pc")
    assert same(ct.hub.from_pretrained(tmp_path / "pc"), pc)


def test_what_is_pushed_is_what_is_pulled(pc, fake_hub):
    address = ct.hub.push_to_hub(pc, "circuit")
    assert address == "https://example.org/somebody/circuit"
    assert same(ct.hub.from_pretrained("somebody/circuit"), pc)


def test_what_is_not_there_says_so(fake_hub, tmp_path):
    with pytest.raises(ct.CheckpointError, match="expected a folder, or a repository"):
        ct.hub.from_pretrained("somebody/else")
    with pytest.raises(ct.CheckpointError, match=r"structure\.json"):
        ct.hub.from_pretrained(tmp_path)
    with pytest.raises(ct.ArgumentError, match="pc"):
        ct.hub.save_pretrained(ct.structures.hmm(2, 2, 2), tmp_path)


def test_importing_circuits_does_not_import_the_hub():
    code = "import sys, circuits; print({'huggingface_hub', 'sklearn', 'pyjuice'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_folder_that_held_another_circuit_is_whole_afterwards(tmp_path):
    circuits = [ct.compile(ct.structures.hmm(3, 2, 2), seed=seed) for seed in (0, 1, 2)]
    ct.save(circuits[0], tmp_path / "folder")
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for pc in circuits[1:]:
        ct.hub.save_pretrained(pc, tmp_path / "folder")
        loaded = ct.hub.from_pretrained(tmp_path / "folder")
        assert all(torch.equal(loaded.bank[name], pc.bank[name]) for name in pc.bank)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"
