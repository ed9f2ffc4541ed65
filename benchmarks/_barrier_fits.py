"""What a bed needs fitted: the circuit of maximum likelihood, caches, and heads that start from it; kept on disk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _bed import Bed

import circuits as ct
import diffusion as df
from circuits.files import replace_file
from diffusion.training.circuit import losses_by_ratio

MATCHED = {"matched": "calibrated", "aligned matched": "aligned", "matched potentials": "potentials"}
"""Heads whose marginals are those that the denoiser predicts, and the heads whose other conditioners they have.

Static ones have the circuit of maximum likelihood. Nothing but the sizes of the steps is fitted, on validation windows.
"""
HEADS = ("plain", "calibrated", "aligned", *MATCHED, "potentials", "aligned potentials", "gates", "low rank", "all")
"""Contextual ones start from static ones, those of the bed's own circuit from ``aligned``.

This circuit keeps its weights of maximum likelihood: with tables at every position it has too many for the few blocks
that a denoiser was asked about.
"""
STATIC = ("plain", "calibrated", "aligned", "matched", "aligned matched")
"""These have no random start: of the beds of text they are the same for all seeds, like circuit and predictions."""
GATES = {
    "switched": ("calibrated", "aligned", "matched", "aligned matched"),
    "switched potentials": (
        *("calibrated", "aligned", "matched", "aligned matched"),
        *("potentials", "aligned potentials", "matched potentials"),
    ),
}
"""Mixtures of the plain prediction, of the circuit alone and of heads."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
        states: of the hidden Markov model.
        epochs: of maximum likelihood at most, by mini-batch EM.
        masks: noisy versions of every training window.
        validation_masks: noisy versions of every validation window.
        cache_batch: windows a call of the denoiser.
        knots: noise levels of the calibration.
        gate_knots: noise levels of the weights of mixtures of heads.
        batch_size: noisy windows an update.
        learning_rate: of tables, at the peak.
        feature_learning_rate: of what reads hidden states, at the peak.
        steps: updates of every fit on the coupled objective at most.
        validate_every: updates between two looks at the validation windows.
        patience: looks without a better one until a fit stops.
        hidden: units between features and log-factors.
        matching: steps of matched heads.
        matching_updates: of the sizes of these steps.
    """

    states: int = 128
    epochs: int = 12
    masks: int = 4
    validation_masks: int = 1
    cache_batch: int = 32
    knots: int = 9
    gate_knots: int = 5
    batch_size: int = 32
    learning_rate: float = 0.03
    feature_learning_rate: float = 1e-3
    steps: int = 400
    validate_every: int = 50
    patience: int = 5
    hidden: int = 128
    matching: int = 4
    matching_updates: int = 60


QUICK = Sizes(
    states=4,
    epochs=1,
    masks=1,
    knots=3,
    batch_size=4,
    steps=2,
    validate_every=1,
    patience=1,
    hidden=4,
    matching_updates=1,
)


@dataclass(frozen=True)
class Fits:
    """Everything that is fitted to one bed with one seed; what is there is not fitted again.

    Attributes:
        bed: that it is fitted to.
        folder: of the fits.
        common: of the circuit and of the predictions; that of the fits, or one of all seeds.
        sizes: how much of everything.
        seed: of the fits.
    """

    bed: Bed
    folder: Path
    common: Path
    sizes: Sizes
    seed: int

    @property
    def common_seed(self) -> int:
        """That of the circuit and of the noise."""
        return 0 if self.bed.is_shared else self.seed

    def has(self, kind: str) -> bool:
        """Return whether the bed has what a head needs."""
        return self.bed.aligned is not None or not kind.startswith("aligned")

    def alone(self) -> ct.CompiledCircuit:
        """Return the circuit of maximum likelihood: the chain, mixed with the bed's own circuit if it has one."""
        parts = [self.circuit(is_aligned) for is_aligned in (False, True)[: 1 + self.has("aligned")]]
        return ct.batteries.convex_combination(parts) if len(parts) > 1 else parts[0]

    def circuit(self, is_aligned: bool) -> ct.CompiledCircuit:
        """Return a homogeneous chain, or the bed's own circuit, of maximum likelihood."""
        path, chain = self.common / ("aligned" if is_aligned else "likeliest"), self.bed.chain
        if not (path / "structure.json").is_file():
            is_ready = chain is not None and not is_aligned
            pc = chain(self.sizes.states) if is_ready else self._fitted(path, is_aligned)
            ct.save(pc, path)
        return ct.load(path)

    def _fitted(self, path: Path, is_aligned: bool) -> ct.CompiledCircuit:
        bed, sizes = self.bed, self.sizes
        ids = torch.tensor(bed.vocabulary)
        blocks = (part[:, -bed.block_length :].contiguous() for part in (bed.text, bed.validation))
        text, validation = (torch.searchsorted(ids, part) for part in blocks)
        if is_aligned:
            assert bed.aligned is not None
            structure = bed.aligned(sizes.states, text)
        else:
            structure = ct.structures.hmm(bed.block_length, sizes.states, len(ids))
        pc = ct.compile(structure, seed=self.common_seed)
        optimizer = ct.learning.MiniBatchEM(step_size=0.1, pseudocount=0.01, seed=self.common_seed)
        result = ct.learning.fit(
            pc,
            text,
            optimizer=optimizer,
            num_epochs=sizes.epochs,
            validation_data=validation,
            patience=min(2, sizes.patience),
            checkpoint_path=path.with_suffix(".safetensors"),
            progress=False,
        )
        likelihoods = [f"{value / bed.block_length:.3f}" for value in result.validation_log_likelihood]
        print(f"{path.name}: validation windows by epoch, nats per token:", *likelihoods, flush=True)
        return pc

    def cache(self, denoiser: df.Denoiser, kind: str, name: str) -> df.LogitCache:
        """Return the predictions for the windows of a kind, ``train`` or ``validation``."""
        path, began = self.common / f"logits-{kind}-{name}", time.process_time()
        masks = self.sizes.masks if kind == "train" else self.sizes.validation_masks
        windows = getattr(self.bed, kind).repeat(masks, 1)
        if kind == "train" and self.bed.more is not None:
            windows = torch.cat([windows, self.bed.more])
        cache = df.cache_logits(
            denoiser,
            windows,
            path,
            block_length=self.bed.block_length,
            features=True,
            batch_size=self.sizes.cache_batch,
            seed=self.common_seed,
            progress=False,
        )
        if not path.with_suffix(".json").is_file():
            _write(path.with_suffix(".json"), {"seconds": time.process_time() - began})
        return cache

    def head(self, denoiser: df.Denoiser, kind: str, name: str) -> df.CoupledHead:
        """Return a head of :data:`HEADS` for a denoiser of some name."""
        path = self.path(kind, name)
        if not path.is_dir():
            parts, made = (
                (("validation",), self._matched) if kind in MATCHED else (("train", "validation"), self._first)
            )
            caches = [self.cache(denoiser, part, name) for part in parts]
            head, began = made(denoiser, kind, name), time.process_time()
            state, config = path.with_suffix(".safetensors"), self._training(kind)
            curve = df.fit_coupled(head, *caches, config=config, checkpoint_path=state, progress=False)
            head.save(path)
            self._report(path, head, caches[-1], curve.steps[-1], time.process_time() - began)
        return df.CoupledHead.load(path)

    def _training(self, kind: str) -> df.CircuitTraining:
        sizes = self.sizes
        if kind in MATCHED:
            updates = sizes.matching_updates
            return df.CircuitTraining(
                steps=updates, batch_size=32, learning_rate=0.03, validate_every=updates, checkpoint_every=10
            )
        return df.CircuitTraining(
            steps=sizes.steps,
            batch_size=sizes.batch_size,
            learning_rate=sizes.learning_rate,
            feature_learning_rate=sizes.feature_learning_rate,
            validate_every=sizes.validate_every,
            checkpoint_every=sizes.validate_every,
            patience=sizes.patience,
            seed=self.common_seed if kind in STATIC else self.seed,
        )

    def path(self, kind: str, name: str) -> Path:
        """Return the folder of a head."""
        return (self.common if kind in STATIC else self.folder) / f"{name}-{kind.replace(' ', '-')}"

    def gate(self, denoiser: df.Denoiser, kind: str, name: str) -> df.HeadMixture:
        """Return a mixture of :data:`GATES` for a denoiser of some name, fitted to its validation windows."""
        alone = df.CoupledHead(self.alone(), conditioners=[df.CircuitAlone()], vocabulary=self.bed.vocabulary)
        heads = [self.head(denoiser, one, name) for one in GATES[kind] if self.has(one)]
        size = denoiser.spec.vocab_size
        gate = df.HeadMixture([alone, *heads], vocab_size=size, num_knots=self.sizes.gate_knots)
        cache = self.cache(denoiser, "validation", name)
        return gate.fit([cache.batch(slice(0, len(cache)))])

    def seconds(self) -> float:
        """Return the processor time of predictions and fits behind ``switched potentials``."""
        heads = [self.path(one, "shipped") for one in GATES["switched potentials"] if self.has(one)]
        caches = [self.common / f"logits-{kind}-shipped" for kind in ("train", "validation")]
        paths = [path.with_suffix(".json") for path in (*caches, *heads)]
        return sum(json.loads(path.read_text("ascii"))["seconds"] for path in paths)

    def _first(self, denoiser: df.Denoiser, kind: str, name: str) -> df.CoupledHead:
        bed, hidden = self.bed, self.sizes.hidden
        if kind in STATIC:
            pc = self.circuit(kind == "aligned")
            ids = torch.tensor(bed.vocabulary)
            blocks = bed.train[:, -bed.block_length :].contiguous()
            counts = torch.bincount(torch.searchsorted(ids, blocks).flatten(), minlength=len(ids))
            made = [df.NoiseCalibration.dividing_out(counts, num_knots=self.sizes.knots)] if kind != "plain" else []
            pc.requires_grad_(kind != "aligned")
            return df.CoupledHead(pc, conditioners=made, vocabulary=bed.vocabulary)
        static = self.head(denoiser, "aligned" if kind.startswith("aligned") else "calibrated", name)
        options = {"hidden": hidden, "seed": self.seed}
        of = {
            "potentials": (df.LatentPotentials,),
            "gates": (df.TransitionGates,),
            "low rank": (df.LowRankTransitions,),
            "all": (df.LatentPotentials, df.TransitionGates),
        }[kind.removeprefix("aligned ")]
        static.pc.requires_grad_(not kind.startswith("aligned"))
        made = [one.for_hmm(static.pc, bed.num_features, **options) for one in of]
        return df.CoupledHead(static.pc, conditioners=[*static.conditioners, *made], vocabulary=bed.vocabulary)

    def _matched(self, denoiser: df.Denoiser, kind: str, name: str) -> df.CoupledHead:
        made: list[df.Conditioner] = []
        if kind in STATIC:
            pc = self.circuit(kind.startswith("aligned"))
        else:
            other = self.head(denoiser, MATCHED[kind], name)
            pc, made = other.pc, [one for one in other.conditioners if not isinstance(one, df.NoiseCalibration)]
        matching = df.MarginalMatching(self.sizes.matching, step=0.25)
        head = df.CoupledHead(pc, conditioners=[*made, matching], vocabulary=self.bed.vocabulary).requires_grad_(False)
        matching.requires_grad_(True)
        return head

    def _report(self, path: Path, head: df.CoupledHead, cache: df.LogitCache, steps: int, seconds: float) -> None:
        bins = losses_by_ratio(head, cache)
        print(
            f"{path.name}: {steps} updates, {seconds:.0f} s; validation by quarter of the mask ratio, nats:",
            *bins,
            flush=True,
        )
        _write(path.with_suffix(".json"), {"steps": steps, "seconds": seconds, "validation": bins})


def _write(path: Path, content: dict[str, object]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="ascii")
