"""Property-testing circuits: strategies that draw circuits and evidence, an oracle that enumerates, and test cases.

Whoever writes a structure, an input family or a semiring subclasses :class:`StructureTestCase`,
:class:`ClassStructureTestCase`, :class:`FamilyTestCase` or :class:`SemiringTestCase`, supplies a constructor, and
inherits the tests.

The oracle needs nothing else; the strategies need the package ``hypothesis``, and the test cases ``pytest`` too (extra
``[test]``): they are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from circuits.testing.oracle import (
    enumerate_explanations,
    enumerate_joint,
    enumerated_log_partition,
    enumerated_marginals,
    evaluate_slowly,
)

if TYPE_CHECKING:
    from circuits.testing.conformance import (
        ClassStructureTestCase,
        DirectFamilyTestCase,
        FamilyTestCase,
        SemiringTestCase,
        StructureTestCase,
        law,
    )
    from circuits.testing.strategies import circuits, evidence

__all__ = [
    "ClassStructureTestCase",
    "DirectFamilyTestCase",
    "FamilyTestCase",
    "SemiringTestCase",
    "StructureTestCase",
    "circuits",
    "enumerate_explanations",
    "enumerate_joint",
    "enumerated_log_partition",
    "enumerated_marginals",
    "evaluate_slowly",
    "evidence",
    "law",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "strategies" if name in ("circuits", "evidence") else "conformance"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
