"""The documentation: its code runs, its links lead somewhere, and its reference has every public name."""

import importlib
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import circuits
import circuits.batteries
import diffusion

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "adapters").glob("*.md"))]
FRONT = [ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
PACKAGES = [
    circuits,
    circuits.batteries,
    circuits.families,
    circuits.interop,
    circuits.learning,
    circuits.queries,
    circuits.structures,
    circuits.testing,
    circuits.transforms,
    diffusion,
    diffusion.codd,
    diffusion.compat,
    diffusion.decoding.baselines,
    diffusion.testing,
    diffusion.testing.worlds,
]
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
    families = dict(circuits.families.FAMILIES)
    monkeypatch.setattr(circuits.families.base, "FAMILIES", families)  # pages may register their own
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


@pytest.mark.parametrize("page", [*PAGES, *FRONT, *REFERENCE], ids=name_of)
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


@pytest.mark.parametrize("page", [*PAGES[1:], *REFERENCE], ids=name_of)
def test_the_navigation_has_every_page(page):
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert f": {page.relative_to(DOCS)}\n" in navigation, f"add {page.name} to nav in mkdocs.yml"


def described():
    """Return the dotted names that the reference describes."""
    return [name for page in REFERENCE for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


def described_in(package, name):
    """Return the modules and names whose description has a public name of a package."""
    try:
        found = getattr(package, name)
        home = found.__name__ if isinstance(found, types.ModuleType) else getattr(found, "__module__", None)
    except circuits.ArgumentError:  # scikit-learn is not installed
        home = "circuits.sklearn.density"
    if home is None:  # a constant
        return {package.__name__, f"{package.__name__}.{name}"}
    return {home, home.rpartition(".")[0], f"{home}.{name}", package.__name__}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    known = set(described())
    for name in package.__all__:
        assert known & described_in(package, name), f"{package.__name__}.{name} is not described"


@pytest.mark.parametrize("package", [circuits, diffusion], ids=lambda package: package.__name__)
def test_the_list_of_names_is_complete(package):
    names = (DOCS / "reference" / "index.md").read_text()
    assert [name for name in package.__all__ if not re.search(rf"`{name}`", names)] == []


@pytest.mark.parametrize("name", described())
def test_what_the_reference_describes_exists(name):
    if name.startswith("circuits.sklearn.density"):
        pytest.importorskip("sklearn")
    if name.endswith("lm_eval"):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra [eval])")
    module, attributes = name, []
    while importlib.util.find_spec(module.partition(".")[0]) and not _is_module(module):
        module, _, attribute = module.rpartition(".")
        attributes.insert(0, attribute)
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
    pages = "".join(page.read_text() for page in (tmp_path / "site" / "reference").rglob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', pages))
    for package in PACKAGES:
        for name in package.__all__:
            is_module = isinstance(vars(package).get(name), types.ModuleType)
            found = {anchor for anchor in anchors if anchor.split(".")[-1] == name}
            assert found or is_module, f"{package.__name__}.{name} is on no page of the reference"


def test_every_query_and_family_is_explained():
    queries, families = ((DOCS / f"{name}.md").read_text() for name in ("queries", "families"))
    for name in circuits.queries.__all__:
        if name.islower():
            assert f"`{name}" in queries, name
    for family in set(circuits.families.FAMILIES.values()):
        if family.__module__.startswith("circuits."):
            assert f"`{family.__name__}(" in families, family
