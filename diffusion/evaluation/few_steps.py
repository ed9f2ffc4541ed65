"""Quality against the number of denoiser calls: one denoiser, without and with the circuit, judged text by text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from circuits.progress import progress_bar
from diffusion.decoding.config import DecodeMode, Strategy
from diffusion.decoding.generation import generate
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.intervals import Estimate, wilson
from diffusion.evaluation.kept_points import KeptPoints, identity_of
from diffusion.evaluation.result_tables import ResultTable
from diffusion.head import CoupledHead

Judge = Callable[[Tensor, Tensor], bool]
"""Says whether one generated text is good: (prompt, generated), int64 (P,) and (gen_length,)."""


@dataclass(frozen=True)
class FewStepRow:
    """Shares of good texts at one number of steps per block, with 95 % Wilson intervals."""

    num_steps: int
    without: Estimate
    coupled: Estimate


@dataclass(frozen=True)
class FewStepTable(ResultTable):
    """Share of good texts against steps per block.

    Attributes:
        rows: one per number of steps.
        num_texts: how many texts each share was measured on.
        criterion: what "good" means.
        decode: how the circuit was used.
        temperature: of the tokens.
        seed: of the draws.
    """

    rows: tuple[FewStepRow, ...]
    num_texts: int
    criterion: str
    decode: str
    temperature: float
    seed: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        rows = [(str(row.num_steps), str(row.without), str(row.coupled)) for row in self.rows]
        return [("steps per block", "without circuit", f"with circuit ({self.decode})"), *rows]


def few_step_quality(
    denoiser: Denoiser,
    head: CoupledHead,
    prompts: Tensor,  # shape: (N, P)
    judge: Judge,
    *,
    criterion: str,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    strategy: Strategy = "low_confidence",
    decode: DecodeMode = "latent",
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> FewStepTable:
    """Generate one block after each prompt, without and with the circuit, at several numbers of denoiser calls.

    Args:
        denoiser: the masked-token predictor.
        head: the circuit over one block, with its activation threshold.
        prompts: int64 (N, P), on the denoiser's device.
        judge: says whether a generated block is good.
        criterion: what the judge looks at, for the table.
        steps: denoiser calls per block, each from 1 to L.
        strategy: which positions a step commits.
        decode: how the circuit is used.
        temperature: of the tokens, with and without the circuit.
        batch_size: texts at a time.
        seed: of the draws.
        folder: where each row is kept once it is measured, in a file of its own, and found again by a run that goes on;
            rows of other models, prompts or options, or another criterion, are measured anew. None: nothing is kept.
        progress: draw a progress bar.

    Raises:
        ArgumentError: no prompts, or an argument that ``generate`` refuses.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    if prompts.dim() != 2 or not len(prompts):
        raise ArgumentError(f"prompts: expected int64 (N >= 1, P), got {tuple(prompts.shape)}")
    depends_on = {} if folder is None else {**identity_of(denoiser, head, prompts), "criterion": criterion}
    kept = KeptPoints(folder, depends_on)
    options = f"{strategy} {decode} {temperature} {batch_size} {seed} 1"  # the number changes with what is measured

    def share(num_steps: int, used: CoupledHead | None) -> dict[str, Any]:
        generator = torch.Generator(device=prompts.device).manual_seed(seed)
        num_good = 0
        for part in prompts.split(batch_size):
            out = generate(
                denoiser,
                part,
                gen_length=head.block_length,
                block_length=head.block_length,
                num_steps=num_steps,
                strategy=strategy,
                head=used,
                decode=decode,
                temperature=temperature,
                stop_at_eos=False,
                generator=generator,
            )
            num_good += sum(judge(*pair) for pair in zip(part, out.generated, strict=True))
        return asdict(wilson(num_good, len(prompts)))

    rows = []
    with progress_bar("generating", 2 * len(steps), enabled=progress, way_on=kept.way_on) as advance:
        for num_steps in steps:
            shares = []
            for name, used in (("without", None), ("with", head)):
                point = kept.get(f"{num_steps} {name}", options, partial(share, num_steps, used))
                shares.append(Estimate(**point))
                advance()
            rows.append(FewStepRow(num_steps, *shares))
    return FewStepTable(tuple(rows), len(prompts), criterion, decode, temperature, seed)
