"""``df.load_denoiser``: which adapter a config asks for, and weights in every form in which they are published."""

import json
import sys
from typing import ClassVar

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import save_file
from torch import nn

import diffusion as df
from diffusion.denoisers.checkpoints import load_weights
from diffusion.errors import ArgumentError, CheckpointError


def described(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_denoiser_of_ours_is_loaded_by_its_folder(tmp_path):
    saved = df.TransformerDenoiser(
        df.TransformerConfig(vocab_size=9, mask_id=0, pad_id=1, eos_id=2, width=8, num_layers=1, num_heads=2)
    )
    saved.save(tmp_path / "model")
    loaded = df.load_denoiser(str(tmp_path / "model"))
    tokens = torch.tensor([[3, 0, 5, 0]])
    assert torch.equal(loaded.logits(tokens), saved.logits(tokens))


@pytest.mark.parametrize("kind", ["gpt2", "diffusion_gemma", "udlm", None])
def test_models_without_masks_are_refused_with_the_reason(tmp_path, kind):
    with pytest.raises(ArgumentError, match="no mask" if kind in ("diffusion_gemma", "udlm") else "write an adapter"):
        df.load_denoiser(described(tmp_path, model_type=kind, architectures=["SomethingForCausalLM"]))


@pytest.mark.parametrize("text", ["[]", "{", "", '{"model_type": ' + "[" * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        df.load_denoiser(tmp_path)


def test_a_dtype_that_is_none_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="dtype"):
        df.load_denoiser(described(tmp_path, model_type="llada"), dtype="int8")


class Published:
    """A linear layer, and its weights as they lie in files."""

    tensors: ClassVar = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -1.0])}

    def single(self, folder):
        save_file(self.tensors, folder / "model.safetensors")

    def sharded(self, folder):
        for name, tensor in self.tensors.items():
            save_file({name: tensor}, folder / f"{name}.safetensors")
        weight_map = {name: f"{name}.safetensors" for name in self.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def pickled(self, folder):
        torch.save(self.tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("form", ["single", "sharded", "pickled"])
def test_weights_are_the_same_in_every_form(tmp_path, form):
    getattr(Published(), form)(tmp_path)
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    load_weights(layer, tmp_path, dtype=torch.float64)
    assert layer(torch.eye(3, dtype=torch.float64)).tolist() == [[0.5, 2.0], [1.5, 3.0], [2.5, 4.0]]
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing: bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, "unexpected: scale"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"weight: expected shape \(2, 3\), got \(3, 2\)"),
        ({"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}, "weight: expected finite numbers, got NaN"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "bias2": torch.zeros(2)}, "bias once, got it twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_weights(nn.Linear(3, 2), tmp_path, names=lambda name: name.replace("bias2", "bias"))


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="got none"):
        load_weights(nn.Linear(3, 2), tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "absent.safetensors", "x.py"])
def test_an_index_names_files_beside_it(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(Published.tensors, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match="expected"):
        load_weights(nn.Linear(3, 2), folder)


def test_a_pickle_is_not_executed(tmp_path):
    torch.save({"weight": Published}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a file that can be read"):
        load_weights(nn.Linear(3, 2), tmp_path)


def test_a_damaged_file_is_noticed(tmp_path):
    Published().single(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="expected a file that can be read"):
        load_weights(nn.Linear(3, 2), tmp_path)


class Hub:
    """A stand-in for the hub: one repository, of which it notes what is asked for."""

    def __init__(self, folder, **config):
        self.folder, self.config, self.asked = folder, config, []

    def __call__(self, name, *, revision, allow_patterns):
        self.asked.append((revision, "*.safetensors" in allow_patterns))
        if name != "someone/model":
            raise FileNotFoundError("404: no such repository\nand more")
        described(self.folder, **self.config)
        return str(self.folder)


def test_a_model_of_the_hub_is_described_before_it_is_downloaded(tmp_path, monkeypatch):
    hub = Hub(
        tmp_path, model_type="mdlm", vocab_size=20, model_length=8, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=2
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(CheckpointError, match="got none"):  # there are no weights, in either form
        df.load_denoiser("someone/model", revision="v2")
    assert hub.asked == [("v2", False), ("v2", True), ("v2", False)]
    hub.asked, hub.config = [], {"model_type": "diffusion_gemma"}
    with pytest.raises(ArgumentError, match="no mask"):
        df.load_denoiser("someone/model")
    assert hub.asked == [(None, False)]


def test_what_is_neither_a_folder_nor_a_repository_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path))
    with pytest.raises(ArgumentError, match="'someone/else': 404: no such repository"):
        df.load_denoiser("someone/else")
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match="name_or_path"):
        df.load_denoiser("no such/folder at/all")
    with pytest.raises(ArgumentError, match="name_or_path"):
        df.load_denoiser(7)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"unfactor\[hf\]"):
        df.load_denoiser(tiny.published(tiny.DREAM, tmp_path))
    assert df.load_denoiser(tiny.published(tiny.MDLM, tmp_path / "mdlm")).spec.vocab_size == tiny.VOCABULARY
