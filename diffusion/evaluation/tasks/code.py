"""Answers that are programs: MBPP. Their tests run in a process of its own, and only when that is allowed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from circuits.arguments import checked_count
from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks.data import text_of
from diffusion.evaluation.tasks.task import Example

FENCE = "```"
"""What stands before and after a program in a text."""
_FENCED = re.compile(r"```(?:[ \t]*[\w+-]*[ \t]*\n)?(.*?)(?:```|\Z)", re.DOTALL)
_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_MEGABYTE = 1 << 20

# What runs in the other process. The report goes to a descriptor that the program does not know, and is a number that
# it does not know either: a program that ends the process before its tests have run has not passed them.
_DRIVER = """
import json, os, resource, sys
job = json.load(sys.stdin)
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
report = os.dup(1)
for stream in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
namespace = {"__name__": "answer"}
passed, tests, setup, answer = job["passed"], job["tests"], job["setup"], job["answer"]
del job
exec(compile(answer, "<answer>", "exec"), namespace)
exec(compile(setup, "<setup>", "exec"), namespace)
for test in tests:
    exec(compile(test, "<test>", "exec"), namespace)
os.write(report, passed.encode())
"""


def mbpp_example(record: dict[str, Any]) -> Example:
    """Return the example of a record with ``text`` (or ``prompt``), ``code`` and ``test_list``."""
    tests = record["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise TypeError(f"expected a list of tests in 'test_list', got {tests!r:.60}")
    asked = text_of(record["text"] if "text" in record else record["prompt"]).strip()
    setup = "\n".join([text_of(record.get("test_setup_code") or ""), *map(text_of, record.get("test_imports") or ())])
    code = text_of(record["code"]).replace("\r\n", "\n")
    question = "\n".join([asked, "It has to pass these tests:", *tests])
    return Example(question, (code,), f"{code}\n{FENCE}", tests=tuple(tests), setup=setup.strip())


def extract_code(text: str) -> str | None:
    """Return the program in a text: what its first fence holds, or all of it; None if that is blank.

    Where the question has opened a fence, the text may go on within it: it ends where a fence closes.
    """
    fenced = _FENCED.search(text)
    if fenced is None:
        return text if text.strip() else None
    before, inside = text[: fenced.start()], fenced.group(1)
    is_continued = bool(re.search(r"^\s*(?:def|import|from|class) ", before, re.MULTILINE))
    code = before if is_continued else inside
    return code if code.strip() else None


def judge_by_tests(*, timeout: float = 10.0, memory: int = 1024) -> Callable[[str, Example], bool]:
    """Return a judge of programs that runs their tests, see :func:`passes_tests`."""

    def is_right(answer: str, example: Example) -> bool:
        return passes_tests(answer, example.tests, setup=example.setup, timeout=timeout, memory=memory)

    return is_right


def passes_tests(
    code: str, tests: Sequence[str], *, setup: str = "", timeout: float = 10.0, memory: int = 1024
) -> bool:
    """Run a program, and then its tests, in a process of its own; return whether all went through.

    The process has an empty folder for its own, no input, a time limit, and limits on memory and on what it writes;
    where Linux allows namespaces it has no network, and all that it started ends with it. It can still read and write
    what its user can: run programs of a model that you do not trust in a container.

    Args:
        code: Python.
        tests: statements that raise an exception where the program is wrong; at least one.
        setup: statements before the tests.
        timeout: seconds, by the clock.
        memory: megabytes of address space.

    Raises:
        ArgumentError: there are no tests, or limits are out of range.
    """
    if not tests:
        raise ArgumentError("tests: expected at least one, got none: any program would pass")
    checked_count("memory", memory, 64)
    if not 0 < timeout <= 3600:
        raise ArgumentError(f"timeout: expected seconds above 0 and at most 3600, got {timeout!r}")
    passed = secrets.token_hex(16)
    limits = {
        "RLIMIT_AS": memory * _MEGABYTE,
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_FSIZE": 16 * _MEGABYTE,
        "RLIMIT_CORE": 0,
    }
    job = {"answer": code, "tests": list(tests), "setup": setup, "passed": passed, "limits": limits}
    folder = tempfile.mkdtemp(prefix="unfactor-code-")
    try:
        return _report(job, folder, timeout) == passed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _report(job: dict[str, Any], folder: str, timeout: float) -> str:
    """Return what the driver reports of a job, "" where it does not come to that."""
    home = Path(folder) / "home"
    home.mkdir()
    environment = {"PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile(dir=folder) as said, tempfile.TemporaryFile(dir=folder) as asked:
        asked.write(json.dumps(job).encode("utf-8", "surrogatepass"))
        asked.seek(0)
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-c", _DRIVER],
            stdin=asked,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return ""
        finally:
            _end(process)
        said.seek(0)
        return said.read(64).decode("ascii", "replace") if process.returncode == 0 else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever is left of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@lru_cache(maxsize=1)
def _isolation() -> tuple[str, ...]:
    """Return the command that starts another without network and in a space of processes of its own; () if none can."""
    if shutil.which("unshare", path=os.defpath) is None:
        return ()
    done = subprocess.run(
        [*_NAMESPACES, "true"], env={"PATH": os.defpath}, capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    return _NAMESPACES if done.returncode == 0 else ()
