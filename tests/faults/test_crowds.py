"""Several processes at one place: the last writer wins, readers get one version, and two workspaces take turns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 200

SAVES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from kill_scenarios import head_of
head, path = head_of(int(sys.argv[2])), Path(sys.argv[1])
print("ready", flush=True)
for _ in range({rounds}):
    head.save(path)
"""
LOADS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import diffusion as df
from kill_scenarios import head_of, same, state_of
versions = [state_of(head_of(seed)) for seed in (0, 1)]
print("ready", flush=True)
for _ in range({rounds}):
    found = state_of(df.CoupledHead.load(Path(sys.argv[1])))
    assert any(same(found, version) for version in versions), "a mixture"
"""
FITS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from kill_scenarios import recipe
from diffusion.app.workspace import Workspace
from diffusion.errors import StorageError
torch.set_num_threads(1)
root, refused = Path(sys.argv[1]), 0
print("ready", flush=True)
for number in range({rounds}):
    try:
        Workspace(root / "models", progress=False).train(recipe(root))
        Workspace(root / "models", progress=False).fit(recipe(root))
    except StorageError as error:
        assert "for this process alone, got process" in str(error), error
        refused += 1
print(refused)
"""


def together(path, *programs, rounds=ROUNDS):
    """Start programs at one time, all with the same place; return what each has printed in the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program.replace("{rounds}", str(rounds)), str(path), str(seed), here],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, program in enumerate(programs)
    ]
    ended = [process.communicate() for process in started]
    assert not [errors for process, (_, errors) in zip(started, ended, strict=True) if process.returncode]
    return [output.split()[1:] for output, _ in ended]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "head"


def saved_head(place):
    sys.path.insert(0, str(Path(__file__).parent))
    from kill_scenarios import head_of

    head_of(0).save(place)


def test_two_writers_and_a_reader_at_one_place(place):
    saved_head(place)
    together(place, SAVES, SAVES, LOADS)
    assert os.listdir(place.parent) == ["head"]
    together(place, LOADS, rounds=1)


def test_two_workspaces_at_one_place_take_turns(tmp_path):
    """One is told that the other works there; in the end the folder is what one alone would have made."""
    sys.path.insert(0, str(Path(__file__).parent))
    from kill_harness import fingerprint
    from kill_scenarios import recipe

    recipe(tmp_path / "two")
    rounds = ROUNDS if settings.get_current_profile_name() == "thorough" else 40
    together(tmp_path / "two", FITS, FITS, rounds=rounds)
    together(tmp_path / "one", FITS, rounds=1)
    two, one = (fingerprint(tmp_path / name) for name in ("two", "one"))
    assert two == one
