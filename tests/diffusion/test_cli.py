"""The program: the stages on a small corpus, reuse, and one clear line for everything that is wrong."""

import json
import re

import pytest
import torch

from diffusion.app import terminal, workspace
from diffusion.app.options import OPTIONS, described
from diffusion.app.stream import SEPARATOR
from diffusion.conditioners import LatentPotentials, MarginalMatching
from diffusion.decoding.config import MODES, STRATEGIES, DecodingConfig
from diffusion.decoding.head_mixture import HeadMixture
from diffusion.evaluation.gap import ABOVE_ONE, NOT_MEANINGFUL, Estimate, GapRow, GapTable
from diffusion.training.circuit import CircuitTraining
from diffusion.training.denoiser import DenoiserTraining
from diffusion.training.joint import JointTraining

SMALLEST = workspace.Recipe(
    denoiser=workspace.DenoiserRecipe(
        width=16, num_layers=1, num_heads=2, max_length=128, training=DenoiserTraining(steps=4, batch_size=4)
    ),
    circuit=workspace.CircuitRecipe(
        num_states=3,
        likelihood_blocks=64,
        likelihood_epochs=1,
        cached_blocks=32,
        training=CircuitTraining(steps=3, batch_size=16),
    ),
    gap_windows=6,
    texts=4,
)


@pytest.fixture
def run(monkeypatch, run_program):
    monkeypatch.setitem(workspace.PRESETS, "tiny", SMALLEST)

    return run_program


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"The {i}th text says that {i} and {i + 1} make {2 * i + 1}. " * 4 for i in range(40)))
    return path


def test_the_stages_one_by_one(run, corpus, tmp_path):
    out = tmp_path / "models"
    assert run("train", "--corpus", corpus, "--out", out, "--preset", "tiny", "--quiet")[0] == 0
    assert run("cache-logits", "--out", out, "--quiet")[0] == 0
    assert run("fit", "--out", out, "--quiet")[0] == 0
    code, text, _ = run("evaluate", "--out", out, "--quiet")
    assert code == 0
    assert "one-step" in text
    assert "true text" in text
    names = {f"{name}.{kind}" for name in ("gap", "few_steps") for kind in ("json", "png", "txt")} | {"report.html"}
    assert {path.name for path in (out / "results").iterdir()} == names
    assert (out / "checkpoints" / "few_steps" / "true-text.json").exists()  # where a run that was killed goes on
    code, text, _ = run("evaluate", "--out", out, "--no-few-steps", "--quiet")
    assert code == 0
    assert "true text" not in text
    options = ("generate", "--out", out, "--prompt", "The 3th", "--length", 64, "--steps", 4, "--seed", 3)
    options += ("--logits-eos-inf", "--temperature", 1)
    code, first, _ = run(*options)
    assert code == 0
    assert re.fullmatch(r"The 3th(.|\n){64}\n", first)
    assert run(*options)[1] == first
    assert run(*options, "--no-circuit")[0] == 0
    check_what_is_written(run, out, options, first)
    code, text, _ = run("tune", "--out", out, "--windows", 6, "--temperature", "--strategy", "--quiet")
    assert code == 0
    assert "Chosen on 6 held-out blocks: activation threshold" in text
    tuned, stored = workspace.Workspace(out).head(), json.loads((out / "results" / "tuning.json").read_text())
    assert (tuned.activation_threshold, tuned.temperature) == (stored["activation_threshold"], stored["temperature"])
    assert (tuned.decoding["decode"], tuned.decoding["strategy"]) == (stored["decode"], stored["strategy"])
    assert (out / "checkpoints" / "tuning" / "joint-entropy-4.json").exists()  # where a run that was killed goes on
    local = ("--normalization", "local", "--likelihood-weight", 0.3, "--states", 6, "--grow", 1)
    assert run("fit", "--out", out, "--no-calibration", "--potentials", *local, "--quiet")[0] == 0
    assert workspace.Workspace(out).head().normalization == "local"
    circuit = workspace.Workspace(out).recipe().circuit
    assert (circuit.training.likelihood_weight, circuit.num_states, circuit.num_splits) == (0.3, 6, 1)
    assert run("fit", "--out", out, "--states", 5, "--quiet")[0] == 2  # 5 cannot be halved, as the folder's recipe asks
    assert workspace.Workspace(out).recipe().circuit == circuit  # what is refused is not written down
    (potentials,) = workspace.Workspace(out).head().conditioners
    assert isinstance(potentials, LatentPotentials)
    assert 0 < potentials.linear.weight.abs().max() <= 3 * 1e-3 + 1e-6  # three updates of Adam
    code, _, error = run("fit", "--out", out, "--matching", 2, "--quiet")
    assert code == 2
    assert "matching: expected 0 steps with normalization local, got 2" in error
    code, _, error = run("fit", "--out", out, "--matching", 2, "--normalization", "global", "--quiet")
    assert code == 0, error
    head = workspace.Workspace(out).head()
    assert [type(one) for one in head.conditioners] == [LatentPotentials, MarginalMatching]
    HeadMixture([head], vocab_size=workspace.Workspace(out).denoiser().spec.vocab_size).save(tmp_path / "mixture")
    assert run(*options, "--head", tmp_path / "mixture")[0] == 0


