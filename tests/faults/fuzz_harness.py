"""Damage files of every format, load them, and demand an error of our own or a model that may be.

    PYTHONPATH=. python tests/faults/fuzz_harness.py FIRST LAST

prints one JSON object: how many files there were, how many were refused, and what failed. Each file is a function of
its number. Loading runs in a fork of this process with so much more memory and so much time of the processor; a fork
that dies names the file that it died of.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from fuzz_formats import FORMATS, damaged

from circuits.errors import UnfactorError

MEMORY, SECONDS = 768 << 20, 5
"""What a file of a few kilobytes may take at most."""


def attempt(number: int, folder: Path) -> str | None:
    """Damage file ``number`` and load it; return "refused", "loaded", or what is wrong."""
    draw = random.Random(number)
    name = list(FORMATS)[number % len(FORMATS)]
    form, place = FORMATS[name], folder / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / name, place)
    damaged(form, place, draw)
    try:
        loaded = form.load(place)
    except UnfactorError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 2000 else f"{name}: the message is {message[:500]!r}"
    except Exception:
        return f"{name}: {''.join(traceback.format_exc().splitlines(True)[-4:])}"
    return "loaded" if form.is_sound(loaded) else f"{name}: loaded, and it is none"


def work(numbers: list[int], folder: Path, results: int) -> None:
    """Try files one after the other in this process, which may die of one."""
    torch.set_num_threads(1)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(20 * SECONDS)
        result = attempt(number, folder)
        os.write(results, (json.dumps([number, result]) + "\n").encode())


def run(first: int, last: int) -> dict[str, object]:
    """Try the files of these numbers; return the counts and the failures."""
    with tempfile.TemporaryDirectory() as name:
        folder, left = Path(name), list(range(first, last))
        for kind, form in FORMATS.items():
            (folder / kind).mkdir()
            form.make(folder / kind)
            assert form.is_sound(form.load(folder / kind)), kind
        counts, failures = {"refused": 0, "loaded": 0}, []
        while left:
            heard, killed = _forked(functools.partial(work, left, folder))
            for number, result in heard:
                left.remove(number)
                if result in counts:
                    counts[result] += 1
                else:
                    failures.append(f"{number}: {result}")
            if killed and left:
                failures.append(f"{left[0]}: {list(FORMATS)[left[0] % len(FORMATS)]}: killed by signal {killed}")
                left.pop(0)
    return {"files": last - first, **counts, "failures": failures}


def _forked(work) -> tuple[list, int]:
    """Run something in a fork; return the lines that it wrote, and the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            work(write)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        heard = [json.loads(line) for line in file]
    return heard, os.WTERMSIG(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2])), indent=1))
