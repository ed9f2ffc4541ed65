"""Whatever is asked of the program, it ends with one line in words and exit code 2, never with a trace."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import SMALLEST

import diffusion
from circuits.progress import stop_requested, stoppable
from diffusion.app import cli, terminal, workspace
from diffusion.app.packing import unpack
from diffusion.app.signals import exit_code, stopped_by_signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def heeded_signals():
    """Signals as a terminal gives them to a program: what started the tests may ignore some, as nohup does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, and files that are no corpora."""
    place = tmp_path_factory.mktemp("place")
    unpack(place / "models")
    (place / "surrogate.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    (place / "digits.jsonl").write_text('{"text": ' + "1" * 5000 + "}\n")
    (place / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * (65 << 20)))
    (place / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (place / "file").write_text("precious")
    (place / "loop").symlink_to(place / "loop")
    os.mkfifo(place / "pipe.txt")
    return place


LINES = {
    "half of a surrogate pair": ("train --corpus {0}/surrogate.jsonl --field text --out {0}/new", "surrogate"),
    "5,000 digits": ("train --corpus {0}/digits.jsonl --field text --out {0}/new", "line 1: expected JSON"),
    "a bomb": ("train --corpus {0}/bomb.txt.gz --out {0}/new", "bytes of text"),
    "no text": ("train --corpus {0}/bytes.txt --out {0}/new", "expected UTF-8"),
    "a pipe": ("train --corpus {0}/pipe.txt --out {0}/new", "regular"),
    "a long name": ("train --corpus " + "a" * 5000 + ".txt --out {0}/new", "long"),
    "a key that is missing": ("train --corpus {0}/surrogate.jsonl --out {0}/new", "field: expected the key"),
    "a file as folder": ("train --corpus arithmetic --preset tiny --out {0}/file", "file"),
    "below a file": ("train --corpus arithmetic --preset tiny --out {0}/file/sub", "file"),
    "a loop": ("train --corpus arithmetic --preset tiny --out {0}/loop", "loop"),
    "a kernel's folder": ("train --corpus arithmetic --preset tiny --out /proc/x", "/proc"),
    "a long folder": ("train --corpus arithmetic --preset tiny --out {0}/" + "a" * 300, "name too long"),
    "a billion states": ("fit --out {0}/models --states 1000000000", "states"),
    "too many blocks": ("cache-logits --out {0}/models --blocks 100000000000", "blocks"),
    "masks of no text": ("cache-logits --out {0}/models --masks suffix", "masks: expected none without --text"),
    "best tokens of no text": ("cache-logits --out {0}/models --top-k 5", "top_k: expected none without --text"),
    "a billion samples": ("generate --out {0}/models --samples 1000000000", "samples"),
    "a huge seed": ("generate --out {0}/models --seed 1" + "0" * 39, "seed"),
    "a negative seed": ("score --out {0}/models --seed -1 text", "seed"),
    "a tiny temperature": ("generate --out {0}/models --temperature 1e-40", "temperature: expected"),
    "a huge temperature": ("generate --out {0}/models --temperature 1e39", "temperature: expected"),
    "no number": ("generate --out {0}/models --temperature nan", "temperature: expected"),
    "a half prompt": ("generate --out {0}/models --prompt \udc80", "surrogate"),
    "markup": ("generate --out {0}/a[/]b[red]", "a[/]b[red]"),
    "an escape": ("generate --out {0}/\x1b[31m", "\\x1b[31m"),
    "a command that is none": ("explode", "explode"),
    "a head that is a file": ("generate --out {0}/models --head {0}/file", "file"),
    "a head that is none": ("generate --out {0}/models --head {0}/nothing", "nothing"),
    "a device that is none": ("generate --out {0}/models --device \0", "device"),
    "a null in a path": ("generate --out {0}/\0", "null"),
    "a model in a loop": ("generate --model {0}/loop", "loop"),
}


@pytest.mark.parametrize(("line", "said"), LINES.values(), ids=LINES)
def test_nonsense_ends_in_one_line_and_exit_code_two(line, said, place, run_program):
    code, out, error = run_program(*line.format(place).split(" "))
    assert code == 2
    assert out == ""
    assert error.startswith("unfactor: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert said.lower() in error.lower()
    assert len(error) < 1100
    assert (place / "file").read_text() == "precious"


def test_debug_shows_where_an_error_comes_from(run_program, place):
    line = ("generate", "--out", place / "nothing")
    assert "Traceback" not in run_program(*line)[2]
    for where in ((*line, "--debug"), ("--debug", *line)):
        code, _, error = run_program(*where)
        assert code == 2
        assert "Traceback" in error
        assert error.count("File ") > 3


def test_faults_of_the_program_itself_are_one_line_too(run_program, place, monkeypatch):
    from diffusion.app.commands import decode

    for error, said in ((ZeroDivisionError("a\nb"), "ZeroDivisionError: a"), (MemoryError(), "memory")):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(decode, "_write", fail)
        code, _, message = run_program("generate", "--out", place / "models")
        assert code == 2
        assert said in message
        assert message.count("\n") == 1


def test_paths_are_no_markup(capsys):
    for text in ("a[/]b", "a[red]b", "x[bold]", "[/", "\\[red]", "[link=x]y"):
        terminal.say(text, title="Next:")
        terminal.print_cells(text, [["name", text], [text, text]])
        assert capsys.readouterr().out.count(text) >= 4


def test_what_a_terminal_cannot_write_is_written_escaped(place):
    done = program("score", "--out", place / "models", "--no-circuit", "caf\xe9", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "caf\\xe9" in done.stdout


def test_output_that_cannot_be_written_is_said(place):
    with open("/dev/full", "w") as full:
        done = program("--version", stdout=full)
    assert (done.returncode, done.stderr) == (2, "unfactor: the output cannot be written: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = program("--version", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "unfactor: the output cannot be written: Broken pipe\n")


def program(*arguments, stdout=subprocess.PIPE, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "unfactor", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100
    )


def test_short_documents_are_prompts_one_after_the_other(place, monkeypatch):
    folder = workspace.Workspace(place / "models", progress=False)
    recipe = folder.recipe()
    documents = tuple(f"{i} apples." for i in range(100))
    monkeypatch.setattr(type(folder), "held_out", lambda self, recipe: documents)
    prompts = folder.held_out_prompts(recipe, 3)
    assert len(set(prompts)) == 3
    assert all(prompt in "".join(documents) for prompt in prompts)


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_the_program_loads_ends_it_in_one_line(number):
    code = f"""