def test_denoiser_and_circuit_are_trained_together_beside_the_denoiser_that_was(run, corpus, tmp_path, monkeypatch):
    out = tmp_path / "models"
    assert run("train", "--corpus", corpus, "--out", out, "--preset", "tiny", "--quiet")[0] == 0
    before = weights_of(workspace.Workspace(out).denoiser())
    monkeypatch.setattr(JointTraining.__init__, "__kwdefaults__", JointTraining.__init__.__kwdefaults__ | {"steps": 2})
    code, _, error = run("fit", "--out", out, "--joint", "--optimizer", "anemone", "--quiet")
    assert code == 0, error
    made = workspace.Workspace(out)
    assert made.recipe().circuit.training.optimizer == "anemone"
    assert made.recipe().circuit.joint == JointTraining(steps=2)
    assert weights_of(made.base_denoiser()).equal(before)
    joint = weights_of(made.denoiser())
    assert 0 < (joint - before).abs().max() <= 2 * 1e-4 + 1e-6  # two updates of Adam
    assert run("fit", "--out", out, "--quiet")[0] == 0  # done already, and kept
    assert weights_of(made.denoiser()).equal(joint)
    code, _, error = run("generate", "--out", out, "--prompt", "The 3th", "--length", 32, "--logits-eos-inf")
    assert code == 0, error
    assert run("fit", "--out", out, "--no-joint", "--quiet")[0] == 0
    assert weights_of(made.denoiser()).equal(before)
    assert not list(out.glob("joint-*"))


def weights_of(denoiser):
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def check_what_is_written(run, out, options, first):
    code, two, _ = run(*options, "--samples", 2)
    assert two.split(f"\n{SEPARATOR}\n")[0] == first.removesuffix("\n")
    assert two.count(SEPARATOR) == 1
    names = {"--length": "--max-new-tokens", "--steps": "--num-steps"}
    assert run(*[names.get(option, option) for option in options])[1] == first
    assert run(*options, "--alg", "random")[1] == run(*options, "--strategy", "random")[1]
    assert run(*options, "--block-length", 16)[1] == run(*options, "--block", 16)[1] != first
    best = run(*options, "--top-k", 1, "--strategy", "random", "--no-circuit")[1]
    assert run(*options[:-2], "--strategy", "random", "--no-circuit")[1] == best != first  # greedy, by default
    assert "e" not in run(*options, "--stop", "e", "--stop", " ")[1][7:]
    code, matched, _ = run(
        *(one for one in options if one != "--logits-eos-inf"), "--regex", "(th)*e", "--keyword", "thth"
    )
    assert re.fullmatch("The 3th(th){2,}e\n", matched)
    lines = run(*options, "--stream")[1].splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == ["1", "2", "3", "4"]
    assert lines[0].count("░") == 32 + 16
    assert "░" not in lines[3]
    assert "\n".join([*lines[4:], ""]) == first
    assert run(*options, "--record", out / "text.gif")[1] == first
    assert (out / "text.gif").read_bytes()[:4] == b"GIF8"
    code, filled, _ = run("infill", "The ___ text says <mask*2>.", "--out", out, "--samples", 2, "--temperature", 1)
    assert code == 0
    for text in filled.removesuffix("\n").split(f"\n{SEPARATOR}\n"):
        assert re.fullmatch(r"The (.|\n){3} text says (.|\n){2}\.", text)
    assert "expected a hole" in run("infill", "No hole", "--out", out)[2]


def test_the_help_is_that_of_the_tables(run):
    """Every mode and every strategy, and every option of the configuration, in the words in which they are defined."""
    said = " ".join(run("generate", "--help")[1].replace("│", " ").split())
    for name, meaning in ({name: mode.says for name, mode in MODES.items()} | STRATEGIES).items():
        assert f"{name}: {meaning}."[:30] in said
    for name in DecodingConfig.__dataclass_fields__:
        assert OPTIONS[name]
    assert described(DecodingConfig)["threshold"] == "Of the strategy threshold, a probability."
    assert described(DecodingConfig).keys() == DecodingConfig.__dataclass_fields__.keys()


