"""Features of a block: what is observed, and what the denoiser predicts, seen from both sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion.prediction import Prediction


class BlockEncoder(nn.Module):
    """A recurrent network in both directions over embeddings of tokens, or mean embeddings under the prediction."""

    def __init__(self, vocab_size: int, block_length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(0.1 * torch.randn(block_length, width))
        self.of_mask = nn.Parameter(0.1 * torch.randn(width))
        self.recurrence = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * width, width)

    def forward(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        absent: Tensor | None = None,  # shape: (B, L)
    ) -> Tensor:  # shape: (B, L, width)
        """Return the features; positions that are absent count as zero."""
        mean = prediction.dense().exp().to(self.position.dtype) @ self.embedding.weight + self.of_mask
        x = torch.where(masked.unsqueeze(-1), mean, self.embedding(tokens.masked_fill(masked, 0))) + self.position
        if absent is not None:
            x = x.masked_fill(absent.unsqueeze(-1), 0.0)
        features: Tensor = self.output(self.recurrence(x)[0])
        return features
