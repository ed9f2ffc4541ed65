"""Some examples of a cache of predictions, which of them a step takes, and what a head makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from circuits import CircuitWeights
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.vocabulary import Coupled


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """Some examples of a cache, on one device.

    Attributes:
        tokens: the true tokens, int64 (B, L).
        masked: bool (B, L).
        log_q: the denoiser's log-probabilities, (B, L, k), or (1, n, k) of the n masked positions; k = V when all
            tokens are kept.
        values: the tokens that ``log_q`` is about, int64 in the same shape; None: all.
        vocab_size: V; None: k.
        features: the denoiser's last hidden states, (B, L, H), or None.
        masked_only: whether ``log_q`` is about the masked positions alone.
    """

    tokens: Tensor
    masked: Tensor
    log_q: Tensor
    values: Tensor | None
    vocab_size: int | None = None
    features: Tensor | None = None
    masked_only: bool = False

    @property
    def prediction(self) -> Prediction:
        """What the denoiser said; of all tokens it is normalised again, for the cache rounds."""
        vocab_size = self.vocab_size or self.log_q.shape[2]
        log_q = self.log_q if self.values is not None else Prediction.from_logits(self.log_q).log_q
        where = self.masked if self.masked_only else None
        return Prediction(log_q=log_q, vocab_size=vocab_size, values=self.values, features=self.features, where=where)

    def distribution(self, head: CoupledHead, *, weights: CircuitWeights | None = None) -> Coupled:
        """Couple a head's circuit to the cached predictions, as :meth:`CoupledHead.distribution` couples any."""
        return head.distribution(self.prediction, self.tokens, self.masked, include=self.tokens, weights=weights)


def blocks_of(step: int, num_blocks: int, batch_size: int, *, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Return which blocks one step takes, at most a batch: every epoch is a permutation of its own.

    Args:
        step: of the fit, from 0.
        num_blocks: that there are.
        batch_size: of a step; of the rest of an epoch there is no batch.
        seed: with the step alone it decides.
    """
    epoch, position = divmod(step, max(1, num_blocks // batch_size))
    order = np.random.default_rng([seed[0], epoch, *seed[1:]]).permutation(num_blocks)
    return order[position * batch_size : (position + 1) * batch_size]
