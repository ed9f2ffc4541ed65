"""Chains as one recurrence, and chains of vectors, for automata. Nobody needs them to add a query."""

from circuits.chains.chain import Chain, LayerUnits, Scan
from circuits.chains.finding import chains_of
from circuits.chains.vectors import VectorSemiring, joined, padded

__all__ = ["Chain", "LayerUnits", "Scan", "VectorSemiring", "chains_of", "joined", "padded"]