def test_the_demo_reuses_its_folder(run, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    arguments = ("demo", "--from-scratch", "--corpus", "arithmetic", "--preset", "tiny", "--out", out, "--quiet")
    code, text, _ = run(*arguments)
    assert code == 0
    lines = [line for line in text.splitlines() if line.split(":")[0] in ("Shown", "Files", "Next")]
    assert len(lines) == 3
    assert (out / "results" / "arithmetic.png").exists()
    monkeypatch.setattr(workspace, "train_denoiser", None)  # calling it would fail
    monkeypatch.setattr(workspace, "fit_coupled", None)
    assert run(*arguments)[0] == 0
    code, _, error = run("demo", "--from-scratch", "--corpus", "embedded", "--preset", "tiny", "--out", out)
    assert code == 2
    assert "expected a folder that was made with this text" in error


def test_mistakes_get_one_line_and_exit_code_two(run, corpus, tmp_path):
    empty, folder = tmp_path / "empty.txt", tmp_path / "other"
    empty.write_text(" \n\n ")
    folder.mkdir()
    (folder / "file").write_text("precious")
    models = tmp_path / "models"
    assert run("train", "--corpus", corpus, "--out", models, "--preset", "tiny", "--quiet")[0] == 0
    new = ("--out", tmp_path / "new")
    cases = [
        (("demo", "--from-scratch", "--corpus", tmp_path / "missing.txt", *new), "missing.txt"),
        (("demo", "--from-scratch", "--corpus", empty, *new), "expected text, got none"),
        (("demo", "--from-scratch", "--preset", "huge", *new), "preset: expected one of"),
        (("demo", "--corpus", empty, *new), "train on it with --from-scratch"),
        (("demo", "--nonsense"), "nonsense"),
        (("demo", "--device", "quantum", *new), "device"),
        (("train", "--corpus", corpus, "--out", folder), "expected an empty folder or one of unfactor"),
        (("fit", *new), "expected a model, got none"),
        (("evaluate", "--out", models), "expected a circuit, got none yet"),
        (("generate", "--out", models, "--prompt", "x" * 200, "--no-circuit"), "at most the denoiser's 128 positions"),
        (("generate", "--out", models, "--record", tmp_path / "a.jpg", "--no-circuit"), "expected a .png or .gif file"),
        (("generate", "--out", models, "--top-p", "2", "--no-circuit"), "top_p: expected a number"),
        (("generate", "--out", models, "--no-circuit", "--steps", "1"), "num_steps: expected at least one for each"),
        (("generate", "--out", models, "--decode", "magic", "--no-circuit"), "decode: expected one of"),
        (("generate", "--out", models, "--steps", "zero"), "steps"),
        (("nonsense",), "nonsense"),
    ]
    for arguments, message in cases:
        code, out, error = run(*arguments)
        assert code == 2, arguments
        assert message in error
        assert error.count("\n") == 1
        assert out == ""
    assert not (tmp_path / "new").exists()
    assert (folder / "file").read_text() == "precious"


def row_of(**changes):
    numbers = {"one_step": 22.8, "circuit_alone": 9.7, "coupled": 9.6, "sequential": 8.6, "share_closed": 0.88}
    estimates = {name: Estimate(number, number - 0.5, number + 0.5) for name, number in numbers.items()}
    return GapRow(**{"mask_ratio": 1.0, "num_masked": 8, "is_meaningful": True, **estimates, **changes})


def test_the_demo_ends_with_what_its_table_shows(capsys):
    """A share with its interval; above 1 with the reason for it; and none where the row is not meaningful."""
    usual, above = row_of(), row_of(mask_ratio=0.25, share_closed=Estimate(3.67, 1.2, 9.0))
    weak = row_of(share_closed=Estimate(3.67, -4.0, 9.0), is_meaningful=False)
    for row in (usual, above, weak):
        terminal.say(terminal.conclusion(row))
    lines = capsys.readouterr().out.splitlines()
    assert "the circuit closes 0.88 [0.38, 1.38] of the gap, in nats." in lines[0]
    assert "with every token of a block masked" in lines[0]
    assert f"the circuit closes 3.67 [1.20, 9.00] of the gap, in nats ({ABOVE_ONE})." in lines[1]
    assert "with a share of 0.25 of a block masked" in lines[1]
    assert NOT_MEANINGFUL in lines[2]
    assert "3.67" not in lines[2]
    assert not any("%" in line for line in lines)


def test_the_printed_table_has_no_share_where_there_is_none(capsys):
    terminal.print_gap(GapTable((row_of(), row_of(share_closed=Estimate(3.67, -4, 9), is_meaningful=False)), 48, 0))
    text = capsys.readouterr().out
    assert "0.38..1.38" in text
    assert "3.67" not in text
    assert NOT_MEANINGFUL in text
    assert ABOVE_ONE not in text
    terminal.print_gap(GapTable((row_of(share_closed=Estimate(1.57, 1.35, 1.84)),), 48, 0))
    assert ABOVE_ONE in capsys.readouterr().out


def test_version_and_help(run):
    assert run("--help")[0] == 0
