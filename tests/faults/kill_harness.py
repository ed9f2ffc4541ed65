"""Kill a scenario before each of its file operations, start it again, and compare with a run that nobody disturbed.

    python tests/faults/kill_harness.py SCENARIO [--share PART/PARTS] [--folder DIR]

prints one JSON object. Everything is imported once; each run is a fork of this process, so a point takes a fraction of
a second. A child that is killed gets SIGKILL: nothing is tidied up. At a file that is opened to be written there is a
second point: it is killed when half of something is in it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1}
"""Audit events of operations that change files, and how many of their arguments are paths."""
SECONDS = 120


class Killer:
    """Counts the file operations in a folder, and kills its process before one of them."""

    def __init__(self, root: Path, point: int | None) -> None:
        self.root, self.point, self.operations = str(root), point, []

    def install(self) -> None:
        sys.addaudithook(self._hook)
        os.fsync = self._before(os.fsync, "fsync")
        os.posix_fallocate = self._before(os.posix_fallocate, "fallocate")
        np.memmap.flush = self._before(np.memmap.flush, "flush")
        import safetensors.torch

        original = safetensors.torch.serialize_file

        @functools.wraps(original)
        def serialize_file(tensors, filename, *arguments, **options):
            self._count("serialize", str(filename), torn=True)
            return original(tensors, filename, *arguments, **options)

        safetensors.torch.serialize_file = serialize_file

    def _before(self, call, name):
        def wrapped(*arguments, **options):
            self._count(name, "")
            return call(*arguments, **options)

        return wrapped

    def _hook(self, event, arguments) -> None:
        if event == "open":
            path, mode, flags = arguments
            is_written = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if is_written and isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(self.root):
                self._count("open", os.fsdecode(path), torn=bool(mode) and "w" in mode)
        elif event in PATHS:
            paths = [os.fspath(path) for path in arguments[: PATHS[event]]]
            relative = event in ("os.remove", "os.rmdir", "os.mkdir")  # shutil.rmtree names them by their folder
            if any(os.fsdecode(path).startswith(self.root) for path in paths) or (relative and arguments[-1] != -1):
                self._count(event, str(paths[-1]))

    def _count(self, name, path, torn=False) -> None:
        for kind in ("before", "within") if torn else ("before",):
            if len(self.operations) == self.point:
                if kind == "within":
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.write(descriptor, b"{")
                os.kill(os.getpid(), signal.SIGKILL)
            self.operations.append(f"{kind} {name} {Path(path).name}")


def in_child(work, report: Path) -> int:
    """Call a function in a fork of this process; write what it returns, or the error, as JSON. Returns its status."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            report.write_text(json.dumps({"result": work()}))
        except BaseException as error:
            report.write_text(json.dumps({"error": repr(error), "trace": traceback.format_exc()}))
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def fingerprint(root: Path) -> dict[str, str]:
    """Return a hash of what every file holds, and the name of every folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = "folder" if path.is_dir() else hashlib.sha256(content_of(path)).hexdigest()
    return found


def content_of(path: Path) -> bytes:
    """Return a file's bytes; safetensors orders its metadata at random, which hashes of its files then see."""
    if path.name == "manifest.json":
        content = json.loads(path.read_text())
        return json.dumps([sorted(content["files"]), content["made_from"], content["format"]]).encode()
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            texts = sorted((file.metadata() or {}).items())
            tensors = [(name, str(file.get_tensor(name).dtype), file.get_tensor(name)) for name in sorted(file.keys())]
        shapes = [(name, dtype, tensor.shape) for name, dtype, tensor in tensors]
        return repr((texts, shapes)).encode() + b"".join(tensor.tobytes() for _, _, tensor in tensors)
    return path.read_bytes()


def read(report: Path) -> dict:
    found = json.loads(report.read_text())
    report.unlink()
    return found


def verdict(scenario, root: Path, report: Path, expected: dict[str, str]) -> str:
    """Start a scenario again after a kill; return "" if it ends like one that nobody disturbed."""

    def again():
        problem = scenario.check(root)
        scenario.run(root)
        return problem, fingerprint(root)

    in_child(again, report)
    found = read(report) if report.exists() else {"error": "died"}
    if "error" in found:
        return f"stuck: {found['error']}"
    problem, files = found["result"]
    litter = sorted(files.keys() - expected.keys())
    other = sorted(name for name in expected if files.get(name) != expected[name])
    if problem:
        return f"lost: {problem}"
    return f"different: {other}" if other else f"litter: {litter}" if litter else ""


def examine(scenario, place: Path, share: tuple[int, int]) -> dict:
    """Return how many points a scenario has, and what went wrong at which."""
    prepared, report = place / "prepared", place / "report.json"
    prepared.mkdir()
    scenario.prepare(prepared)
    shutil.copytree(prepared, place / "run")
    scenario.run(place / "run")  # in this process, so that all is imported before it forks
    shutil.rmtree(place / "run")

    def attempt(root: Path, point: int | None) -> int:
        shutil.copytree(prepared, root)

        def run():
            killer = Killer(root, point)
            killer.install()
            scenario.run(root)
            return killer.operations

        return in_child(run, report)

    attempt(place / "run", None)
    found = read(report)
    if "error" in found:
        raise SystemExit(found["trace"])
    operations, expected = found["result"], fingerprint(place / "run")
    shutil.rmtree(place / "run")
    failures, tried = {}, range(share[0], len(operations), share[1])
    for point in tried:
        status = attempt(place / "run", point)  # at the same place: paths are part of some files
        if not os.WIFSIGNALED(status):
            failures[point] = f"{operations[point]}: not reached: {report.read_text()}"
        else:
            problem = verdict(scenario, place / "run", report, expected)
            if problem:
                failures[point] = f"{operations[point]}: {problem}"
        report.unlink(missing_ok=True)
        shutil.rmtree(place / "run")
    return {"points": len(operations), "tried": len(tried), "failures": failures}


def main() -> None:
    import kill_scenarios

    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=kill_scenarios.SCENARIOS)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--folder", default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    first, parts = map(int, chosen.share.split("/"))
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = examine(kill_scenarios.SCENARIOS[chosen.scenario], Path(folder).resolve(), (first, parts))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
