"""Work where there is no room: what it says, what it leaves, and whether it goes on once there is room.

python tests/faults/small_disk.py limit FOLDER     with a limit on the size of a file (ulimit -f)
python tests/faults/small_disk.py mount FOLDER     on a file system of a few pages that is mounted there
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from kill_harness import fingerprint
from kill_scenarios import SCENARIOS

from circuits.errors import StorageError

WORK = ("circuit", "head", "fit", "cache", "coupled", "denoiser")
LIMITS = (1, 600, 2_000, 4_000, 9_000)
PAGES = (1, 3, 6, 10, 15, 22)


@contextlib.contextmanager
def limited(size, root):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(pages, root):
    size = shutil.disk_usage(root).used + 4096 * pages
    subprocess.run(["mount", "-o", f"remount,size={size}", str(root)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,size=64m", str(root)], check=True)


def tried(scenario, root, room):
    """Return whether there was no room, and what was wrong then; it ends like any other run afterwards."""
    scenario.prepare(root)
    before, message = fingerprint(root), None
    try:
        with room:
            scenario.run(root)
    except StorageError as error:
        message = str(error)
    except Exception as error:
        return True, f"raised {error!r}"
    names = [path.name for path in root.rglob("*") if path.name.endswith("tmp") or path.name == ".lock"]
    problem = scenario.check(root) or (f"left {names}" if names else "")
    lost = sorted(name for name in before if name not in fingerprint(root))
    scenario.run(root)
    if lost or (message and ("\n" in message or "; " not in message)):
        problem = problem or f"lost {lost}, said {message}"
    return message is not None, problem


def main():
    kind, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    refusals, failures = 0, {}
    for name in WORK:
        scenario, straight = SCENARIOS[name], place / "straight"
        straight.mkdir()
        scenario.prepare(straight)
        scenario.run(straight)
        expected = fingerprint(straight)
        shutil.rmtree(straight)
        for size in LIMITS if kind == "limit" else PAGES:
            root = place / "root"
            root.mkdir()
            if kind == "mount":
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)], check=True)
            try:
                room = limited(size, root) if kind == "limit" else filled(size, root)
                was_refused, problem = tried(scenario, root, room)
                refusals += was_refused
                if not problem and fingerprint(root) != expected:
                    problem = "ends otherwise"
                if problem:
                    failures[f"{name}, {size}"] = problem
            finally:
                if kind == "mount":
                    subprocess.run(["umount", str(root)], check=True)
                shutil.rmtree(root)
    print(json.dumps({"tried": refusals, "failures": failures}))


if __name__ == "__main__":
    main()
