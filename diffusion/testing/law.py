"""The law of a decoder: the exact distribution of the texts that it produces, by enumerating all that it may do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import ArgumentError
from diffusion.testing.table import Table

Tokens = tuple[int, ...]
Masked = tuple[bool, ...]
Law = dict[tuple[Tokens, Masked], float]
"""The probability of every state: the tokens so far, and which positions are still open."""
StepLaw = Callable[[Tokens, Masked, int], Iterable[tuple[float, Tokens, Masked]]]
"""What one step may do with a state: ``step_law(tokens, masked, step)`` yields probability, tokens and masked after it.

Equal outcomes may be yielded several times. Steps count from 0. Tokens at open positions are the mask's.
"""

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class DecoderLaw(Table):
    """The distribution of a decoder's texts, with ``expected_steps``, how many steps it takes in the mean."""

    expected_steps: float = 0.0


def decoder_law(
    step_law: StepLaw,
    start: Table | Tensor | Sequence[int],
    masked: Tensor | Sequence[bool] | None = None,
    *,
    max_steps: int = 1000,
) -> DecoderLaw:
    """Return the exact law of the texts that a decoder produces, without sampling.

    All states that a step may lead to are enumerated, and equal ones merged, until nothing is open. The number of
    states is at most (V + 1) ** L.

    Args:
        step_law: what one step may do, see :data:`StepLaw`; those of :mod:`diffusion.testing.reference`, or your own.
        start: the canvas, (L,) token ids with the mask's at open positions; or a table of canvases, such as the law of
            the block before.
        masked: bool (L,), the positions to fill in; None: all. Masks elsewhere stay, as those of later blocks do.
        max_steps: more steps than this are an error; a decoder that masks again need not come to an end.

    Raises:
        ArgumentError: the outcomes of a state do not sum to 1, or the steps do not end.
    """
    table = start if isinstance(start, Table) else Table(torch.as_tensor(start, dtype=torch.int64).reshape(1, -1))
    is_open = (True,) * table.length if masked is None else tuple(bool(item) for item in masked)
    if len(is_open) != table.length:
        raise ArgumentError(f"masked: expected {table.length} truth values, as many as start has tokens")
    law: Law = {
        (tuple(text), is_open): prob for text, prob in zip(table.support.tolist(), table.probs.tolist(), strict=True)
    }
    done: Law = {}
    expected_steps, step = 0.0, 0
    while True:
        for state in [state for state in law if not any(state[1])]:
            done[state] = done.get(state, 0.0) + law.pop(state)
        if not law:
            break
        if step == max_steps:
            raise ArgumentError(f"step_law: {len(law)} states are open after max_steps={max_steps} steps")
        expected_steps += sum(law.values())
        law = advance(law, step_law, step)
        step += 1
    texts = torch.tensor([tokens for tokens, _ in done])
    return DecoderLaw(texts, torch.tensor(list(done.values()), dtype=torch.float64), expected_steps=expected_steps)


def advance(law: Law, step_law: StepLaw, step: int) -> Law:
    """Return the law of the states after one more step, equal states merged.

    Raises ArgumentError if the outcomes of a state do not sum to 1.
    """
    after: Law = {}
    for (tokens, masked), prob in law.items():
        total = 0.0
        for share, tokens_after, masked_after in step_law(tokens, masked, step):
            total += share
            state = tokens_after, masked_after
            after[state] = after.get(state, 0.0) + prob * share
        if abs(total - 1) > _ROUNDING:
            raise ArgumentError(
                f"step_law: expected outcomes whose probabilities sum to 1, got {total:.6g} for tokens={tokens}, "
                f"masked={masked}, step={step}"
            )
    return {state: prob for state, prob in after.items() if prob > 0}
