"""Everything that needs a GPU, in one command of at most eight minutes: the tests marked ``gpu``, and what it takes.

    python benchmarks/gpu.py                          # on a CUDA device; writes gpu-results/gpu.json and gpu.md
    python benchmarks/gpu.py --sections core coupling
    python benchmarks/gpu.py --device cpu --quick     # every line at tiny sizes, a smoke test of the script itself

Each section is a process of its own with a budget of its own: an error, a crash or a hanging kernel ends that section
alone, and what it had measured by then is kept. Every time is the median of several rounds, by CUDA events and after a
warm-up, in which the candidates take turns; every ratio is the median of the rounds' ratios. Without a CUDA device the
script says so and ends well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _gpu_measure import Row, Section, described
from _gpu_pyjuice import pyjuice
from _gpu_sections import core, coupling, decoding, region_graphs, torch_compile
from _gpu_table import markdown

ROOT = Path(__file__).resolve().parents[1]
_MARGIN_SECONDS = 6.0
"""Between the last case of a section and its end."""


def tests(section: Section) -> None:
    """Run the tests marked ``gpu``, then the conformance kit's law that a GPU agrees with the CPU."""
    paths = ["tests/test_pretended_device.py"] if section.is_quick else ["tests"]
    for name, selection in (("marked gpu", ["-m", "gpu"]), ("conformance", ["-k", "a_gpu_agrees_with_the_cpu"])):
        left = section.stop - time.monotonic()
        share = left * 0.6 if name == "marked gpu" else left
        _run_pytest(section, name, [*paths, *selection], None if share == float("inf") else max(1.0, share))


def _run_pytest(section: Section, name: str, arguments: Sequence[str], seconds: float | None) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        output, problem = done.stdout + done.stderr, None
        if done.returncode not in (0, 5):  # 5: none were selected
            problem = f"pytest ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        problem = f"stopped after {seconds:.0f} s"
    lines = output.rstrip().splitlines() or ["(no output)"]
    for line in [line for line in lines if re.match(r"(FAILED|ERROR) ", line)][:40]:
        section.note(line)
    took = 1e3 * (time.monotonic() - start)
    section.add(Row(case=f"tests, {name}", name=lines[-1].strip("= "), milliseconds=took, problem=problem))
    if section.path is not None:
        section.path.with_name(f"tests, {name}.txt").write_text(output)


@dataclass(frozen=True)
class Task:
    """A section and how many seconds its process has."""

    run: Callable[[Section], None]
    seconds: float


TASKS = {
    "tests": Task(tests, 140),
    "core": Task(core, 40),
    "region_graphs": Task(region_graphs, 50),
    "coupling": Task(coupling, 85),
    "decoding": Task(decoding, 45),
    "pyjuice": Task(pyjuice, 50),
    "torch_compile": Task(torch_compile, 60),
}


def run_section(section: Section) -> dict[str, Any]:
    """Run one section in this process; return its rows and notes, and what ended it early, if anything did."""
    problem = None
    try:
        TASKS[section.name].run(section)
    except Exception as error:
        traceback.print_exc()
        problem = described(error)
    content = {**section.content(), "problem": problem}
    if section.path is not None:
        section.path.write_text(json.dumps(content))
    return content


def isolated(command: Sequence[str], seconds: float, path: Path) -> dict[str, Any]:
    """Run a section as a process of its own; return what it wrote, and why it ended early, if it did."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(command, start_new_session=True)
    problem = None
    try:
        if process.wait(timeout=seconds):
            problem = f"its process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        problem = f"stopped after its {seconds:.0f} s"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"rows": [], "notes": []}
    return {**content, "problem": problem or content.get("problem")}


def environment(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on: machine, driver and versions."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cpu": _cpu_name(), "device": str(device)}
    for package in ("triton", "pyjuice", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _output_of(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    found["float32 products"] = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{card.name}, {card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} multiprocessors"
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0]


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script itself")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a smoke test")
    parser.add_argument(
        "--sections", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS)
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="FOLDER")
    parser.add_argument("--inside", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the sections one after the other, and write what is known after each."""
    options = _arguments(given)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"Nothing is measured: torch {torch.__version__} sees no CUDA device here.")
        return 0
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    parts = options.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if options.inside:
        name = options.inside
        stop = time.monotonic() + TASKS[name].seconds - _MARGIN_SECONDS
        path = parts / f"{name}.json"
        run_section(Section(name, device, is_quick=options.quick, rounds=options.rounds, stop=stop, path=path))
        return 0
    results: dict[str, Any] = {"environment": environment(device), "is_quick": options.quick, "sections": {}}
    print("\n".join(f"{name}: {value}" for name, value in results["environment"].items()))
    shared = ["--device", str(device), "--rounds", str(options.rounds), "--out", str(options.out)]
    shared += ["--quick"] * options.quick
    for name in options.sections:
        print(f"\n{name}, at most {TASKS[name].seconds:.0f} s", flush=True)
        start = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", name, *shared]
        content = isolated(command, TASKS[name].seconds, parts / f"{name}.json")
        results["sections"][name] = {**content, "seconds": round(time.monotonic() - start, 1)}
        (options.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.out / "gpu.md").write_text(markdown(results))
        if content["problem"]:
            print(f"  {name}: {content['problem']}")
    print(f"\n{options.out / 'gpu.json'} and {options.out / 'gpu.md'} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
