"""A small causal network inside the block, told the denoiser's prediction (the idea of CoDiLA, 2026)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from circuits import RowGenerators
from diffusion.decoding.baselines.base import DrawnDistribution, NetworkHead
from diffusion.decoding.baselines.encoder import BlockEncoder
from diffusion.prediction import Prediction


class CausalHead(NetworkHead["CausalDistribution"]):
    """Writes the masked tokens of a block from left to right, ``p(x_i | x_<i, q, x_O)``, with a small network.

    It sees the denoiser's distributions of all positions, and the tokens that are observed there, from both sides, and
    corrects ``log q_i`` given the tokens before. Untrained it is the prediction itself; train it with
    :func:`~.fit.fit_conditional`. Temperature is that of every conditional. Positions are judged by q.

    Args:
        vocab_size: V.
        block_length: L.
        width: of the network.
        seed: of its first weights.

    Raises:
        ArgumentError: an argument is no positive integer.
    """

    kind: ClassVar[str] = "causal"
    no_constraint: ClassVar[str | None] = "which cannot tell which beginnings can still be completed under its network"

    def __init__(self, vocab_size: int, block_length: int, *, width: int = 64, seed: int = 0) -> None:
        super().__init__(vocab_size=vocab_size, block_length=block_length, width=width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = BlockEncoder(vocab_size, block_length, width)
            self.before = nn.Embedding(vocab_size + 1, width)  # the last one: the block begins
            self.cell = nn.GRUCell(2 * width, width)
            self.output = nn.Linear(width, vocab_size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def _of_blocks(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None
    ) -> CausalDistribution:
        return CausalDistribution(self, prediction, tokens, masked, absent)


@dataclass(frozen=True, eq=False)
class CausalDistribution(DrawnDistribution):
    """Conditionals from left to right; see :class:`CausalHead`."""

    head: CausalHead

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw all tokens, int64 (W, L): at temperature 1 exactly, at 0 the best token given those before."""

        def choose(position: int, log_p: Tensor) -> Tensor:
            if temperature == 0:
                return log_p.argmax(-1)
            return generator.at(4, position).choose(log_p / temperature)

        return self._walk(choose)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of blocks, int64 (*sample_shape, W, L): (*sample_shape, W), in nats."""
        texts = value.reshape(-1, *self.masked.shape)
        found = [self._walk(lambda position, _, text=text: text[:, position])[1] for text in texts]  # type: ignore[misc]
        log_p = torch.stack(found)
        differs = ((texts != self.tokens) & ~self.masked & self.present).any(-1)
        return log_p.masked_fill(differs, -torch.inf).reshape(value.shape[:-1])

    def _walk(self, choose: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Write the masked positions from left to right; return the tokens and their log-probability."""
        head = self.head
        features = head.encoder(self.prediction, self.tokens, self.masked, self.absent)
        log_q = self.prediction.dense()
        state = features.new_zeros(len(features), features.shape[2])
        previous = torch.full_like(self.tokens[:, 0], head.vocab_size)
        written, total = [], log_q.new_zeros(len(features))
        for position in range(self.tokens.shape[1]):
            state = head.cell(torch.cat([head.before(previous), features[:, position]], -1), state)
            log_p = torch.log_softmax(log_q[:, position] + head.output(state), -1)
            is_open = self.masked[:, position]
            log_p = torch.where(is_open.unsqueeze(1), log_p, 0.0)
            token = torch.where(is_open, choose(position, log_p), self.tokens[:, position])
            total = total + torch.where(is_open, log_p.gather(1, token.unsqueeze(1)).squeeze(1), 0.0)
            written.append(token)
            previous = token
        return torch.stack(written, 1), total
