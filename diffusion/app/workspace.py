"""From a corpus to a denoiser with a circuit as its output layer: stages that keep their results in one folder.

    recipe.json         what the folder was made from, with hashes of the text and the tokenizer
    tokenizer.json      text to tokens
    denoiser/           the masked-token predictor
    likelihood/         the circuit fitted by maximum likelihood
    head/               the output layer: circuit and conditioners, fitted on the coupled objective
    checkpoints/        of runs that were interrupted
    cache/              the denoiser's predictions that the circuit trains on
    results/            tables and pictures
    held_out.jsonl.gz   in a folder that was packed: held-out documents, in place of the whole text

Every stage is skipped when its result is there, and continued when it was interrupted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuits as ct
from circuits import CompiledCircuit
from circuits.arguments import checked_device
from circuits.files import file_hash, replace_file
from diffusion._json import write_json
from diffusion.app.fitting import initial_denoiser, initial_head, was_fitted
from diffusion.app.models import Models
from diffusion.app.recipe import PRESETS, CircuitRecipe, DenoiserRecipe, Recipe, TextRecipe, read_recipe, write_recipe
from diffusion.app.sources import check_corpus, corpus_of, encoded_corpus, load_tokenizer, read_digests
from diffusion.decoding.config import DecodeMode, Strategy
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.evaluation.annotations import AnnotationTable
from diffusion.evaluation.few_step_curve import FewStepCurve, few_step_curve, few_step_sketch
from diffusion.evaluation.few_steps import FewStepTable, few_step_quality
from diffusion.evaluation.gap import GapTable, misspecification_gap
from diffusion.evaluation.tuning import TEMPERATURES, Tuning, tune
from diffusion.head import CoupledHead
from diffusion.text.corpus import (
    Corpus,
    check_arithmetic,
    join_documents,
    load_corpus,
    random_windows,
    windows,
    windows_and_rest,
)
from diffusion.text.tokenizer import TextTokenizer, train_tokenizer
from diffusion.training.circuit import fit_coupled
from diffusion.training.denoiser import train_denoiser
from diffusion.training.logit_cache import LogitCache, cache_logits

STEPS = (1, 2, 4, 8, 16, 32)
"""Denoiser calls per block that are compared, those that a block has room for."""
HELD_OUT = "held_out.jsonl.gz"
"""The held-out documents of a folder that was packed; its texts are called "text"."""
_LEARNT = ("denoiser", "likelihood", "head", "circuit.json", "checkpoints", "cache")


class Workspace:
    """A folder with the results of the stages.

    Args:
        path: the folder; created by the first stage.
        progress: draw a progress bar for every stage.
        device: where denoiser and circuit run.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, progress: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.path = Path(path)
        self.progress = progress
        self.device = checked_device("device", device)

    @property
    def results(self) -> Path:
        """Where tables and pictures go."""
        return self.path / "results"

    def train(self, recipe: Recipe) -> TransformerDenoiser:
        """Train tokenizer and denoiser, or load them if they are there.

        Raises:
            CheckpointError: the folder holds a denoiser of another recipe.
            CorpusError: the corpus cannot be read, is too short, or is not the one that the folder was made from.
        """
        corpus = self._claim(recipe)
        if (self.path / "denoiser").exists():
            return self.denoiser()
        tokenizer = train_tokenizer(corpus.train, kind=recipe.text.tokenizer, vocab_size=recipe.text.vocab_size)
        tokenizer.save(self.path / "tokenizer.json")
        self._record(recipe, corpus=corpus.digest, tokenizer=file_hash(self.path / "tokenizer.json"))
        model = initial_denoiser(recipe, tokenizer).to(self.device)
        train_denoiser(
            model,
            self._stream(corpus.train),
            self._stream(corpus.held_out),
            config=recipe.denoiser.training,
            checkpoint_path=self._checkpoint("denoiser"),
            progress=self.progress,
        )
        model.eval().save(self.path / "denoiser")
        return model

    def cache(self, recipe: Recipe) -> tuple[LogitCache, LogitCache]:
        """Cache the denoiser's predictions on training blocks and on held-out blocks; continued if interrupted."""
        denoiser, corpus = self.denoiser(), self._corpus(recipe)
        span, shape = denoiser.config.span, recipe.denoiser
        generator = torch.Generator().manual_seed(recipe.seed)
        train = random_windows(
            self._stream(corpus.train), length=span, num_windows=recipe.circuit.cached_blocks, generator=generator
        )
        held_out = windows(self._stream(corpus.held_out), length=span, max_windows=256)
        caches, features = [], recipe.circuit.has_potentials
        for name, data in (("train", train), ("held-out", held_out)):
            folder = self.path / "cache" / f"{name}-{len(data)}{'-features' if features else ''}"
            caches.append(
                cache_logits(
                    denoiser,
                    data,
                    folder,
                    block_length=shape.block_length,
                    features=features,
                    seed=recipe.seed,
                    progress=self.progress,
                    device=self.device,
                )
            )
        return caches[0], caches[1]

    def fit(self, recipe: Recipe) -> CoupledHead:
        """Fit the circuit: maximum likelihood on blocks, then the coupled objective on cached predictions."""
        self._claim(recipe)
        stamp = self.path / "circuit.json"
        if stamp.exists() and was_fitted(stamp, recipe):
            return self.head()
        if stamp.exists():  # another circuit for the same denoiser: its checkpoints are of no use
            for name in ("likelihood", "head"):
                self._checkpoint(name).unlink(missing_ok=True)
            stamp.unlink()  # last: without it, what is there would be gone on from
        pc = self._fit_likelihood(recipe)
        train, held_out = self.cache(recipe)
        head = initial_head(pc, recipe.circuit, train)
        fit_coupled(
            head,
            train,
            held_out,
            config=recipe.circuit.training,
            checkpoint_path=self._checkpoint("head"),
            progress=self.progress,
        )
        head.save(self.path / "head")
        write_json(stamp, {"circuit": asdict(recipe.circuit), "seed": recipe.seed})
        shutil.rmtree(self.path / "cache")
        return head

    def _fit_likelihood(self, recipe: Recipe) -> CompiledCircuit:
        settings, corpus = recipe.circuit, self._corpus(recipe)
        length = recipe.denoiser.block_length
        generator = torch.Generator().manual_seed(recipe.seed)
        blocks = random_windows(
            self._stream(corpus.train), length=length, num_windows=settings.likelihood_blocks, generator=generator
        )
        held_out = windows(self._stream(corpus.held_out), length=length, max_windows=512)
        hmm = ct.structures.hmm(length, settings.num_states, self.tokenizer().vocab_size)
        pc = ct.compile(hmm, device=self.device, seed=recipe.seed)
        ct.learning.fit(
            pc,
            blocks,
            optimizer="anemone",
            num_epochs=settings.likelihood_epochs,
            batch_size=512,
            validation_data=held_out,
            checkpoint_path=self._checkpoint("likelihood"),
            seed=recipe.seed,
            progress=self.progress,
        )
        ct.save(pc, self.path / "likelihood")
        return pc

    def evaluate_gap(self, recipe: Recipe) -> GapTable:
        """Measure the gap table on held-out windows, and draw it; results/gap.json, gap.txt and gap.png."""
        from diffusion.evaluation.plots import draw_gap

        denoiser = self.denoiser()
        data = windows(self.held_out_stream(recipe), length=denoiser.config.span, max_windows=recipe.gap_windows)
        table = misspecification_gap(
            denoiser,
            self.head(),
            data.to(self.device),
            circuit_alone=ct.load(self.path / "likelihood", device=self.device),
            seed=recipe.seed,
            progress=self.progress,
        )
        self.keep(table, "gap")
        draw_gap(table, self.results / "gap.png", title=f"corpus: {Path(recipe.text.corpus).name}")
        return table

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
        length, context = denoiser.config.block_length, denoiser.config.context_length
        data = windows(self.held_out_stream(recipe), length=denoiser.config.span, max_windows=recipe.texts)

        def is_right(prompt: Tensor, generated: Tensor) -> bool:
            texts = (tokenizer.decode(part.tolist()) for part in (prompt, generated))
            return check_arithmetic(*texts).ok

        table = few_step_quality(
            denoiser,
            self.head(),
            data[:, :context].to(self.device),
            is_right,
            criterion="all lines well-formed and right",
            steps=[count for count in STEPS if count <= length],
            decode=decode,
            strategy=strategy,
            temperature=temperature,
            seed=recipe.seed,
            progress=self.progress,
        )
        self.keep(table, "arithmetic")
        draw_few_steps(table, self.results / "arithmetic.png")
        return table

    def models(self, head: CoupledHead | None = None) -> Models:
        """Return what decodes: the denoiser, the tokenizer, and a head if one is given."""
        return Models(
            name=str(self.path), denoiser=self.denoiser(), tokenizer=self.tokenizer(), head=head, device=self.device
        )

    def tune(self, recipe: Recipe, *, with_temperature: bool = False) -> Tuning:
        """Choose when the circuit is used on held-out text, and store it in the head; results/tuning.json, .txt.

        Args:
            recipe: of the folder.
            with_temperature: whether the temperature is chosen too.
        """
        denoiser, head = self.denoiser(), self.head()
        data = windows(self.held_out_stream(recipe), length=denoiser.config.span, max_windows=recipe.gap_windows)
        tuning = tune(
            denoiser,
            head,
            data.to(self.device),
            temperatures=TEMPERATURES if with_temperature else None,
            seed=recipe.seed,
            progress=self.progress,
        )
        tuning.apply(head)
        head.save(self.path / "head")
        self.keep(tuning, "tuning")
        return tuning

    def held_out_prompts(self, recipe: Recipe, count: int) -> list[str]:
        """Return the beginnings of some held-out documents, one context length each; the recipe's seed chooses."""
        tokenizer, length = self.tokenizer(), recipe.denoiser.context_length
        documents = [document for document in self.held_out(recipe) if len(tokenizer.encode(document)) > length]
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        return [tokenizer.decode(tokenizer.encode(documents[index])[:length]) for index in order[:count]]

    def recipe(self) -> Recipe:
        """Return what the folder was made from.

        Raises:
            CheckpointError: there is no such folder, or its recipe cannot be read.
        """
        path = self.path / "recipe.json"
        if not path.exists():
            raise CheckpointError(f"{self.path} holds no model; make one with `unfactor train --out {self.path}`")
        return read_recipe(path)

    def denoiser(self) -> TransformerDenoiser:
        """Load the denoiser; raises CheckpointError if it is not there."""
        self.recipe()
        if not (self.path / "denoiser").exists():
            raise CheckpointError(f"{self.path} holds no denoiser yet; run `unfactor train --out {self.path}`")
        return TransformerDenoiser.load(self.path / "denoiser", device=self.device).eval()

    def tokenizer(self) -> TextTokenizer:
        """Load the tokenizer; raises CheckpointError if it is not there, or not as it was written."""
        return load_tokenizer(self.path)

    def head(self) -> CoupledHead:
        """Load the output layer, active at every mask ratio until tuned; raises CheckpointError if it is not there."""
        self.recipe()
        if not (self.path / "head").exists():
            raise CheckpointError(f"{self.path} holds no circuit yet; run `unfactor fit --out {self.path}`")
        return CoupledHead.load(self.path / "head", device=self.device)

    def _claim(self, recipe: Recipe) -> Corpus:
        """Write the recipe into a folder; refuse one that has learnt from another text, or as another denoiser."""
        corpus = corpus_of(recipe)  # one that cannot be read leaves no folder behind
        has_learnt = any((self.path / name).exists() for name in _LEARNT)
        if (self.path / "recipe.json").exists() and has_learnt:
            found = self.recipe()
            if read_digests(self.path).get("corpus") == corpus.digest:  # wherever it lies now
                found = replace(found, text=replace(found.text, corpus=recipe.text.corpus))
            for part in ("text", "denoiser", "seed"):
                if getattr(found, part) != getattr(recipe, part):
                    raise CheckpointError(
                        f"{self.path} was made with another {part} ({getattr(found, part)}): choose another --out"
                    )
            check_corpus(self.path, corpus)
        elif self.path.exists() and any(self.path.iterdir()) and not (self.path / "recipe.json").exists():
            raise CheckpointError(f"{self.path} is not empty and was not made by unfactor: choose another --out")
        self.results.mkdir(parents=True, exist_ok=True)
        self._record(recipe, corpus=corpus.digest)
        return corpus

    def _record(self, recipe: Recipe, **digests: str) -> None:
        write_recipe(recipe, self.path / "recipe.json", read_digests(self.path) | digests)

    def _corpus(self, recipe: Recipe) -> Corpus:
        corpus = corpus_of(recipe)
        check_corpus(self.path, corpus)
        return corpus

    def held_out(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the documents that training did not see: all of them, or those that a packed folder has."""
        packed = self.path / HELD_OUT
        if packed.exists():
            return load_corpus(packed, field="text", held_out_fraction=0.0).train
        return self._corpus(recipe).held_out

    def held_out_stream(self, recipe: Recipe) -> Tensor:
        """Return the tokens of :meth:`held_out`, with the end of each."""
        return self._stream(self.held_out(recipe))

    def _stream(self, documents: tuple[str, ...]) -> Tensor:
        tokenizer = self.tokenizer()
        return join_documents(encoded_corpus(self.path, documents, tokenizer), eos_id=tokenizer.eos_id)

    def keep(self, table: GapTable | FewStepTable | FewStepCurve | AnnotationTable | Tuning, name: str) -> None:
        """Write a table to the results, as JSON and as text."""
        table.save(self.results / f"{name}.json")
        with replace_file(self.results / f"{name}.txt") as temporary:
            temporary.write_text(f"{table}\n")

    def _checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.safetensors"


__all__ = ["PRESETS", "CircuitRecipe", "DenoiserRecipe", "Recipe", "TextRecipe", "Workspace"]
