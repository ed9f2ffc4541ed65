"""What is known about the variables of a circuit."""

from circuits.evidence.evidence import Evidence

__all__ = ["Evidence"]
