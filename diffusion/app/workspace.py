"""From a corpus to a denoiser with a circuit as its output layer: stages that keep their results in one folder.

    recipe.json         what the folder was made from, with hashes of the text and the tokenizer
    tokenizer.json      text to tokens
    denoiser/           the masked-token predictor
    likelihood/         the circuit fitted by maximum likelihood
    head/               the output layer: circuit and conditioners, fitted on the coupled objective
    joint-*/            the denoiser that the head was trained together with, if it was
    checkpoints/        of runs that were interrupted
    cache/              the denoiser's predictions that the circuit trains on
    results/            tables and pictures
    held_out.jsonl.gz   in a folder that was packed: held-out documents, in place of the whole text

Every stage is skipped when its result is there and whole, and continued when it was interrupted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuits as ct
from circuits import CompiledCircuit
from circuits.digests import digest
from circuits.files import file_hash
from circuits.io.saving import FORMAT as CIRCUIT
from circuits.store import made_from, remove_folder
from diffusion.app.fitting import STAMP, initial_denoiser, initial_head, origin, structures_of, was_fitted
from diffusion.app.folder import HELD_OUT, JOINT, Folder, joint_name, stage
from diffusion.app.recipe import PRESETS, CircuitRecipe, DenoiserRecipe, Recipe, TextRecipe
from diffusion.decoding.config import DecodeMode, Strategy
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.evaluation.few_step_curve import FewStepCurve, few_step_curve, few_step_sketch
from diffusion.evaluation.few_steps import FewStepTable, few_step_quality
from diffusion.evaluation.gap import GapTable, misspecification_gap
from diffusion.evaluation.tuning import TEMPERATURES, Tuning, tune
from diffusion.head import FORMAT as HEAD
from diffusion.head import CoupledHead
from diffusion.text.corpus import Corpus, check_arithmetic, random_windows, windows, windows_and_rest
from diffusion.text.tokenizer import train_tokenizer
from diffusion.training.circuit import fit_coupled
from diffusion.training.denoiser import train_denoiser
from diffusion.training.joint import JointTraining, fit_jointly
from diffusion.training.logit_cache import LogitCache, cache_logits

_NOISE_OF_COPIES = 0.3
"""Of the log-weights of states that are split: what parts the copies."""
STEPS = (1, 2, 4, 8, 16, 32)
"""Denoiser calls per block that are compared, those that a block has room for."""


class Workspace(Folder):
    """A folder with the results of the stages, one process at a time.

    Args:
        path: the folder; created by the first stage.
        progress: draw a progress bar for every stage.
        device: where denoiser and circuit run.
    """

    @stage
    def train(self, recipe: Recipe) -> TransformerDenoiser:
        """Train tokenizer and denoiser, or load them if they are there.

        Raises:
            CheckpointError: the folder holds a denoiser of another recipe.
            CorpusError: the corpus cannot be read, is too short, or is not the one that the folder was made from.
            StorageError: another process works in the folder, or it cannot be written.
        """
        corpus = self.claim(recipe)
        denoiser = self.finished("denoiser", self.base_denoiser)
        if denoiser is not None:
            self.record(recipe, corpus=corpus.digest)
            return denoiser
        tokenizer = train_tokenizer(corpus.train, kind=recipe.text.tokenizer, vocab_size=recipe.text.vocab_size)
        model = initial_denoiser(recipe, tokenizer).to(self.device)
        train, held_out = self.stream(corpus.train, tokenizer), self.stream(corpus.held_out, tokenizer)
        for tokens in (train, held_out):  # a text that is too short leaves nothing behind
            windows(tokens, length=model.config.span, max_windows=1)
        self.record(recipe, corpus=corpus.digest)
        tokenizer.save(self.path / "tokenizer.json")
        self.record(recipe, tokenizer=file_hash(self.path / "tokenizer.json"))
        train_denoiser(
            model,
            train,
            held_out,
            config=recipe.denoiser.training,
            checkpoint_path=self.checkpoint("denoiser"),
            log_dir=self.log("denoiser"),
            progress=self.progress,
        )
        model.eval().save(self.path / "denoiser")
        return model

    @stage
    def cache(self, recipe: Recipe) -> tuple[LogitCache, LogitCache]:
        """Cache the denoiser's predictions on training blocks and on held-out blocks; continued if interrupted."""
        denoiser, corpus, features = self.base_denoiser(), self.claimed_corpus(recipe), recipe.circuit.needs_features
        options: dict[str, Any] = {"seed": recipe.seed, "progress": self.progress, "device": self.device}
        options |= {"block_length": recipe.denoiser.block_length, "features": features}
        caches = []
        for name, data in zip(("train", "held-out"), self._fitted_windows(recipe, corpus, denoiser), strict=True):
            folder = self.path / "cache" / f"{name}-{len(data)}{'-features' if features else ''}"
            cache = cache_logits(denoiser, data, folder, **options) if self.is_first else None
            self.processes.wait()
            caches.append(cache or LogitCache.open(folder))
        return caches[0], caches[1]

    def _fitted_windows(self, recipe: Recipe, corpus: Corpus, denoiser: TransformerDenoiser) -> tuple[Tensor, Tensor]:
        """Return windows of the training text, drawn by the recipe's seed, and of the held-out text."""
        span, generator = denoiser.config.span, torch.Generator().manual_seed(recipe.seed)
        count = recipe.circuit.cached_blocks
        train = random_windows(self.stream(corpus.train), length=span, num_windows=count, generator=generator)
        return train, windows(self.stream(corpus.held_out), length=span, max_windows=256)

    @stage
    def fit(self, recipe: Recipe) -> CoupledHead:
        """Fit the circuit: maximum likelihood on blocks, then the coupled objective on cached predictions.

        After that denoiser and head are trained together, where the recipe says so; the denoiser that was there stays.
        A circuit of other settings that is there stays until the new one is done.
        """
        corpus = self.claim(recipe)
        self.record(recipe, corpus=corpus.digest)
        settings = origin(recipe)
        names = [f"{name}-{digest(json.dumps(settings))[:8]}" for name in ("likelihood", "head", JOINT)]
        head = self.finished("head", lambda: self.head() if was_fitted(self.path, recipe) else None)
        if self.processes.is_any(head is None):
            head = self._fit(recipe, corpus, settings, list(map(self.checkpoint, names)))
        if self.is_first:
            self._tidy(names)
        assert head is not None
        return head

    def _fit(self, recipe: Recipe, corpus: Corpus, settings: Any, checkpoints: Sequence[Path]) -> CoupledHead:
        pc = self._fit_likelihood(recipe, corpus, checkpoints[0])
        train, held_out = self.cache(recipe)
        head = initial_head(copy.deepcopy(pc), recipe.circuit, train)
        options: dict[str, Any] = {
            "process_group": self.processes.group,
            "log_dir": self.log("head"),
            "progress": self.progress,
        }
        config = recipe.circuit.training
        text = self._blocks(recipe, corpus) if config.likelihood_weight else None
        fit_coupled(head, train, held_out, text=text, config=config, checkpoint_path=checkpoints[1], **options)
        joint = None
        if recipe.circuit.joint is not None:
            joint = self._fit_jointly(recipe, corpus, head, recipe.circuit.joint, checkpoints[2])
        if self.is_first:
            if joint is not None:
                joint.save(self.path / joint_name(settings))
            ct.save(pc, self.path / "likelihood", made_from=settings)
            head.save(self.path / "head", made_from=settings)
            (self.path / STAMP).unlink(missing_ok=True)
        return head

    def _tidy(self, names: Sequence[str]) -> None:
        """Remove what the fit of a head leaves behind, and what is of heads before it."""
        remove_folder(self.path / "cache")
        own = joint_name(made_from(self.path / "head", HEAD))
        for place in self.path.glob(f"{JOINT}-*"):
            if place.name != own:
                remove_folder(place)
        for place in (self.path / "checkpoints").glob("*"):  # of other settings
            if place.stem.startswith(("likelihood", "head", JOINT)) and place.stem not in names:
                (remove_folder if place.is_dir() else Path.unlink)(place)

    def _fit_jointly(
        self, recipe: Recipe, corpus: Corpus, head: CoupledHead, config: JointTraining, checkpoint: Path
    ) -> TransformerDenoiser:
        """Train a copy of the denoiser together with the head, and return it."""
        denoiser = self.base_denoiser()
        train, held_out = self._fitted_windows(recipe, corpus, denoiser)
        options: dict[str, Any] = {
            "process_group": self.processes.group,
            "log_dir": self.log(JOINT),
            "progress": self.progress,
        }
        fit_jointly(denoiser, head, train, held_out, config=config, checkpoint_path=checkpoint, **options)
        return denoiser

    def _blocks(self, recipe: Recipe, corpus: Corpus) -> Tensor:
        """Draw the plain blocks of a recipe from the training text."""
        length, count = recipe.denoiser.block_length, recipe.circuit.likelihood_blocks
        generator = torch.Generator().manual_seed(recipe.seed)
        return random_windows(self.stream(corpus.train), length=length, num_windows=count, generator=generator)

    def _fit_likelihood(self, recipe: Recipe, corpus: Corpus, checkpoint: Path) -> CompiledCircuit:
        settings, length = recipe.circuit, recipe.denoiser.block_length
        blocks = self._blocks(recipe, corpus)
        held_out = windows(self.stream(corpus.held_out), length=length, max_windows=512)
        candidates = structures_of(settings, length, self.tokenizer().vocab_size)
        options: dict[str, Any] = {
            "optimizer": ct.learning.Anemone(seed=recipe.seed, process_group=self.processes.group),
            "num_epochs": settings.likelihood_epochs,
            "batch_size": 512,
            "validation_data": held_out,
            "progress": self.progress,
        }
        if len(candidates) > 1:
            where: dict[str, Any] = {"device": self.device, "folder": checkpoint.with_suffix("")}
            return ct.learning.choose_structure(candidates, blocks, seed=recipe.seed, **where, **options).pc
        pc = ct.compile(candidates["hmm"], device=self.device, seed=recipe.seed)
        for left in range(settings.num_splits, 0, -1):  # a run that goes on finds what it had fitted
            place = checkpoint.with_name(f"{checkpoint.stem}-{left}{checkpoint.suffix}")
            ct.learning.fit(pc, blocks, checkpoint_path=place, **options)
            pc = ct.transforms.grow(pc, noise=_NOISE_OF_COPIES, seed=recipe.seed + left)
        ct.learning.fit(pc, blocks, checkpoint_path=checkpoint, log_dir=self.log("likelihood"), **options)
        return pc

    @stage
    def evaluate_gap(self, recipe: Recipe) -> GapTable:
        """Measure the gap table on held-out windows, and draw it; results/gap.json, gap.txt and gap.png."""
        from diffusion.evaluation.plots import draw_gap

        denoiser = self.denoiser()
        origins = [made_from(self.path / name, format) for name, format in (("likelihood", CIRCUIT), ("head", HEAD))]
        if None not in origins and origins[0] != origins[1]:
            raise CheckpointError(
                f"{self.path}: expected likelihood and head of the same settings, got different ones: a fit was "
                f"interrupted; go on with `unfactor fit --out {self.path}`"
            )
        table = misspecification_gap(
            denoiser,
            self.head(),
            self.held_out_windows(recipe, denoiser.config.span, recipe.gap_windows),
            circuit_alone=ct.load(self.path / "likelihood", device=self.device),
            seed=recipe.seed,
            folder=self.path / "checkpoints" / "gap",
            progress=self.progress,
        )
        self.keep(table, "gap")
        draw_gap(table, self.results / "gap.png", title=f"corpus: {Path(recipe.text.corpus).name}")
        return table

    @stage
    def evaluate_few_steps(self, recipe: Recipe, *, sketch: Sequence[int] = ()) -> FewStepCurve:
        """Measure text written in few calls per block on held-out prompts, and draw it; results/few_steps.*.

        Each point of the whole curve is kept in checkpoints/few_steps/, where an interrupted run goes on.

        Args:
            recipe: of the folder.
            sketch: denoiser calls per block of a first look, :func:`~diffusion.evaluation.few_step_sketch`; none of
                them: the whole curve, from 1 call to 32.
        """
        from diffusion.evaluation.plots import draw_few_step_curve

        denoiser = self.denoiser()
        data, rest = windows_and_rest(
            self.held_out_stream(recipe), length=denoiser.config.span, max_windows=max(2, recipe.texts)
        )
        models = (denoiser, self.head(), data.to(self.device), rest)
        options: dict[str, Any] = {"seed": recipe.seed, "progress": self.progress}
        steps = [count for count in sketch or STEPS if count <= denoiser.config.block_length]
        if sketch:
            table = few_step_sketch(*models, steps=steps, **options)
        else:
            folder = self.path / "checkpoints" / "few_steps"
            table = few_step_curve(*models, steps=steps, folder=folder, **options)
        self.keep(table, "few_steps")
        draw_few_step_curve(table, self.results / "few_steps.png")
        return table

    @stage
    def evaluate_arithmetic(
        self,
        recipe: Recipe,
        *,
        decode: DecodeMode = "latent",
        strategy: Strategy = "low_confidence",
        temperature: float = 1.0,
    ) -> FewStepTable:
        """Measure the share of right arithmetic at 1 to 32 steps per block, and draw it; results/arithmetic.*.

        Raises:
            ArgumentError: the folder's corpus is not the arithmetic one.
        """
        from diffusion.evaluation.plots import draw_few_steps

        if recipe.text.corpus != "arithmetic":
            raise ArgumentError(
                f"corpus: right and wrong are known for 'arithmetic' only, this is {recipe.text.corpus!r}"
            )
        denoiser, tokenizer = self.denoiser(), self.tokenizer()
        shape = denoiser.config

        def is_right(prompt: Tensor, generated: Tensor) -> bool:
            texts = (tokenizer.decode(part.tolist()) for part in (prompt, generated))
            return check_arithmetic(*texts).ok

        table = few_step_quality(
            denoiser,
            self.head(),
            self.held_out_windows(recipe, shape.span, recipe.texts)[:, : shape.context_length],
            is_right,
            criterion="all lines well-formed and right",
            steps=[count for count in STEPS if count <= shape.block_length],
            decode=decode,
            strategy=strategy,
            temperature=temperature,
            seed=recipe.seed,
            folder=self.path / "checkpoints" / "arithmetic",
            progress=self.progress,
        )
        self.keep(table, "arithmetic")
        draw_few_steps(table, self.results / "arithmetic.png")
        return table

    @stage
    def tune(self, recipe: Recipe, *, with_temperature: bool = False, num_steps: int | None = None) -> Tuning:
        """Choose how the head is decoded with on held-out text, and store it in it; results/tuning.json, .txt.

        What was measured is kept in checkpoints/tuning/, where an interrupted run goes on.

        Args:
            recipe: of the folder.
            with_temperature: whether the temperature is chosen too.
            num_steps: denoiser calls a block at which modes and strategies are compared; None: they are not.
        """
        denoiser, head = self.denoiser(), self.head()
        tuning = tune(
            denoiser,
            head,
            self.held_out_windows(recipe, denoiser.config.span, recipe.gap_windows),
            temperatures=TEMPERATURES if with_temperature else None,
            num_steps=num_steps,
            seed=recipe.seed,
            folder=self.path / "checkpoints" / "tuning",
            progress=self.progress,
        )
        tuning.apply(head)
        head.save(self.path / "head", made_from=made_from(self.path / "head", HEAD))
        self.keep(tuning, "tuning")
        return tuning


__all__ = ["HELD_OUT", "PRESETS", "CircuitRecipe", "DenoiserRecipe", "Recipe", "TextRecipe", "Workspace"]
