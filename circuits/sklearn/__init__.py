"""Circuits as scikit-learn estimators."""

from circuits.sklearn.density import CircuitDensity

__all__ = ["CircuitDensity"]
