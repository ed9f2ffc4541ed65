"""A folder of smallest models, as the program makes it, and files that the documentation's commands name."""

import gzip
import json
import re
from pathlib import Path

from test_cli import SMALLEST

from diffusion.app import workspace

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
_BLOCK = re.compile(r"<!-- tiny: (\w+) -->\n```bash\n(.*?)```", re.DOTALL)


def make_folder(place, *, fits=True):
    """Train and, if asked, fit in ``place``/models; return that folder."""
    corpus = place / "corpus.txt"
    corpus.write_text("\n\n".join(f"The {i}th text says that {i} and {i} make {2 * i}. " * 6 for i in range(40)))
    space, recipe = workspace.Workspace(place / "models", progress=False), SMALLEST.with_text(str(corpus), None)
    space.train(recipe)
    if fits:
        space.fit(recipe)
    return place / "models"


def write_records(path, records):
    """Write JSON lines, compressed if the name says so."""
    with (gzip.open if path.name.endswith(".gz") else open)(path, "wt") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
    return path


def gsm8k(path, count=5):
    """Write questions in GSM8K's form."""
    records = ({"question": f"The {i}th text says?", "answer": f"It says {i}.\n#### {i}"} for i in range(count))
    return write_records(path, records)


def commands(name):
    """Return the arguments of each command in a block of the page, by the block's name."""
    import shlex

    blocks = dict(_BLOCK.findall(PAGE.read_text()))
    lines = blocks[name].replace("\\\n", " ").splitlines()
    assert all(line.startswith("unfactor ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def block_names():
    """Return the names of the page's blocks that run on tiny models."""
    return [name for name, _ in _BLOCK.findall(PAGE.read_text())]
