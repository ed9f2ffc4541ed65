"""Further semirings: k best explanations, entropies, products of signed numbers."""

from circuits.semirings.averages import EntropySemiring, log_matmul_average
from circuits.semirings.k_best import KBestSemiring
from circuits.semirings.signed import SignedSemiring

__all__ = ["EntropySemiring", "KBestSemiring", "SignedSemiring", "log_matmul_average"]
