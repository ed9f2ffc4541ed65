"""The examples that others do not run: the notebook, at tiny sizes, and what a new head needs of transformers."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def ipython(monkeypatch):
    """What a notebook finds in Jupyter: pictures are shown by their files."""
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image = shown.append
    parent = types.ModuleType("IPython")
    parent.display, parent.version_info, parent.get_ipython = display, (9, 0, 0), lambda: None
    monkeypatch.setitem(sys.modules, "IPython", parent)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_the_cells_of_the_notebook_run_in_order_and_show_two_pictures(ipython, capsys):
    cells = json.loads((EXAMPLES / "barrier.ipynb").read_text("utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("=32", "=2").replace("(1, 2, 4, 8)", "(1, 2)")
            exec(compile(source, "barrier.ipynb", "exec"), names)
    assert [path.name for path in ipython] == ["gap.png", "few_steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in ipython)
    assert "one-step" in capsys.readouterr().out


def test_the_notebook_holds_the_pictures_that_it_draws():
    cells = json.loads((EXAMPLES / "barrier.ipynb").read_text("utf-8"))["cells"]
    kinds = [kind for cell in cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert kinds == ["image/png"] * 2


def test_a_head_is_fitted_to_a_model_of_transformers_saved_and_used():
    pytest.importorskip("transformers", reason="the example's model runs on transformers")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_masked_lm.py")],
        capture_output=True,
        text=True,
        check=True,
        cwd=EXAMPLES.parent,
    )
    *table, first, second = run.stdout.strip().splitlines()
    assert "coupled" in table[0]
    for text in (first, second):
        assert "[MASK]" not in text
        assert text.count(".") >= 1
