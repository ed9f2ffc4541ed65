"""Joint training: the gradient of the coupled objective through the circuit and the denoiser at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from circuits.arguments import kind_of
from circuits.digests import digest
from circuits.learning.distributed import Processes, checked_processes
from circuits.learning.loop import mixed_seed
from circuits.precision import own_precision
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction, check_token_ids
from diffusion.training.cached import CachedBatch
from diffusion.training.circuit import CircuitTraining, HeadTraining, described, plan_of, settings_of
from diffusion.training.curve import TrainingCurve
from diffusion.training.losses import mean_loss
from diffusion.training.masking import mask_tokens, sample_times
from diffusion.training.plain import PlainText


@dataclass(frozen=True, kw_only=True)
class JointTraining(CircuitTraining):
    """How denoiser and head are trained together.

    Attributes:
        steps: optimizer updates.
        batch_size: windows an update.
        learning_rate: of Adam on the head's parameters, at the peak, see :class:`CircuitTraining`.
        denoiser_learning_rate: of Adam on those of the denoiser that require gradients, at the peak; all fall to 0
            along a cosine.
        gradient_clip: the largest norm of the denoiser's gradient.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 0.003
    denoiser_learning_rate: float = 1e-4
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("denoiser_learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name}: expected a number > 0, got {getattr(self, name)}")


