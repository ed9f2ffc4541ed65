"""The k best explanations of every unit, in order (Huang and Chiang 2005, "Better k-best Parsing")."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine.semirings.base import Semiring

_MAX_CHUNK = 1 << 24


class KBestSemiring(Semiring):
    """The ``k`` largest log-scores, in descending order along one trailing dimension, -inf where there are fewer.

    Args:
        k: how many, >= 1.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        # The (i+1)(j+1) pairs of ranks up to (i, j) are all at least as good, so only pairs with few of them qualify.
        self.left_ranks = torch.tensor([i for i in range(k) for j in range(k // (i + 1))])
        self.right_ranks = torch.tensor([j for i in range(k) for j in range(k // (i + 1))])

    def lift(self, log_values: Tensor) -> Tensor:
        """Read each log-value as the score of one explanation."""
        return torch.nn.functional.pad(log_values.unsqueeze(-1), (0, self.k - 1), value=-torch.inf)

    def candidates(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the scores of the pairs that may be among the k best, (..., n) in the order of the rank lists."""
        return left[..., self.left_ranks.to(left.device)] + right[..., self.right_ranks.to(left.device)]

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the k best sums of a left and a right score."""
        return self.candidates(left, right).topk(self.k, -1).values

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the k best of all weighted children's scores, in chunks of output units that bound the memory."""
        chunk = max(1, _MAX_CHUNK // max(1, x.numel()))
        pieces = []
        for part in log_weights.split(chunk, 1):
            scores = (part[..., None, None] + x.unsqueeze(1)).movedim(2, 3).flatten(3)  # (F, O, B, I * k)
            pieces.append(scores.topk(self.k, -1).values)
        return torch.cat(pieces, 1)
