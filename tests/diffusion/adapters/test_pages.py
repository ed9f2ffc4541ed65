"""The commands on the pages about real models, run with tiny ones in the same layouts."""

import re
import shlex
from pathlib import Path

import masked_models
import pytest
import tiny_models as tiny
from typer.testing import CliRunner

import circuits as ct
import diffusion as df
from diffusion.app.cli import app

pytest.importorskip("transformers", reason="LLaDA, Dream and SDAR run on classes of transformers")

DOCS = Path(__file__).resolve().parents[3] / "docs" / "adapters"
NAMES = [tiny.LLADA, tiny.ILLADA, tiny.DREAM, tiny.MDLM, tiny.BD3LM, tiny.SDAR]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands():
    for page in ("llada", "dream", "mdlm", "block_causal", "masked_lm"):
        lines = "".join(SHELL.findall((DOCS / f"{page}.md").read_text())).splitlines()
        assert lines, f"{page}.md has no commands"
        yield from (pytest.param(line, id=f"{page} {number}") for number, line in enumerate(lines))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("pages")
    for name in NAMES:
        tiny.published(name, here / name)
    circuit = ct.structures.hmm(seq_length=4, num_states=3, num_categories=tiny.VOCABULARY)
    df.CoupledHead(ct.compile(circuit, seed=0)).save(here / "my-head")
    masked = masked_models.write("modernbert", here / "answerdotai" / "ModernBERT-base")
    circuit = ct.structures.hmm(seq_length=4, num_states=3, num_categories=masked.config.vocab_size)
    df.CoupledHead(ct.compile(circuit, seed=0)).save(here / "my-masked-head")
    return here


@pytest.mark.parametrize("line", list(commands()))
def test_the_command_runs_on_a_tiny_model(line, folders, monkeypatch):
    monkeypatch.chdir(folders)
    program, *arguments = shlex.split(line)
    assert program == "unfactor"
    for option, most in (("--length", 16), ("--block", 4)):
        if option in arguments:
            place = arguments.index(option) + 1
            arguments[place] = str(min(most, int(arguments[place])))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
