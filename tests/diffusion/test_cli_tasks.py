"""The program's tasks, judged texts and scores, on smallest models."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from tiny_folders import block_names, commands, gsm8k, make_folder, write_records

from diffusion import log_likelihood
from diffusion.app import tasks, workspace
from diffusion.evaluation.scorer import CausalScorer
from diffusion.evaluation.tasks import runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(monkeypatch, run_program, tmp_path):
    monkeypatch.chdir(tmp_path)

    return run_program


@pytest.fixture
def questions(tmp_path):
    return gsm8k(tmp_path / "gsm8k.jsonl.gz")


def test_a_task_with_the_models_of_a_folder(run, folder, questions, tmp_path, monkeypatch):
    options = ("evaluate", "--out", folder, "--task", "gsm8k", "--data", questions, "--length", 16, "--shots", 1)
    options += ("--shots-data", questions, "--steps", "16,4", "--threshold", 0.5, "--batch-size", 2, "--quiet")
    options += ("--results", tmp_path / "results")
    code, text, error = run(*options, "--limit", 3)
    assert code == 0, error
    assert "gsm8k: 3 questions, 1 worked examples before each" in text
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"gsm8k.json", "gsm8k.txt", "gsm8k.png", "gsm8k-answers"}
    stored = json.loads((tmp_path / "results" / "gsm8k.json").read_text())
    ways = [(point["setting"]["with_circuit"], point["setting"]["num_steps"]) for point in stored["points"]]
    assert ways == [(used, steps) for used in (False, True) for steps in (16, 4, None)]
    assert {point["num_samples"] for point in stored["points"]} == {3}
    assert len(list((tmp_path / "results" / "gsm8k-answers").iterdir())) == 6
    asked = []
    original = runner._Run._answered
    monkeypatch.setattr(runner._Run, "_answered", lambda *given: (asked.append(given[2]), original(*given))[1])
    assert run(*options)[0] == 0
    assert sorted(asked) == sorted([[3, 4]] * 6)  # the others are there
    asked.clear()
    assert run(*options, "--no-circuit")[0] == 0
    assert asked == []
    assert len(json.loads((tmp_path / "results" / "gsm8k.json").read_text())["points"]) == 3
    assert (tmp_path / "results" / "gsm8k.png").read_bytes()[:4] == b"\x89PNG"


def test_a_task_of_a_file(run, folder, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "The 3th", "answer": "text"}\n')
    code, text, error = run("evaluate", "--out", folder, "--task", path, "--length", 8, "--steps", 8, "--quiet")
    assert code == 0, error
    assert "mine: 1 questions" in text
    assert (folder / "results" / "mine.json").exists()


def test_the_options_of_codd(run, folder, questions, tmp_path):
    """Its names of model, circuit and options, with --model and --head saying where ours are."""
    shutil.copytree(folder / "denoiser", tmp_path / "named")
    shutil.copy(folder / "tokenizer.json", tmp_path / "named")
    options = ("evaluate", "--model_alias", "llada", "--llada_ckpt", "named", "--pc_ckpt", folder / "head")
    options += ("--task", "gsm8k", "--data", questions, "--alg", "topprob,origin", "--tokens_per_step", 4)
    options += ("--gen_length", 16, "--block_length", 8, "--pc_temperature", 0.2, "--pc_frac", 0.5, "--quiet")
    code, _, error = run(*options)
    assert code == 0, error
    stored = json.loads((tmp_path / "unfactor-results" / "gsm8k.json").read_text())
    settings = [point["setting"] for point in stored["points"]]
    assert [setting["config"]["strategy"] for setting in settings] == ["top_prob", "random"] * 2
    assert {(one["num_steps"], one["gen_length"], one["block_length"]) for one in settings} == {(4, 16, 8)}
    assert {setting["config"]["temperature"] for setting in settings} == {0.2}
    assert [one["config"]["activation_threshold"] for one in settings] == [None, None, 0.5, 0.5]


class Lengths:
    """A judge that finds a text the less probable, the longer it is."""

    name, quality = "lengths", CausalScorer.quality

    def _plain_ids(self, text):
        return list(text.encode())

    def log_likelihoods(self, texts, prompts, *, batch_size):
        counts = torch.tensor([len(text) for text in texts])
        return -2.0 * counts.double(), counts


def test_texts_are_judged_from_outside(run, folder, questions, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(tasks.CausalScorer, "load", lambda name, **options: (loaded.append(name), Lengths())[1])
    options = ("evaluate", "--out", folder, "--scorer", "some/model", "--results", tmp_path / "results", "--quiet")
    code, text, error = run(*options, "--texts", 3, "--length", 16, "--steps", "16,4")
    assert code == 0, error
    assert loaded == ["some/model"]
    assert "distinct-2" in text
    stored = json.loads((tmp_path / "results" / "texts.json").read_text())
    assert len(stored["rows"]) == 5  # two ways without, two with, and the true text
    for row in stored["rows"]:
        assert row["quality"]["perplexity"]["value"] == pytest.approx(math.exp(2))
        assert row["quality"]["num_texts"] == 3
    assert stored["rows"][-1]["decoding"] == "true text"
    task = ("--task", "gsm8k", "--data", questions, "--length", 16, "--steps", 4, "--temperature", 1, "--limit", 2)
    code, text, error = run(*options, *task)
    assert code == 0, error
    assert (tmp_path / "results" / "gsm8k-texts.json").exists()
    assert "perplexity" in text


def test_the_log_probability_of_texts(run, folder, tmp_path):
    texts = ["The 3th text", "says that"]
    code, text, error = run("score", *texts, "--out", folder, "--prompt", "The ", "--json", tmp_path / "s.json")
    assert code == 0, error
    assert "with circuit" in text
    stored = json.loads((tmp_path / "s.json").read_text())
    space = workspace.Workspace(folder, progress=False)
    denoiser, head, tokenizer = space.denoiser(), space.head(), space.tokenizer()
    for row, one in zip(stored["rows"], texts, strict=True):
        ids = [torch.tensor(tokenizer.encode(part)) for part in ("The ", one)]
        for used, value in zip((None, head), row["log_probs"], strict=True):
            want = log_likelihood(
                denoiser, ids[:1], ids[1:], head=used, method="sequential", block_length=min(32, len(ids[1]))
            )
            assert value == pytest.approx(float(want[0]), abs=1e-4)
        assert row["num_tokens"] == len(one)
    decoder = ("score", "The 3th", "--out", folder, "--method", "decoder", "--steps", 2, "--strategy", "margin")
    assert run(*decoder, "--no-circuit")[1].count("circuit") == 1
    assert run(*decoder)[1] == run(*decoder)[1]
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "The 3th"}\n{"text": "says", "prompt": "The "}\n')
    code, text, _ = run("score", "--out", folder, "--file", path, "--method", "elbo", "--samples", 2)
    assert code == 0
    assert "The 3th" in text


@pytest.mark.parametrize("name", [name for name in block_names() if name != "harness"])  # which tests of its own run
def test_the_commands_of_the_documentation_run(run, folder, tmp_path, monkeypatch, name):
    shutil.copytree(folder, tmp_path / "models", ignore=shutil.ignore_patterns("results"))
    gsm8k(tmp_path / "gsm8k-test.jsonl.gz")
    gsm8k(tmp_path / "gsm8k-train.jsonl.gz")
    write_records(tmp_path / "questions.jsonl", [{"prompt": "The 3th", "answer": ["text", "says"]}])
    program = {"text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
    write_records(tmp_path / "mbpp.jsonl", [program])
    write_records(tmp_path / "texts.jsonl", [{"text": "The 3th"}, {"text": "says", "prompt": "It "}])
    monkeypatch.setattr(tasks.CausalScorer, "load", lambda name, **options: Lengths())
    for arguments in commands(name):
        code, text, error = run(*arguments)
        assert code == 0, (arguments, error)
        assert text


# without transformers that is what is missing
SCORER_IS_MISSING = "scorer: expected a causal model" if find_spec("transformers") else "scorer: expected transformers"


def test_mistakes_get_one_line(run, folder, questions, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    task = ("evaluate", "--out", folder, "--task", path, "--quiet")
    cases = [
        (("evaluate", "--out", folder, "--steps", "8"), "task: expected one with --steps, got none"),
        (("evaluate", "--model", "some/model"), "task: expected one with --model"),
        (("evaluate", "--model", "some/model", "--scorer", "x"), "task: expected one with --model"),
        (("evaluate", "--out", folder, "--task", "gsm9k"), "task: expected one of gsm8k"),
        (("evaluate", "--out", folder, "--task", "mbpp", "--data", path), "allow_code_execution: expected True"),
        ((*task, "--steps", "8,x"), "steps: expected whole numbers separated by commas, got '8,x'"),
        ((*task, "--steps", "1", "--length", "64"), "num_steps: expected at least one for each"),
        ((*task, "--windows", "8"), "windows: expected none with --task"),
        ((*task, "--texts", "8"), "texts: expected none with --task"),
        ((*task, "--strategy", "magic"), "strategy: expected one of"),
        ((*task, "--length", "200"), "gen_length: question 0 has 1 tokens"),
        ((*task, "--chat"), "chat: expected a tokenizer with a chat template"),
        ((*task, "--scorer", tmp_path / "missing.gguf", "--length", "8"), SCORER_IS_MISSING),
        (("score", "--out", folder), "text: expected texts, or a --file"),
        (("score", "a", "--out", folder, "--file", path), "text: expected texts, or a --file"),
        (("score", "", "--out", folder), "text: expected at least one token"),
        (("score", "a", "--out", folder, "--method", "magic"), "method: expected one of decoder, elbo, sequential"),
        (("score", "a", "--out", folder, "--steps", 2), "num_steps: --method sequential has no such option"),
        (("score", "--out", folder, "--file", path), "expected every line"),
    ]
    for arguments, message in cases:
        code, _, error = run(*arguments)
        assert code == 2, arguments
        assert message in error, arguments
        assert error.count("\n") == 1
