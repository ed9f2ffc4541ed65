"""The text of a folder is known by its content: what another stage finds in its place is refused, wherever that is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import SMALLEST

from diffusion.app.recipe import TextRecipe
from diffusion.app.workspace import Workspace
from diffusion.app.writing import continue_prompts
from diffusion.errors import ArgumentError, CheckpointError, CorpusError
from diffusion.text.corpus import load_corpus

TEXT = "\n\n".join(f"The {i}th text says that {i} and {i + 1} make {2 * i + 1}. " * 4 for i in range(40))
OTHER = "\n\n".join(f"IN {i} ANDEREN WORTEN: {i} ÜBERALL, UND {i + 1} NIRGENDS! " * 4 for i in range(40))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def recipe_for(corpus):
    return SMALLEST.with_text(str(corpus), None)


def workspace(tmp_path):
    return Workspace(tmp_path / "models", progress=False)


@pytest.fixture
def trained(file, tmp_path):
    models = workspace(tmp_path)
    models.train(recipe_for(file))
    return models


@pytest.fixture
def fitted(trained):
    trained.fit(trained.recipe())
    return trained


STAGES = {
    "train": lambda models: models.train(models.recipe()),
    "cache": lambda models: models.cache(models.recipe()),
    "fit": lambda models: models.fit(models.recipe()),
    "evaluate": lambda models: models.evaluate_gap(models.recipe()),
    "prompts": lambda models: models.held_out_prompts(models.recipe(), 2),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", [lambda text: OTHER, lambda text: text + "x"], ids=["all", "one character"])
def test_a_text_that_changed_is_refused_by_every_stage(stage, change, fitted, file):
    file.write_text(change(TEXT))
    with pytest.raises(CorpusError, match=r"expected the text that .* was made from, .*; restore it, or choose"):
        STAGES[stage](fitted)
    file.write_text(TEXT)
    STAGES[stage](fitted)


def test_an_order_that_changed_is_a_change(tmp_path):
    digests = []
    for text in (TEXT, "\n\n".join(reversed(TEXT.split("\n\n"))), TEXT):
        (tmp_path / "text.txt").write_text(text)
        digests.append(load_corpus(tmp_path / "text.txt").digest)
    assert digests[0] == digests[2] != digests[1]
    assert load_corpus(tmp_path / "text.txt", seed=1).digest != digests[2]  # other documents are held out


def test_a_relative_path_means_the_same_file_from_every_folder(file, tmp_path, monkeypatch):
    models = workspace(tmp_path)
    models.train(recipe_for("corpus.txt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert models.recipe().text.corpus == str(file)
    models.fit(models.recipe())
    models.train(recipe_for("../corpus.txt"))
    assert [TextRecipe(corpus=name).corpus for name in ("embedded", "arithmetic")] == ["embedded", "arithmetic"]


def test_the_same_text_in_another_file_is_the_same(trained, file, tmp_path):
    moved = file.rename(tmp_path / "moved.txt")
    trained.train(recipe_for(moved))
    assert trained.recipe().text.corpus == str(moved)
    trained.fit(trained.recipe())
    other = tmp_path / "other.txt"
    other.write_text(OTHER)
    with pytest.raises(CheckpointError, match="was made with another text"):
        trained.train(recipe_for(other))


def test_a_folder_of_before_gets_the_hash_when_it_is_used_next(trained, file):
    path = trained.path / "recipe.json"
    content = json.loads(path.read_text())
    expected = content.pop("digests")
    path.write_text(json.dumps(content))
    trained.train(trained.recipe())
    assert json.loads(path.read_text())["digests"]["corpus"] == expected["corpus"] == load_corpus(file).digest
    trained.fit(trained.recipe())
    file.write_text(TEXT + "x")
    with pytest.raises(CorpusError, match="restore it"):
        trained.train(trained.recipe())


@pytest.mark.parametrize("stage", ["cache", "fit"])
def test_a_text_that_becomes_unknown_is_refused_where_nothing_else_tells(stage, trained, file):
    path = trained.path / "recipe.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "digests"}))
    file.write_text(OTHER)
    with pytest.raises(CorpusError, match="most of it became <unk>"):
        STAGES[stage](trained)


def test_a_prompt_that_becomes_unknown_is_refused(trained):
    options = {"gen_length": 32, "num_steps": 2}
    with pytest.raises(ArgumentError, match=r"prompt: expected characters of the text .*most of which became <unk>"):
        continue_prompts(trained.models(), ["The text", "ÄÖÜ a"], **options)
    assert len(continue_prompts(trained.models(), ["The text", "", "Ä text"], **options).generated) == 3


def test_a_folder_in_which_nothing_was_learnt_takes_another_text(file, tmp_path):
    models = workspace(tmp_path)
    file.write_text("too\n\nshort")
    with pytest.raises(CorpusError):
        models.train(recipe_for(file))
    file.write_text(TEXT)
    models.train(recipe_for(file))
    assert models.tokenizer().unk_id is not None


def test_a_folder_without_its_denoiser_still_knows_its_text(fitted, file):
    """Else the circuit would go on as that of another denoiser."""
    shutil.rmtree(fitted.path / "denoiser")
    file.write_text(OTHER)
    with pytest.raises(CorpusError, match="restore it"):
        fitted.train(fitted.recipe())


def test_a_tokenizer_that_changed_is_refused(trained):
    path = trained.path / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"T"', '"Ł"'))
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match=r"tokenizer.json is corrupt: it does not match its hash"):
        trained.tokenizer()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("num_unlinks", range(3))
def test_a_refit_that_is_killed_at_its_beginning_ends_like_one_that_was_not(num_unlinks, fitted, tmp_path, monkeypatch):
    """The circuit of before may not come back under the new settings."""
    recipe = fitted.recipe()
    recipe = replace(recipe, circuit=replace(recipe.circuit, likelihood_epochs=3))
    shutil.copytree(fitted.path, tmp_path / "straight")
    expected = Workspace(tmp_path / "straight", progress=False).fit(recipe).state_dict()
    unlink, done = Path.unlink, []

    def until_killed(self, **options):
        if "tmp" not in self.name:
            if len(done) == num_unlinks:
                raise Killed
            done.append(self)
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", until_killed)
        with pytest.raises(Killed):
            fitted.fit(recipe)
    found = fitted.fit(recipe).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
