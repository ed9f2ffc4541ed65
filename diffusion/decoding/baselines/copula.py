"""Discrete copula diffusion (Liu et al. 2024, arXiv 2410.01949): the denoiser's marginals, a circuit's dependence."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

import circuits as ct
from circuits.arguments import checked_count
from diffusion.blocks import check_circuit
from diffusion.coupling import CoupledDistribution
from diffusion.decoding.baselines.base import BlockHead
from diffusion.decoding.baselines.saving import Content
from diffusion.decoding.constraints.coupled import check_chain
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


class CopulaHead(BlockHead[CoupledDistribution]):
    """The distribution with the denoiser's marginals that is nearest to a circuit given what is observed.

    That is the I-projection ``p(x | x_O) prod_i v_i(x_i) / Z``: the circuit keeps its odds ratios, its dependence, and
    the factors v_i move its marginals onto the prediction. The paper approximates v for an autoregressive model. With a
    circuit, whose marginals are exact, iterative proportional fitting finds it: one position after the other is scaled.
    Where no distribution over the circuit's possible texts has these marginals, they are approached only.

    Args:
        pc: the copula, a circuit over L positions, V categories each, fitted on plain blocks (``ct.learning.fit``).
        num_sweeps: how often all positions are scaled at most.
        tolerance: stop when no marginal probability is further than this from the prediction's.
        top_k: list the k best tokens of each position only; None: all.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    kind: ClassVar[str] = "copula"
    modes: ClassVar[frozenset[str]] = frozenset({"latent", "marginal", "any_order", "joint"})
    from_left: ClassVar[bool] = False

    def __init__(
        self, pc: ct.CompiledCircuit, *, num_sweeps: int = 50, tolerance: float = 1e-5, top_k: int | None = None
    ) -> None:
        check_circuit(pc)
        checked_count("num_sweeps", num_sweeps)
        if not tolerance > 0:
            raise ArgumentError(f"tolerance: expected a number > 0, got {tolerance!r}")
        self.pc = pc
        self.num_sweeps = num_sweeps
        self.tolerance = tolerance
        self.top_k = top_k

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return max(self.pc.circuit.num_categories)

    @property
    def block_length(self) -> int:
        """L, the number of positions the circuit is over."""
        return self.pc.circuit.num_vars

    def _content(self) -> Content:
        settings = {"num_sweeps": self.num_sweeps, "tolerance": self.tolerance, "top_k": self.top_k}
        return Content(settings, {}, self.pc)

    @classmethod
    def from_content(cls, content: Content) -> CopulaHead:
        """Build a head of what a file holds."""
        return cls(content.needed_circuit(), **content.settings)

    def check_constraint(self) -> None:
        """Raise ArgumentError unless the circuit is a chain, whose product with an automaton is exact."""
        check_chain(self.pc)

    def _of_blocks(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None
    ) -> CoupledDistribution:
        wanted = prediction.log_q.to(self.pc.dtype)
        wanted = wanted - wanted.logsumexp(-1, keepdim=True)
        factors = torch.zeros_like(wanted).masked_fill(wanted == -torch.inf, -torch.inf)

        def scaled() -> CoupledDistribution:
            return CoupledDistribution.of(self.pc, replace(prediction, log_q=factors), tokens, masked, absent=absent)

        dist = scaled()
        for _ in range(self.num_sweeps):
            gap = (dist.posterior().log_q.exp() - wanted.exp()).abs().amax(-1)
            if not bool((gap > self.tolerance)[masked].any()):
                break
            for position in masked.any(0).nonzero().flatten().tolist():
                change = wanted[:, position] - dist.posterior().log_q[:, position]
                matters = change.isfinite() & masked[:, position].unsqueeze(1)
                factors = factors.clone()
                factors[:, position] += torch.where(matters, change, 0.0)
                dist = scaled()
        return dist
