"""A mixture of the plain prediction, of the circuit alone and of heads, weighed by the mask ratio.

    p_hat(x) = g_0(r) prod_i q_i(x_i) + g_1(r) p(x | visible) + sum_k g_k(r) p_hat_k(x)

Each head has a calibration and conditioners of its own, so components of one circuit, which share what they are
multiplied with, cannot say this; and a block chooses by what it holds which of them was right. With weights that are
fitted well the mixture is no worse than the best of its parts at any ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import circuits as ct
import diffusion as df
from diffusion.decoding.head_mixture import fit_weights, mixed


@dataclass(frozen=True, eq=False)
class Gate:
    """A mixture.

    Attributes:
        circuit: alone.
        vocabulary: ids of its categories, in increasing order.
        heads: K of them.
        log_weights: unnormalised, at M evenly spaced mask ratios from 0 to 1 and linear in between, (M, 2 + K); first
            those of the plain prediction and of the circuit.
    """

    circuit: ct.CompiledCircuit
    vocabulary: tuple[int, ...]
    heads: Sequence[df.CoupledHead]
    log_weights: Tensor

    def log_likelihood(self, said: df.Prediction, tokens: Tensor, masked: Tensor) -> Tensor:
        """Return the log-probability of the true tokens at masked places, float64 (B,)."""
        return mixed(self.log_weights, self.parts(said, tokens, masked), masked)

    @torch.no_grad()
    def parts(self, said: df.Prediction, tokens: Tensor, masked: Tensor) -> Tensor:
        """Return the log-probability under every component, float64 (B, 2 + K)."""
        categories = torch.searchsorted(torch.tensor(self.vocabulary), tokens.contiguous())
        circuit = ct.queries.log_conditional(self.circuit, categories, ~masked).double()
        alone = said.log_prob_of(tokens).double().masked_fill(~masked, 0.0).sum(1)
        heads = [head.conditional_log_likelihood(said, tokens, masked).double() for head in self.heads]
        return torch.stack([alone, circuit, *heads], 1)

    def fitted(self, said: df.Prediction, tokens: Tensor, masked: Tensor, *, decay: float = 1e-3) -> Gate:
        """Return the mixture whose weights are best on some blocks, in nats per masked token.

        Args:
            said: what the denoiser says of them.
            tokens: int64 (B, L).
            masked: bool (B, L).
            decay: of the squares of log-weights, which keeps those that no block speaks of equal.
        """
        some = masked.any(1)
        parts, masked = self.parts(said, tokens, masked)[some], masked[some]
        log_weights = self.log_weights.clone().requires_grad_()
        fit_weights(log_weights, parts, masked, decay=decay)
        return replace(self, log_weights=log_weights.detach())
