"""Well-known circuit structures: functions that return a :class:`~circuits.graph.Circuit`."""

from circuits.structures.basic import fully_factorized, mixture
from circuits.structures.hmm import hmm

__all__ = ["fully_factorized", "hmm", "mixture"]
