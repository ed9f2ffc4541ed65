"""What is known about the variables of a circuit."""

from circuits.evidence.evidence import Evidence
from circuits.evidence.kinds import Dense, Factors, Interval, Listed, Normal, Nothing, Where, tensor_code

__all__ = ["Dense", "Evidence", "Factors", "Interval", "Listed", "Normal", "Nothing", "Where", "tensor_code"]
