"""The architecture: who may import whom, what stays unloaded, and how long files and functions may be."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import circuits.errors
import diffusion.errors

ROOT = Path(__file__).resolve().parents[1]
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("circuits", "diffusion")}

# From the top down: what stands lower never imports what stands higher.
CIRCUITS = (
    ("testing",),
    ("interop", "plot", "sklearn"),
    ("io",),
    ("batteries",),
    ("learning",),
    ("transforms",),
    ("constrained",),
    ("properties", "distribution"),
    ("queries",),
    ("structures",),
    ("region_graphs",),
    ("engine",),
    ("chains",),
    ("weights",),
    ("evidence",),
    ("symbolic",),
    ("families",),
    ("algebra",),
    ("store",),
    ("arguments", "files", "precision", "progress", "randomness"),
    ("reading",),
    ("digests",),
    ("errors",),
)
DIFFUSION = (
    ("app", "compat"),
    ("codd", "evaluation", "testing"),
    ("training",),
    ("decoding",),
    ("head",),
    ("conditioners", "publishing", "vocabulary"),
    ("coupling",),
    ("prediction",),
    ("denoisers", "text"),
    ("json_files", "blocks", "fingerprint", "hub"),
    ("errors",),
)
HEIGHTS = {
    package: {part: -row for row, parts in enumerate(order) for part in parts}
    for package, order in (("circuits", CIRCUITS), ("diffusion", DIFFUSION))
}
# What still runs against the traffic: a file, and the wing that it imports. The list only shrinks.
AGAINST_THE_TRAFFIC: set[tuple[str, str]] = set()
# Private names that still cross a wing. The list only shrinks.
PRIVATE_ACROSS: set[str] = set()

# What a newcomer reads before anything of their own: its lines, and what is found behind a second door.
CORE = ("algebra", "symbolic", "families", "evidence", "engine", "queries/basic.py")
MAX_LINES_OF_THE_CORE = 5000
BEHIND_A_SECOND_DOOR = ("batteries", "sklearn")
MAX_MODULES_ON_THE_TOP_FLOOR = 12
MAX_LINES_BEFORE_THE_FIRST_QUERY = 1500

OUR_ERRORS = {
    name
    for errors in (circuits.errors, diffusion.errors)
    for name, found in vars(errors).items()
    if isinstance(found, type)
}
ABOUT_FILES = {"CheckpointError", "CorpusError", "StorageError"}
NOT_AN_ERROR = {"Interrupted"}  # it says where work stopped, and how it goes on
DIALECTS = re.compile(r"\b(must|should|has to|have to|needs?)\b")
SUBJECT = re.compile(r"[^:;]{1,80}: |\{\}, got ")  # the name of what is wrong, or a sentence that begins with it
COMPARISON = re.compile(r"expected .+, got .+|: \{\}(; .+)?$", re.DOTALL)  # or the message of another error in it

# Private attributes of other libraries.
THEIRS = {"_attn_implementation", "_params", "_replace", "_source_node", "_version"}

HEAVY = {
    "accelerate",
    "datasets",
    "hypothesis",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "networkx",
    "pandas",
    "pyarrow",
    "pyjuice",
    "pytest",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
}

MAX_LINES_OF_A_FILE = 400
LONGER_FILES = {
    "diffusion/coupling.py": 440,  # one class: a distribution and what is asked of it
}

MAX_LINES_OF_A_FUNCTION = 60
MAX_PARAMETERS = 10
# Public entry points whose options are the contract: each is documented, keyword-only, and has a default.
LARGER_FUNCTIONS = {
    "circuits/sklearn/density.py: __init__",  # scikit-learn sets and searches the options of an estimator one by one
    "diffusion/compat.py: generate",  # another library's signature
    "diffusion/decoding/generation.py: generate",
    "diffusion/decoding/generation.py: infill",
    "diffusion/evaluation/few_steps.py: few_step_quality",
    "diffusion/prediction.py: ask",
    "diffusion/training/logit_cache.py: cache_logits",
}


@cache
def tree(path):
    return ast.parse(path.read_text())


def named(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Yield the dotted names that a file imports: `from a import b` is a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}, line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name):
    return any(part.startswith("_") and part != "__future__" for part in name.split("."))


def part_of(path):
    """Return the wing of its package that a file belongs to; the front door has none."""
    inside = path.relative_to(ROOT)
    part = inside.parts[1].removesuffix(".py")
    return None if part == "__init__" else part


def crossings(path):
    """Yield what a file of a wing imports from other wings of its package: the wing, and the dotted name."""
    package, part = path.relative_to(ROOT).parts[0], part_of(path)
    for name in imported(path) if part is not None else ():
        parts = name.split(".")
        if parts[0] == package and parts[1:2] != [part]:
            yield parts[1], name


def private_attributes(path):
    """Yield the attributes with a leading underscore that a file takes from something other than self or cls."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not node.attr.startswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from () if own else (node.attr,)


