"""The architecture: who may import whom, what stays unloaded, and how long files and functions may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("circuits", "diffusion")}

# From the top down: what stands lower never imports what stands higher.
LAYERS = (
    ("app", "compat"),
    ("codd", "evaluation", "testing"),
    ("training",),
    ("decoding",),
    ("head",),
    ("conditioners", "publishing", "vocabulary"),
    ("coupling",),
    ("prediction",),
    ("denoisers", "text"),
    ("_json", "blocks", "fingerprint", "hub"),
    ("errors",),
)
HEIGHT = {part: len(LAYERS) - number for number, parts in enumerate(LAYERS) for part in parts}

HEAVY = {
    "accelerate",
    "datasets",
    "hypothesis",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "networkx",
    "pyjuice",
    "pytest",
    "scipy",
    "sklearn",
    "tokenizers",
    "transformers",
}

MAX_LINES_OF_A_FILE = 400
LONGER_FILES = {
    "circuits/engine/input_layers.py": 425,  # one class for each form of table
    "diffusion/coupling.py": 420,  # one class: a distribution and what is asked of it
}

MAX_LINES_OF_A_FUNCTION = 60
MAX_PARAMETERS = 10
# Public entry points whose options are the contract: each is documented, keyword-only, and has a default.
LARGER_FUNCTIONS = {
    "circuits/learning/fit.py: fit",
    "circuits/learning/fit_continuous.py: fit_continuous_mixture",
    "diffusion/compat.py: generate",  # another library's signature
    "diffusion/decoding/generation.py: generate",
    "diffusion/decoding/generation.py: infill",
    "diffusion/evaluation/few_steps.py: few_step_quality",
    "diffusion/prediction.py: ask",
    "diffusion/training/logit_cache.py: cache_logits",
}


def named(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Yield the dotted names that a file imports: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}, line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name):
    return any(part.startswith("_") and part != "__future__" for part in name.split("."))


def part_of(path):
    """Return the part of `diffusion` that a file belongs to; the front door has none."""
    inside = path.relative_to(ROOT / "diffusion")
    part = inside.parts[0].removesuffix(".py")
    return None if part == "__init__" else part


def functions():
    """Yield every function: where it is, and its node."""
    for path in (path for paths in FILES.values() for path in paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{named(path)}: {node.name}", path, node


def lines_of_code(path, function):
    """Count the lines of a function's body that are no docstring, comment or blank."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = path.read_text().splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def num_parameters(function):
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("path", FILES["circuits"], ids=named)
def test_circuits_knows_nothing_of_diffusion(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "diffusion"]


@pytest.mark.parametrize("path", FILES["diffusion"], ids=named)
def test_diffusion_imports_public_names_of_circuits_only(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "circuits" and is_private(name)]


def test_every_part_of_diffusion_has_its_place():
    parts = {part_of(path) for path in FILES["diffusion"]} - {None}
    assert parts == set(HEIGHT)


@pytest.mark.parametrize("path", FILES["diffusion"], ids=named)
def test_traffic_in_diffusion_runs_one_way(path):
    part = part_of(path)
    if part is None:  # the front door
        return
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "diffusion":
            continue
        other = rest.split(".")[0]
        assert other in HEIGHT, f"{named(path)} imports {name}: import it from its own module"
        assert other == part or HEIGHT[other] < HEIGHT[part], f"{named(path)} imports {name}, which stands no lower"


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_importing_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}


def test_files_are_short():
    lengths = {named(path): len(path.read_text().splitlines()) for paths in FILES.values() for path in paths}
    long = {name: length for name, length in lengths.items() if length > LONGER_FILES.get(name, MAX_LINES_OF_A_FILE)}
    assert not long
    assert not {name for name in LONGER_FILES if lengths[name] <= MAX_LINES_OF_A_FILE}, "take these off the list"


def test_functions_are_short_and_take_few_arguments():
    large = {
        name
        for name, path, node in functions()
        if lines_of_code(path, node) > MAX_LINES_OF_A_FUNCTION or num_parameters(node) > MAX_PARAMETERS
    }
    assert large == LARGER_FUNCTIONS


def test_the_checks_see_what_they_are_to_see(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        'def f(self, a, *, b):\n    """Doc."""\n    # why\n\n    from circuits.evidence.code import x\n    return x\n'
    )
    (function,) = ast.parse(path.read_text()).body
    assert lines_of_code(path, function) == 2
    assert num_parameters(function) == 2
    assert list(imported(path)) == ["circuits.evidence.code.x"]
    assert is_private("circuits.evidence.code.x")
    assert is_private("circuits.distribution._factors_at")
    assert not is_private("circuits.errors.ArgumentError")
