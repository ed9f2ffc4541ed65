"""A test bed: a denoiser, blocks to fit a circuit and a head to, and held-out blocks to measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import circuits as ct
import diffusion as df


@dataclass(frozen=True, eq=False, kw_only=True)
class Bed:
    """What ``barrier.py`` measures; windows are int64 (N, context length + L), and the last L tokens of one its block.

    Attributes:
        denoiser: the masked-token predictor, as it is.
        num_features: H of its hidden states.
        block_length: L.
        vocabulary: its ids of the circuit's categories.
        text: windows for maximum likelihood; ``train`` and more, where there is more of the same kind.
        train: windows for the coupled objective, and to fine-tune on.
        more: further windows for the coupled objective, which are masked once.
        validation: windows for early stopping, of no part of ``text`` or ``held_out``.
        held_out: windows to measure on, by what they are.
        chain: returns a homogeneous chain of maximum likelihood, given the number of its states; None: it is fitted to
            ``text`` from random weights.
        aligned: returns a circuit for blocks whose places mean the same, before it is fitted, given the number of its
            states and the categories of ``text``, (N, L); states and transitions are named like those of a hidden
            Markov model. None: there is none.
        parts: for some kinds of held-out windows: what exactly is masked of their blocks, bool (N, L); of the others
            random places at several ratios are.
        fine_tune: returns the denoiser trained further on ``train`` for so many seconds of processor time, kept in a
            folder; None: there is no such column.
        is_shared: whether circuit and predictions of training windows are the same for all seeds, and made once: the
            seed then decides held-out windows and the fits of heads.
        name: of the folders of its fits, another one where these are made in another way.
        ratios: shares of a block that are masked.
    """

    denoiser: df.Denoiser
    num_features: int
    block_length: int
    vocabulary: tuple[int, ...]
    text: Tensor
    train: Tensor
    validation: Tensor
    held_out: dict[str, Tensor]
    more: Tensor | None = None
    chain: Callable[[int], ct.CompiledCircuit] | None = None
    aligned: Callable[[int, Tensor], ct.Circuit] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    fine_tune: Callable[[Path, float], df.Denoiser] | None = None
    is_shared: bool = False
    name: str = "seed"
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
