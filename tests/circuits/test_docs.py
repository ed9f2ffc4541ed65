"""The code blocks of the documentation of queries and families run as they stand."""

import re
from pathlib import Path

import pytest
import torch

import circuits as ct

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = [
    pytest.param(block, id=f"{name}-{position}")
    for name in ("queries", "families")
    for position, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block, monkeypatch):
    families = dict(ct.distributions.FAMILIES)
    monkeypatch.setattr(ct.distributions.base, "FAMILIES", families)  # as the blocks register their own
    torch.manual_seed(0)
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


def test_every_query_and_family_is_documented():
    queries, families = ((DOCS / f"{name}.md").read_text() for name in ("queries", "families"))
    for name in ct.queries.__all__:
        if name.islower():
            assert f"`{name}" in queries, name
    for family in set(ct.distributions.FAMILIES.values()):
        if family.__module__.startswith("circuits."):
            assert f"`{family.__name__}(" in families, family