def defined(paths):
    """Return the names that files define: functions, classes, variables, and attributes of self and cls."""
    names = set()
    for node in (node for path in paths for node in ast.walk(tree(path))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def functions():
    """Yield every function: where it is, and its node."""
    for path in (path for paths in FILES.values() for path in paths):
        for node in ast.walk(tree(path)):
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


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_every_wing_has_its_place(package):
    wings = {part_of(path) for path in FILES[package]} - {None}
    assert wings <= set(HEIGHTS[package])


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_traffic_runs_one_way(package):
    height = HEIGHTS[package]
    for path in FILES[package]:
        for other, name in crossings(path):
            assert other in height, f"{named(path)} imports {name}: import it from its own module"
            lower = height[other] < height[part_of(path)]
            assert lower or (named(path), other) in AGAINST_THE_TRAFFIC, f"{named(path)} imports {name}, no lower wing"


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_no_private_name_crosses_a_wing(package):
    taken = {name for path in FILES[package] for _, name in crossings(path) if is_private(name)}
    assert not taken - PRIVATE_ACROSS


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_private_attributes_are_of_the_own_package(package):
    own = defined(FILES[package]) | THEIRS
    assert not [(named(path), name) for path in FILES[package] for name in private_attributes(path) if name not in own]


def test_the_core_is_read_in_one_sitting():
    paths = [path for path in FILES["circuits"] if named(path).removeprefix("circuits/").startswith(CORE)]
    assert {part_of(path) for path in paths} == {part.split("/")[0] for part in CORE}
    assert sum(len(path.read_text().splitlines()) for path in paths) <= MAX_LINES_OF_THE_CORE


def test_the_first_query_is_understood_after_a_few_files():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    files = re.findall(r"^\d\. `(circuits/[\w/]+\.py)`", page, re.MULTILINE)
    assert len(files) >= 4
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < MAX_LINES_BEFORE_THE_FIRST_QUERY


def test_the_page_of_the_architecture_names_every_wing():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    wings = {init.parent.name for package in FILES for init in (ROOT / package).glob("*/__init__.py")}
    assert not [wing for wing in wings if not re.search(rf"\b{wing}\b", page)]


def test_the_top_floor_of_circuits_is_small():
    modules = list((ROOT / "circuits").glob("*.py"))
    assert len(modules) <= MAX_MODULES_ON_THE_TOP_FLOOR


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_importing_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert not {f"circuits.{wing}" for wing in BEHIND_A_SECOND_DOOR} & set(loaded)


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


def messages(path):
    """Yield the messages of our errors that a file raises, what is put into them as {}: the error, and the text."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OUR_ERRORS and node.args:
            yield node.func.id, text_of(node.args[0])


def text_of(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return text_of(node.left) + text_of(node.right) if isinstance(node, ast.BinOp) else "{}"


@pytest.mark.parametrize("package", ["circuits", "diffusion"])
def test_errors_follow_one_grammar(package):
    """``argument: expected X, got Y; way out``, and no other dialect."""
    for path in FILES[package]:
        for error, text in messages(path):
            assert not DIALECTS.search(text), f"{named(path)}: {text}"
            if error not in NOT_AN_ERROR:
                assert SUBJECT.match(text), f"{named(path)}: {text}: begin with what it is about"
            if error in ABOUT_FILES:
                assert COMPARISON.search(text), f"{named(path)}: {text}: say what was expected, and what came"


EXAMPLE = '''
def f(self, a, *, b):
    """Doc."""
    # why

    from circuits.io.saving import save
    from circuits.queries._direct_moments import moments
    from diffusion.coupling import _sure
    if not b:
        raise ArgumentError(f"{b!r} must be true")
    return save(moments, _sure, self._own, a._hidden, b.__class__)
'''


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A file of `circuits.engine` that breaks the rules."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "circuits" / "engine" / "example.py"
    path.parent.mkdir(parents=True)
    path.write_text(EXAMPLE)
    return path


def test_the_checks_see_what_they_are_to_see(example):
    (function,) = tree(example).body
    assert lines_of_code(example, function) == 6
    assert num_parameters(function) == 2
    saved, moments, sure = (
        "circuits.io.saving.save",
        "circuits.queries._direct_moments.moments",
        "diffusion.coupling._sure",
    )
    assert list(imported(example)) == [saved, moments, sure]
    assert list(crossings(example)) == [("io", saved), ("queries", moments)]
    assert [is_private(name) for name in (saved, moments, sure)] == [False, True, True]
    assert list(private_attributes(example)) == ["_hidden"]
    assert defined([example]) == {"f"}
    assert list(messages(example)) == [("ArgumentError", "{} must be true")]


RULES = (
    lambda: test_circuits_knows_nothing_of_diffusion(FILES["circuits"][0]),
    lambda: test_traffic_runs_one_way("circuits"),
    lambda: test_no_private_name_crosses_a_wing("circuits"),
    lambda: test_private_attributes_are_of_the_own_package("circuits"),
    lambda: test_every_wing_has_its_place("diffusion"),
    lambda: test_diffusion_imports_public_names_of_circuits_only(FILES["diffusion"][0]),
    lambda: test_errors_follow_one_grammar("circuits"),
    test_the_core_is_read_in_one_sitting,
    test_the_top_floor_of_circuits_is_small,
    test_files_are_short,
    test_functions_are_short_and_take_few_arguments,
)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_fail(rule, example, monkeypatch):
    long = example.parents[1] / "long.py"
    long.write_text("def g(a, b, c, d, e, f, g, h, i, j, k):\n    return 1\n" + "\n" * MAX_LINES_OF_THE_CORE)
    lost = example.parents[2] / "diffusion" / "lost.py"
    lost.parent.mkdir()
    lost.write_text("from circuits.engine.compile import _secret\n")
    for number in range(MAX_MODULES_ON_THE_TOP_FLOOR):
        (long.parent / f"m{number}.py").touch()
    (example.parent / "core.py").write_text(long.read_text())
    monkeypatch.setitem(FILES, "circuits", [example, long, example.parent / "core.py"])
    monkeypatch.setitem(FILES, "diffusion", [lost])
    monkeypatch.setattr(f"{__name__}.CORE", ("engine",))
    with pytest.raises(AssertionError):
        rule()
