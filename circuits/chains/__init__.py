"""Chains of equal steps as one recurrence: why long homogeneous chains are fast. Nobody needs it to add a query."""

from circuits.chains.chain import Chain, Scan

__all__ = ["Chain", "Scan"]
