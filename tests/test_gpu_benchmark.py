"""The script for a machine with a GPU: every line of it runs here, on the CPU and at tiny sizes."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # scripts, that import what lies beside them

import _gpu_sections as sections
import gpu
from _gpu_measure import Row, Section, bare_gemms, gemm_shapes
from _gpu_table import markdown

import circuits as ct

CPU = torch.device("cpu")


def quick(name, **options):
    return Section(name, CPU, is_quick=True, rounds=1, **options)


def with_tasks(monkeypatch, **functions):
    """Let the script have these sections, and run them in this process."""
    monkeypatch.setattr(gpu, "TASKS", {name: gpu.Task(run, 60.0) for name, run in functions.items()})
    monkeypatch.setattr(gpu, "isolated", lambda command, seconds, path: (gpu.main(command[2:]), read(path))[1])


def read(path):
    return json.loads(Path(path).read_text())


def three_numbers(section):
    section.compare(
        "sums", {"floor": lambda: lambda: sum(range(10)), "more": lambda: lambda: sum(range(999))}, floor="floor"
    )
    section.note("numbers were added")


def broken(section):
    three_numbers(section)
    raise ValueError("a kernel | of nobody")


@pytest.mark.parametrize("name", ["core", "region_graphs", "coupling", "decoding", "torch_compile"])
def test_a_section_measures_everything_beside_the_floor(name, one_thread):
    section = quick(name)
    assert gpu.run_section(section)["problem"] is None
    problems = [row for row in section.rows if row.problem]
    assert all("CUDA graphs need a CUDA device" in row.problem for row in problems)
    assert bool(problems) == (name in ("decoding", "torch_compile"))
    measured = [row for row in section.rows if not row.problem]
    assert all(0 < row.least <= row.milliseconds <= row.greatest for row in measured)
    assert {row.case for row in measured if row.times_floor == 1.0} == {row.case for row in section.rows}


@pytest.mark.filterwarnings("ignore")  # on import of pyjuice
def test_a_peer_that_fails_is_a_row_that_says_why(one_thread):
    section = quick("pyjuice")
    assert gpu.run_section(section)["problem"] is None
    assert {row.name for row in section.rows if row.problem} == {"PyJuice"}
    assert {row.name for row in section.rows if not row.problem} >= {"unfactor", "bare GEMMs"}


def test_the_tests_marked_gpu_are_run(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_pretended_device.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n@pytest.mark.gpu\ndef test_two(): assert 1 > 2\n"
        "def test_a_gpu_agrees_with_the_cpu(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    section = quick("tests", path=tmp_path / "tests.json")
    gpu.run_section(section)
    marked, laws = section.rows
    assert marked.name.startswith("1 failed, 1 passed, 1 deselected")
    assert marked.problem == "pytest ended with 1"
    assert (laws.name.startswith("1 passed"), laws.problem) == (True, None)
    assert any("test_two" in note for note in section.notes)
    assert "assert 1 > 2" in (tmp_path / "tests, marked gpu.txt").read_text()
    gpu._run_pytest(section, "too slow", ["tests"], 0.01)
    assert section.rows[-1].problem.startswith("stopped after")


def test_a_failing_section_is_recorded_and_the_others_run(monkeypatch, tmp_path, capsys):
    with_tasks(monkeypatch, first=three_numbers, second=broken, third=three_numbers)
    assert gpu.main(["--device", "cpu", "--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    results = read(tmp_path / "gpu.json")
    assert list(results["sections"]) == ["first", "second", "third"]
    problems = [section["problem"] for section in results["sections"].values()]
    assert problems == [None, "ValueError: a kernel | of nobody", None]
    assert all(len(section["rows"]) == 2 for section in results["sections"].values())
    assert results["environment"]["torch"] == torch.__version__
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("| sums | floor |") == 3
    assert "This section ended early: ValueError: a kernel \\| of nobody" in table
    assert "- numbers were added" in table
    assert "second: ValueError" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "none")]) == 0
    assert "sees no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("pass", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process ended with -9"),
        ("import time; time.sleep(60)", "stopped after its 1 s"),
    ],
    ids=["good", "crashes", "hangs"],
)
def test_a_process_that_ends_early_leaves_what_it_wrote(code, problem, tmp_path):
    path = tmp_path / "part.json"
    wrote = f"open({str(path)!r}, 'w').write('{{\"rows\": [1], \"notes\": []}}')\n{code}"
    start = time.monotonic()
    assert gpu.isolated([sys.executable, "-c", wrote], 1.0, path) == {"rows": [1], "notes": [], "problem": problem}
    assert time.monotonic() - start < 30
    assert gpu.isolated([sys.executable, "-c", "pass"], 9.0, tmp_path / "none.json")["rows"] == []


def test_the_budgets_are_eight_minutes_and_the_page_names_them():
    assert sum(task.seconds for task in gpu.TASKS.values()) <= 8 * 60 - 10
    page = (gpu.ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `{name}` | {task.seconds:.0f} |" in page for name, task in gpu.TASKS.items())


def test_a_case_that_has_no_time_left_and_a_candidate_that_fails():
    section = quick("core")
    section.compare("case", {"good": lambda: lambda: None, "bad": lambda: lambda: 1 / 0}, floor="bad")
    assert [row.problem for row in section.rows] == [None, "ZeroDivisionError: division by zero"]
    assert section.rows[0].times_floor is None
    section.stop = time.monotonic() - 1
    section.compare("next", {"good": lambda: lambda: None})
    assert section.rows[-1] == Row(case="next", name="all", problem="no time was left")


def test_the_floor_is_the_products_of_the_layers():
    pc = ct.compile(ct.structures.hmm(5, 3, 7), seed=0)
    assert sorted(gemm_shapes(pc)) == [(1, 1, 3)] + 4 * [(1, 3, 3)]
    products = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", lambda x, y, out: products.append((*x.shape, y.shape[-1])))
        bare_gemms(pc, 2)()
        bare_gemms(pc, 2, backward=True)()
    assert sorted(products[:5]) == [(1, 1, 3, 2)] + 4 * [(1, 3, 3, 2)]
    assert len(products) == 5 + 3 * 5


def test_the_traced_path_is_the_eager_one_and_asks_the_device_for_nothing(elsewhere, monkeypatch):
    section = Section("decoding", elsewhere.device, is_quick=True)
    pc = sections.coupled_circuit(section, 50)
    waits = []

    def counted(run, device):
        before = elsewhere.pretended.num_waits if elsewhere.pretended else 0
        run()
        waits.append(elsewhere.pretended.num_waits - before if elsewhere.pretended else 0)
        return run

    monkeypatch.setattr(sections, "captured", counted)
    log_z, marginals = sections.evidence_to_answers(pc, sections.problem(pc, 2)[0], 5)
    sections.traced(sections.no_grad(log_z), elsewhere.device)  # which compares it with the eager one
    probabilities = sections.traced(marginals, elsewhere.device)()
    assert waits == [0, 0]
    torch.testing.assert_close(probabilities.sum(-1).cpu(), torch.ones(2, 4), rtol=1e-4, atol=1e-4)


def test_numbers_in_the_table():
    row = Row(case="c", name="n", milliseconds=1234.5, least=0.001234, greatest=9.0, times_floor=1.5)
    results = {"environment": {"torch": "2"}, "is_quick": True, "sections": {}}
    results["sections"]["core"] = {"rows": [vars(row)], "notes": [], "problem": None}
    lines = markdown(results).splitlines()
    assert lines[-1] == "| c | n | 1234 | 0.00123 to 9 | 1.5 |  |"
    assert "- tiny sizes: a smoke test, no measurement" in lines
