"""What is known about the variables of a circuit."""

from circuits.evidence.evidence import Evidence
from circuits.evidence.kinds import Dense, Factors, Indexed, Interval, Listed, Normal, Nothing, Where

__all__ = ["Dense", "Evidence", "Factors", "Indexed", "Interval", "Listed", "Normal", "Nothing", "Where"]
