"""The documentation: its code runs, its links lead somewhere, and its reference has every public name."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import circuits
import diffusion

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
DRAWN_BY_THE_DEMO = ROOT / "docs" / "gap.png"

# What a page takes for granted stands in a comment "<!-- python ... -->"; a comment "<!-- not run: reason -->" marks
# the block below it.
BLOCK = re.compile(
    r"<!-- python\n(?P<hidden>.*?)-->"
    r"|(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```python[^\n]*\n(?P<shown>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
REASONS = ("needs a GPU", "needs a real model")
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors_of(page):
    headings = HEADING.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # on import of pyjuice
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__docs__"}
    for block in BLOCK.finditer(text):
        if block["reason"]:
            assert block["reason"].startswith(REASONS), f"{page.name}: {block['reason']}: not a reason that counts"
            continue
        kind = "hidden" if block["hidden"] is not None else "shown"
        line = text.count("\n", 0, block.start(kind))
        code = "\n" * line + block[kind]  # so that a traceback names the page's own lines
        exec(compile(code, str(page), "exec"), namespace)


def test_blocks_are_found():
    text = "<!-- python\na = 1\n-->\n```python\nb = 2\n```\n<!-- not run: needs a GPU -->\n```python\nc\n```\n"
    blocks = [(block["hidden"], block["reason"], block["shown"]) for block in BLOCK.finditer(text)]
    assert blocks == [("a = 1\n", None, None), (None, None, "b = 2\n"), (None, "needs a GPU", "c\n")]
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) > 40


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=name_of)
def test_links_and_pictures_exist(page):
    missing = []
    for link in ("".join(found) for found in LINK.findall(without_code(page.read_text()))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            missing.append((link, target))
    if [target for _, target in missing] == [DRAWN_BY_THE_DEMO]:
        pytest.skip("docs/gap.png is drawn by `unfactor demo`, and is not there")
    assert not missing, f"{name_of(page)} leads nowhere: {[link for link, _ in missing]}"


def described():
    """Return the dotted names that the reference describes."""
    return [name for page in REFERENCE for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


def home_of(package, name):
    """Return the module that a public name is defined in."""
    try:
        return getattr(getattr(package, name), "__module__", None)
    except circuits.ArgumentError:  # an optional package is not installed
        return None


@pytest.mark.parametrize("package", [circuits, diffusion], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    text = "\n".join(page.read_text() for page in REFERENCE)
    known = set(described())
    for name in package.__all__:
        assert re.search(rf"\b{name}\b", text), f"{package.__name__}.{name} is not in the reference"
        home = home_of(package, name)
        if home is not None:
            assert known & {home, f"{home}.{name}", f"{home.rpartition('.')[0]}.{name}"}, (
                f"{home}, where {package.__name__}.{name} is defined, is not described"
            )


@pytest.mark.parametrize(
    "package",
    [
        circuits.distributions,
        circuits.interop,
        circuits.learning,
        circuits.queries,
        circuits.structures,
        circuits.testing,
        circuits.transforms,
    ],
    ids=lambda package: package.__name__,
)
def test_the_reference_has_every_name_of_the_subpackages(package):
    known = set(described())
    for name in package.__all__:
        home = getattr(getattr(package, name), "__module__", None)
        if home is not None:
            assert known & {home, f"{home}.{name}", f"{package.__name__}.{name}"}, f"{package.__name__}.{name}"


@pytest.mark.parametrize("name", described())
def test_what_the_reference_describes_exists(name):
    module, attributes = name, []
    while importlib.util.find_spec(module.partition(".")[0]) and not _is_module(module):
        module, _, attribute = module.rpartition(".")
        attributes.insert(0, attribute)
    if module == "circuits.estimator":
        pytest.importorskip("sklearn")
    found = importlib.import_module(module)
    for attribute in attributes:
        found = getattr(found, attribute)


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra [docs])")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log_conditional" in (tmp_path / "site" / "reference" / "queries" / "index.html").read_text()
