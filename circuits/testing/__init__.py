"""Property-testing circuits: Hypothesis strategies for circuits and evidence, and an oracle that enumerates.

The strategies need the package ``hypothesis`` (extra ``[test]``); the oracle does not.
"""

from typing import TYPE_CHECKING, Any

from circuits.testing.oracle import (
    enumerate_explanations,
    enumerate_joint,
    enumerated_log_partition,
    enumerated_marginals,
    evaluate_slowly,
)

if TYPE_CHECKING:
    from circuits.testing.strategies import circuits, evidence

__all__ = [
    "circuits",
    "enumerate_explanations",
    "enumerate_joint",
    "enumerated_log_partition",
    "enumerated_marginals",
    "evaluate_slowly",
    "evidence",
]


def __getattr__(name: str) -> Any:
    if name in ("circuits", "evidence"):
        from circuits.testing import strategies

        return getattr(strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