import os, sys, unfactor
class Kills:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Kills())
unfactor.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 128 + number
    assert done.stderr == f"unfactor: stopped by {number.name} while it was loading\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_command_in_one_line_with_its_own_code(number, place, run_program, monkeypatch):
    from diffusion.app.commands import decode

    def wait(*arguments, **options):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(decode, "_write", wait)
    code, _, error = run_program("generate", "--out", place / "models")
    assert code == 128 + number
    assert error == f"unfactor: stopped by {number.name}; the same command goes on from what was done\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", ["denoiser", "circuit"])
def test_a_stage_that_a_signal_stopped_goes_on_to_the_same_weights(stage, number, run_program, tmp_path, monkeypatch):
    """It is stopped after its second update, and says so."""
    monkeypatch.setitem(workspace.PRESETS, "tiny", SMALLEST)
    calls = []
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"The {i}th text says {i} and {2 * i}. " * 6 for i in range(40)))
    training = {"denoiser": diffusion.training.denoiser._Training, "circuit": diffusion.training.circuit.CacheTraining}[
        stage
    ]

    def run(out):
        first = run_program("train", "--corpus", tmp_path / "corpus.txt", "--preset", "tiny", "--out", out, "--quiet")
        return first if first[0] else run_program("fit", "--out", out, "--quiet")

    assert run(tmp_path / "undisturbed")[0] == 0
    update = training.update

    def killed(self, step):
        if step == 1 and not calls:
            calls.append(step)
            os.kill(os.getpid(), number)
        return update(self, step)

    monkeypatch.setattr(training, "update", killed)
    code, _, error = run(tmp_path / "disturbed")
    assert code == 128 + number
    assert "2 of" in error
    assert number.name in error
    assert error.count("\n") == 1
    assert run(tmp_path / "disturbed")[0] == 0
    for file in ("denoiser/model.safetensors", "head/head.safetensors", "head/circuit/weights.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("disturbed", "undisturbed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_signal_asks_long_work_to_stop_and_the_second_does_not_ask():
    with stopped_by_signals(), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested() == "stopped by SIGTERM"
        assert exit_code() == 143
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop_requested() is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_long_commands_say_what_they_took(run_program, monkeypatch):
    times = iter([0.0, 83.4, 100.0, 101.0, 200.0, 7700.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(times))
    assert run_program("--version")[2] == "unfactor: took 1 min 23 s\n"
    assert run_program("--version")[2] == ""
    assert run_program("--version")[2] == "unfactor: took 2 h 5 min\n"
