"""Small models of plain blocks, by their left-to-right conditionals."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import circuits as ct
from circuits.arguments import checked_count
from diffusion.blocks import check_circuit
from diffusion.errors import ArgumentError


@runtime_checkable
class BlockModel(Protocol):
    """A distribution over blocks of L tokens, told one token at a time."""

    @property
    def block_length(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    def log_conditionals(
        self,
        blocks: Tensor,  # shape: (N, L)
    ) -> Tensor:  # shape: (N, L, V)
        """Return ``log p(x_i = v | x_0 .. x_i-1)`` of int64 blocks; what stands at i or later is ignored."""
        ...


class CircuitModel:
    """A circuit over L positions of V categories, asked from left to right: exact, in one batch of N L questions."""

    def __init__(self, pc: ct.CompiledCircuit) -> None:
        check_circuit(pc)
        self.pc = pc

    @property
    def block_length(self) -> int:
        """L."""
        return self.pc.circuit.num_vars

    @property
    def vocab_size(self) -> int:
        """V."""
        return max(self.pc.circuit.num_categories)

    @torch.no_grad()
    def log_conditionals(self, blocks: Tensor) -> Tensor:
        """Return ``log p(x_i = v | x_0 .. x_i-1)``, (N, L, V); uniform after an impossible beginning."""
        num_blocks, length = blocks.shape
        factors = torch.full((num_blocks, length, self.vocab_size), -torch.inf, dtype=self.pc.dtype)
        factors = factors.to(blocks.device).scatter(2, blocks.unsqueeze(-1), 0.0)
        before = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril(-1)
        prefixes = torch.where(before[None, :, :, None], factors.unsqueeze(1), 0.0)  # (N, L, L, V)
        here = torch.eye(length, dtype=torch.bool, device=blocks.device)
        prefixes = prefixes.flatten(0, 1)
        is_possible = ct.queries.log_partition(self.pc, ct.Evidence.soft(prefixes)) > -torch.inf
        prefixes = torch.where(is_possible[:, None, None], prefixes, 0.0)
        probs = ct.queries.marginals(self.pc, ct.Evidence.soft(prefixes)).unflatten(0, (num_blocks, length))
        log_p = probs[:, here].log()
        uniform = torch.full_like(log_p, 1 / self.vocab_size).log()
        return torch.where(is_possible.unflatten(0, (num_blocks, length)).unsqueeze(-1), log_p, uniform)


class AutoregressiveModel(nn.Module):
    """A small recurrent network over blocks, to be fitted with :func:`~.fit.fit_autoregressive`.

    Args:
        vocab_size: V.
        block_length: L.
        width: of its state.
        seed: of its first weights.
    """

    def __init__(self, vocab_size: int, block_length: int, *, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("block_length", block_length), ("width", width)):
            checked_count(name, value)
        self.vocab_size = vocab_size
        self.block_length = block_length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab_size + 1, width)  # the last one: before the block
            self.recurrence = nn.GRU(width, width, batch_first=True)
            self.output = nn.Linear(width, vocab_size)

    def sizes(self) -> dict[str, int]:
        """Return the arguments that it was built with."""
        return {"vocab_size": self.vocab_size, "block_length": self.block_length, "width": self.recurrence.hidden_size}

    def log_conditionals(self, blocks: Tensor) -> Tensor:
        """Return ``log p(x_i = v | x_0 .. x_i-1)``, (N, L, V)."""
        start = torch.full_like(blocks[:, :1], self.vocab_size)
        states, _ = self.recurrence(self.embedding(torch.cat([start, blocks[:, :-1]], 1)))
        return torch.log_softmax(self.output(states), -1)


def check_model(model: BlockModel) -> None:
    """Raise ArgumentError unless ``model`` is a model of blocks."""
    if not isinstance(model, BlockModel):
        raise ArgumentError(
            f"model: expected a BlockModel such as CircuitModel(pc) or AutoregressiveModel, got {type(model).__name__}"
        )
