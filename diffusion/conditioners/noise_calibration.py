"""Calibration of a denoiser's prediction by the noise level, before a circuit multiplies it.

A circuit that was fitted by maximum likelihood already knows how frequent tokens are and what follows what. So does the
prediction q that it is multiplied with, and the more the fewer tokens are masked. The plain product ``p q`` counts that
knowledge twice; how much of it depends on the share r of the block that is masked. The calibrated product uses

    log e_i(v) = beta(r) log q_i(v) + b_v(r)

in place of ``log q_i(v)``, with ``beta`` and ``b`` piecewise linear in r. At ``beta = 1, b = 0`` it is the plain
product of coupled discrete diffusion (Li et al. 2026, arXiv 2603.00045), at ``beta = 0, b = 0`` the circuit alone.
Evidence may be any log-factor, so everything stays exact; it is the simplest way to condition a circuit on the noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits import CompiledCircuit
from circuits.arguments import checked_count
from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.context import at_mask_ratio
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


@register("noise_calibration")
class NoiseCalibration(Conditioner):
    """Log-factors ``beta(r) log q_i(v) + b_v(r)`` from log-probabilities and the mask ratio r of their block.

    Args:
        num_tokens: V.
        num_knots: M >= 2; beta and b are given at M evenly spaced mask ratios from 0 to 1, and linear in between.

    Attributes:
        log_scale: log beta at the knots, (M,); 0 at first. Beta is positive: a forbidden token stays forbidden.
        bias: b at the knots, (M, V); 0 at first.
    """

    needs_observed = False

    def __init__(self, num_tokens: int, num_knots: int = 5) -> None:
        super().__init__()
        for name, value, least in (("num_tokens", num_tokens, 1), ("num_knots", num_knots, 2)):
            checked_count(name, value, least)
        self.log_scale = nn.Parameter(torch.zeros(num_knots))
        self.bias = nn.Parameter(torch.zeros(num_knots, num_tokens))

    @classmethod
    def dividing_out(cls, token_counts: Tensor, *, strength: float = 0.75, num_knots: int = 5) -> NoiseCalibration:
        """Start from ``b_v = -strength * log f_v``, with f the frequency of token v.

        Frequencies are what a circuit of maximum likelihood and a denoiser both know best. With 0.75 such a circuit
        helps before it is trained on the coupled objective, where with 0 it hurts.

        Args:
            token_counts: how often each token occurs in the training text, (V,), >= 0; one is added to each.
            strength: share of the frequencies that is divided out.
            num_knots: M >= 2.
        """
        if token_counts.dim() != 1 or not len(token_counts) or bool((token_counts < 0).any()):
            raise ArgumentError(f"token_counts: expected numbers >= 0 of shape (V,), got {tuple(token_counts.shape)}")
        calibration = cls(len(token_counts), num_knots)
        log_frequency = torch.log_softmax((token_counts.double() + 1).log(), 0)
        with torch.no_grad():
            calibration.bias.copy_(-strength * log_frequency.expand_as(calibration.bias))
        return calibration

    def forward(
        self,
        log_q: Tensor,  # shape: (B, L, V) or (B, L, k)
        masked: Tensor,  # shape: (B, L)
        values: Tensor | None = None,  # shape: (B, L, k)
        where: Tensor | None = None,  # shape: (B, L)
    ) -> Tensor:
        """Return the log-factors, in the shape of ``log_q``; -inf where ``log_q`` is.

        Args:
            log_q: the denoiser's log-probabilities (or logits) of all tokens, or of those in ``values``.
            masked: bool, True where a token is to be predicted; its mean over the block is the mask ratio.
            values: the tokens that ``log_q`` is about; None: all.
            where: the n positions that ``log_q`` and ``values`` are about, (1, n, ...), in order; None: all.
        """
        dim = 1 if where is None else 0  # (B, 1, 1 or V), or (1, n, 1 or V)
        scale = at_mask_ratio(masked, self.log_scale, where=where)[0].exp().unsqueeze(dim).unsqueeze(-1)
        if values is None:
            bias = at_mask_ratio(masked, self.bias, where=where)[0].unsqueeze(dim)
        else:
            (of_blocks,) = at_mask_ratio(masked, self.bias)  # (B, V), of which a list reads a few
            block = torch.arange(len(masked), device=masked.device) if where is None else where.nonzero()[:, 0]
            index = block.unsqueeze(dim).unsqueeze(-1) * of_blocks.shape[1] + values
            bias = of_blocks.flatten().gather(0, index.flatten()).view_as(index)
        if not log_q.numel() or bool(log_q.detach().amin() > -torch.inf):
            return (scale * log_q.to(scale.dtype)).add_(bias)
        is_possible = log_q > -torch.inf  # where it is not, the scale would have no gradient
        factors = scale * log_q.masked_fill(~is_possible, 0.0).to(scale.dtype) + bias
        return factors.masked_fill(~is_possible, -torch.inf)

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction with the calibrated log-factors."""
        said = prediction.log_q, masked, prediction.values, prediction.where
        return Conditioned(replace(prediction, log_q=self(*said)))

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        num_knots, num_tokens = self.bias.shape
        return {"num_tokens": num_tokens, "num_knots": num_knots}

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless it is for as many tokens as the circuit has categories."""
        categories = set(pc.circuit.num_categories)
        if {self.bias.shape[1]} != categories:
            raise ArgumentError(
                f"calibration: it is for {self.bias.shape[1]} tokens, and the circuit has {sorted(categories)} "
                "categories"
            )
