"""Circuits under the constraint of a finite automaton."""

from circuits.constrained.distribution import ConstrainedDistribution

__all__ = ["ConstrainedDistribution"]
