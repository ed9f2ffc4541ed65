"""Semirings: what "plus" and "times" mean while a circuit is evaluated."""

from circuits.engine.semirings.averages import EntropySemiring, log_matmul_average
from circuits.engine.semirings.base import (
    BestSemiring,
    ChoosingSemiring,
    LogSemiring,
    MaxSemiring,
    Semiring,
    TemperedSemiring,
    choosing_semiring,
)
from circuits.engine.semirings.k_best import KBestSemiring
from circuits.engine.semirings.signed import SignedSemiring

__all__ = [
    "BestSemiring",
    "ChoosingSemiring",
    "EntropySemiring",
    "KBestSemiring",
    "LogSemiring",
    "MaxSemiring",
    "Semiring",
    "SignedSemiring",
    "TemperedSemiring",
    "choosing_semiring",
    "log_matmul_average",
]
