"""The text of a folder is known by its content: what another stage finds in its place is refused, wherever that is."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from test_cli import SMALLEST

import circuits as ct
from circuits import store
from diffusion.app import workspace as workspace_module
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
    with pytest.raises(CheckpointError, match="expected a folder that was made with this text"):
        trained.train(recipe_for(other))


def test_a_folder_of_before_gets_the_hash_when_it_is_used_next(trained, file):
    path = trained.path / "recipe.json"
    content = json.loads(path.read_text())
    expected = content.pop("digests")
    del content["sha256"]
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
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content.keys() - {"digests", "sha256"}}))
    file.write_text(OTHER)
    with pytest.raises(CorpusError, match="mostly became <unk>"):
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
    with pytest.raises(CheckpointError, match=r"tokenizer.json: expected the content that its hash is of"):
        trained.tokenizer()


class Killed(BaseException):
    pass


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", ["fit_coupled", "remove_folder"])
def test_a_refit_that_is_killed_leaves_a_whole_result_and_ends_like_one_that_was_not(step, fitted, tmp_path):
    """The circuit of before is there until the new one is, and never comes back under the new settings."""
    before, likelihood = fitted.head(), ct.load(fitted.path / "likelihood")
    recipe = fitted.recipe()
    other = replace(recipe, circuit=replace(recipe.circuit, likelihood_epochs=3))
    shutil.copytree(fitted.path, tmp_path / "straight")
    expected = Workspace(tmp_path / "straight", progress=False).fit(other)
    original = getattr(workspace_module, step)

    def killed(*arguments, **options):
        if step == "fit_coupled":
            original(*arguments, **options)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace_module, step, killed)
        with pytest.raises(Killed):
            fitted.fit(other)
    if step == "fit_coupled":
        assert same(fitted.head(), before)
        assert same(ct.load(fitted.path / "likelihood"), likelihood)
    assert fitted.evaluate_gap(recipe).rows
    assert same(fitted.fit(other), expected)
    assert same(fitted.head(), expected)
    assert same(fitted.fit(recipe), before)
    names = sorted(path.name for path in (fitted.path / "checkpoints").glob("*.safetensors"))
    assert [name.partition("-")[0] for name in names] == ["denoiser.safetensors", "head", "likelihood"]
    assert not (fitted.path / "cache").exists()


@pytest.mark.parametrize("name", ["denoiser/config.json", "head/head.safetensors", "head/manifest.json"])
def test_a_result_that_is_not_whole_is_made_again(name, fitted):
    before = fitted.denoiser(), fitted.head()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(fitted.path / name)
        assert same(fitted.train(fitted.recipe()), before[0])
        assert same(fitted.fit(fitted.recipe()), before[1])
        assert same(fitted.head(), before[1])


def test_a_result_of_a_newer_library_is_left_alone(fitted):
    path = fitted.path / "denoiser" / "manifest.json"
    content = json.loads(path.read_text()) | {"manifest_version": 2}
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": store._own_hash(content)}))
    with pytest.raises(CheckpointError, match="install a newer unfactor"):
        fitted.train(fitted.recipe())
    assert json.loads(path.read_text())["manifest_version"] == 2


@pytest.mark.parametrize("stamp", ["whole", "broken", "absent"])
def test_a_head_of_before_is_known_by_the_file_beside_it(stamp, fitted, monkeypatch):
    recipe, before = fitted.recipe(), fitted.head()
    for path in fitted.path.rglob("manifest.json"):
        path.unlink()
    shutil.rmtree(fitted.path / "checkpoints")
    content = json.dumps({"circuit": asdict(recipe.circuit), "seed": recipe.seed})
    if stamp != "absent":
        (fitted.path / "circuit.json").write_text(content if stamp == "whole" else content[:-1])
    assert same(fitted.fit(recipe), before)
    assert (fitted.path / "circuit.json").exists() == (stamp == "whole")
    assert (fitted.path / "checkpoints").exists() == (stamp != "whole")


def test_a_recipe_that_was_changed_is_named(trained):
    path = trained.path / "recipe.json"
    path.write_text(path.read_text().replace('"num_states": 3', '"num_states": 4'))
    with pytest.raises(CheckpointError, match=r"recipe.json: expected the content that its hash is of, .*; restore it"):
        trained.recipe()


@pytest.mark.parametrize("text", ["too\n\nshort", "x" * 70 + "\n\nshort"])
def test_a_text_that_is_refused_leaves_nothing_behind(text, file, tmp_path):
    file.write_text(text)
    with pytest.raises(CorpusError):
        workspace(tmp_path).train(recipe_for(file))
    assert not (tmp_path / "models").exists()


def test_what_a_run_left_that_was_killed_at_its_beginning_is_no_strangers(file, tmp_path):
    models = workspace(tmp_path)
    for name in ("results", ".0a1b2c3d.unfactor-tmp"):
        (models.path / name).mkdir(parents=True)
    (models.path / ".lock").write_text("")
    models.train(recipe_for(file))
    assert {path.name for path in models.path.iterdir()} == {
        *("checkpoints", "denoiser", "recipe.json", "results", "tokenizer.json")
    }
    (tmp_path / "others" / "results").mkdir(parents=True)
    (tmp_path / "others" / "results" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CheckpointError, match="expected an empty folder or one of unfactor"):
        Workspace(tmp_path / "others", progress=False).train(recipe_for(file))


def test_two_at_work_in_one_folder(trained, run_program):
    with trained.alone():
        assert trained.fit(trained.recipe()) is not None  # its own stages
        code, _, message = run_program("fit", "--out", trained.path, "--quiet")
    assert code == 2
    assert "for this process alone, got process" in message
    assert message.count("\n") == 1
