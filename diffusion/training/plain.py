"""Plain text beside noised blocks: its log-likelihood under the circuit as a second term of the objective.

    J = E[w CLL] + lambda E[log p(x) / L]

A noised block costs a call of the denoiser, a plain one nothing; so there are many more of these, and with them a large
circuit does not follow the few noised ones. ``log p`` is that of the circuit alone, with its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import circuits as ct
from circuits.arguments import kind_of
from circuits.learning.distributed import Processes
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import check_token_ids
from diffusion.training.cached import blocks_of

if TYPE_CHECKING:
    from circuits import CircuitWeights
    from diffusion.training.circuit import CircuitTraining


@dataclass(frozen=True, eq=False)
class PlainText:
    """Blocks whose log-likelihood counts too.

    Attributes:
        categories: of the circuit, int64 (n, L).
        config: of the fit.
        processes: those that learn together; each reads its share of every batch.
    """

    categories: Tensor
    config: CircuitTraining
    processes: Processes

    @classmethod
    def checked(
        cls, head: CoupledHead, text: Any, num_tokens: int, config: CircuitTraining, processes: Processes
    ) -> PlainText | None:
        """Return the blocks of a fit, None of one without.

        Args:
            head: whose circuit they are about.
            text: int64 tokens (n, L), or None.
            num_tokens: V of the denoiser.
            config: of the fit.
            processes: those that learn together.

        Raises:
            ArgumentError: text of another kind, or without a weight, or a weight without text.
        """
        if (text is None) != (config.likelihood_weight == 0):
            got = f"{'none' if text is None else 'some'} and likelihood_weight={config.likelihood_weight}"
            raise ArgumentError(f"text: expected it with a likelihood_weight > 0 and else none, got {got}")
        if text is None:
            return None
        length = head.block_length
        if not isinstance(text, Tensor) or text.dim() != 2 or not len(text) or text.shape[1] != length:
            raise ArgumentError(f"text: expected int64 (n >= 1, {length}), got {kind_of(text)}")
        check_token_ids("text", text, text.shape, num_tokens)
        everywhere = torch.ones_like(text, dtype=torch.bool)
        return cls(head.vocabulary_in(num_tokens).known("text", text, everywhere), config, processes)

    @property
    def batch_size(self) -> int:
        """Blocks of every step, those of all processes together."""
        return min(self.config.batch_size, len(self.categories))

    def batch(self, step: int) -> Tensor:
        """Return this process's share of the blocks of one step, int64 (b, L)."""
        rows = blocks_of(step, len(self.categories), self.config.batch_size, seed=(self.config.seed, 1))
        return self.categories[self.processes.share(torch.from_numpy(rows)).to(self.categories.device)]

    def log_likelihood(self, pc: ct.CompiledCircuit, weights: CircuitWeights, x: Tensor) -> Tensor:
        """Return what a share (b, L) adds to the mean of ``log p(x)`` over a step's blocks.

        Raises:
            ArgumentError: a block is impossible.
        """
        log_p = pc.log_partition(ct.Evidence.observe(x.to(pc.device)), weights)
        if not bool(log_p.detach().isfinite().all()):
            raise ArgumentError("text: expected blocks that the circuit holds possible, got one of probability 0")
        return log_p.sum() / self.batch_size

    def log_normaliser(self, pc: ct.CompiledCircuit, weights: CircuitWeights, x: Tensor) -> Tensor:
        """Return what it adds to the mean of log Z where any token goes; it is 0, but not its gradients.

        Those in the log-weights are the flows of the circuit itself, which steps by flows subtract.
        """
        anything = torch.zeros(1, x.shape[1], max(pc.circuit.num_categories), dtype=pc.dtype, device=pc.device)
        return pc.log_partition(ct.Evidence.soft(anything), weights).sum() * len(x) / self.batch_size