@own_precision
def fit_jointly(
    denoiser: Denoiser,
    head: CoupledHead,
    windows: Tensor,  # shape: (N, context length + L)
    held_out: Tensor | None = None,  # shape: (M, context length + L)
    *,
    config: JointTraining | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingCurve:
    """Raise ``E[w(t) CLL]`` over the parameters of a denoiser and its head together, in place.

    Every update masks the last block of some windows anew, asks the denoiser, and moves both down the gradient of
    ``-log p_hat`` of the true tokens, which reaches the denoiser through the prediction that the circuit is coupled to
    (Li et al. 2026, arXiv 2603.00045, section 4). Begin with a trained denoiser and a head that is fitted to it.

    An interrupted run that is repeated from the same weights with the same arguments continues, and ends like one that
    was not interrupted.

    Args:
        denoiser: a module whose logits are differentiable; parameters that require no gradient stay as they are.
        head: over its last L positions, on the same device.
        windows: int64 tokens, (N, context length + L); the context is always visible.
        held_out: windows for the curve and for early stopping, masked in the same way at every entry.
        config: by default ``JointTraining()``.
        checkpoint_path: a ``.safetensors`` file to continue from, if it exists, and to write to.
        process_group: the processes that learn together, see :func:`~diffusion.training.circuit.fit_coupled`.
        log_dir: a folder for TensorBoard, written at every entry of the curve; None: none.
        progress: draw a progress bar.

    Returns:
        The learning curve: loss in nats per masked token (``masked_mean``) or per block.

    Raises:
        ArgumentError: the denoiser is no module, or no gradient reaches it; windows that do not fit; or the loss is not
            finite.
        CheckpointError: the checkpoint is corrupt, or of another run, or of one that started from other weights.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    config = config or JointTraining()
    for name, data in (("windows", windows), ("held_out", held_out)):
        if data is not None:
            _check_windows(name, data, denoiser, head)
    training = _Training(denoiser, head, windows, held_out, config, checked_processes(process_group))
    moved = [(name, tuple(one.shape), one.requires_grad) for name, one in training.model.named_parameters()]
    identity = {
        "configuration": json.dumps(settings_of(config)),
        "head": described(head),
        "denoiser": digest(repr(moved), repr(denoiser.spec)),
        "windows": digest(windows),
        "held-out windows": digest(held_out),
    }
    plan = plan_of(config, held_out, log_dir=log_dir, title="training denoiser and circuit")
    return training.run(plan, checkpoint_path, identity, progress=progress)


class _Training(HeadTraining):
    """Updates of a denoiser and its head on windows that are masked anew."""

    def __init__(
        self,
        denoiser: Denoiser,
        head: CoupledHead,
        windows: Tensor,
        held_out: Tensor | None,
        config: JointTraining,
        processes: Processes,
    ) -> None:
        moved = [one for one in denoiser.parameters() if one.requires_grad] if isinstance(denoiser, nn.Module) else []
        if not moved:
            raise ArgumentError(
                f"denoiser: expected a torch module with parameters that require gradients, got "
                f"{type(denoiser).__name__}; fit the head alone, fit_coupled"
            )
        both = nn.ModuleDict({"denoiser": denoiser, "head": head})  # type: ignore[dict-item]
        groups = [{"params": moved, "lr": config.denoiser_learning_rate}]
        text = windows[:, -head.block_length :] if config.likelihood_weight else None
        plain = PlainText.checked(head, text, denoiser.spec.vocab_size, config, processes)
        super().__init__(head, config, model=both, groups=groups, processes=processes, plain=plain)
        self._denoiser, self._windows, self._held_out = denoiser, windows, held_out
        self._moved, self._clip = moved, config.gradient_clip

    def batch(self, step: int) -> CachedBatch:
        """Draw windows of one step, mask them, and ask the denoiser about this process's share."""
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, step) >> 1)
        index = torch.randint(len(self._windows), (self.config.batch_size,), generator=generator)
        batch = self._asked(*self._noised(self._windows[index.to(self._windows.device)], generator))
        if not batch.log_q.requires_grad:
            raise ArgumentError(
                f"denoiser: expected logits with gradients, got none from {type(self._denoiser).__name__}; it may work "
                "under torch.no_grad: fit the head alone, fit_coupled"
            )
        return batch

    def clip(self) -> None:
        """Bound the denoiser's gradient."""
        torch.nn.utils.clip_grad_norm_(self._moved, self._clip)

    def evaluate(self) -> float | None:
        """Return the loss of the held-out windows."""
        if self._held_out is None:
            return None
        return mean_loss(self.head, self._held_out_batches(), self.config.weighting, self.processes)

    def _held_out_batches(self) -> Iterator[CachedBatch]:
        assert self._held_out is not None
        generator = torch.Generator().manual_seed(self.config.seed)
        for windows in self._held_out.split(self.config.batch_size):
            noised = self._noised(windows, generator)
            if len(noised[0]):
                yield self._asked(*noised)

    def _noised(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mask the blocks of all processes, of which each takes its share: windows and masks."""
        t = sample_times(len(windows), generator=generator)
        block = windows[:, -self.head.block_length :].cpu()
        _, masked = mask_tokens(block, t, mask_id=self._denoiser.spec.mask_id, generator=generator)
        return self.processes.share(windows), self.processes.share(masked)

    def _asked(self, windows: Tensor, masked: Tensor) -> CachedBatch:
        windows, masked = windows.to(self.head.pc.device), masked.to(self.head.pc.device)
        start, stop = windows.shape[1] - masked.shape[1], windows.shape[1]
        context, block = windows.tensor_split([start], 1)
        canvas = torch.cat([context, block.masked_fill(masked, self._denoiser.spec.mask_id)], 1)
        said = Prediction.ask(self._denoiser, canvas, window=(start, stop), features=self.head.needs_features)
        masked_only = not self.head.needs_observed
        said = said.only(masked) if masked_only else said
        return CachedBatch(block, masked, said.log_q, said.values, said.vocab_size, said.features, masked_only)


def _check_windows(name: str, windows: Tensor, denoiser: Denoiser, head: CoupledHead) -> None:
    if not isinstance(head, CoupledHead):
        raise ArgumentError(f"head: expected df.CoupledHead, got {kind_of(head)}")
    is_tensor = isinstance(windows, Tensor) and windows.dim() == 2
    if not is_tensor or not len(windows) or windows.shape[1] < head.block_length:
        got = tuple(windows.shape) if isinstance(windows, Tensor) else type(windows).__name__
        raise ArgumentError(
            f"{name}: expected int64 (N >= 1, at least the head's block of {head.block_length}), got {got}"
        )
    check_token_ids(name, windows, windows.shape, denoiser.spec.vocab_size)
    block = windows[:, -head.block_length :]
    unknown = head.unknown_ids(denoiser.spec.vocab_size, denoiser.spec.forbidden_ids)
    found = block[torch.isin(block, torch.tensor(unknown, dtype=torch.int64, device=block.device))]
    if len(found):
        raise ArgumentError(
            f"{name}: expected tokens of the circuit's vocabulary in the blocks, got {int(found[0])}; leave such texts "
            "out, or fit a circuit that has this token"
        )
    head.check_tokenizer(getattr(denoiser, "tokenizer_fingerprint", None))
