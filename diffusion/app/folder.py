"""A folder of models: what it was made from, what is in it, and who works there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from circuits.arguments import checked_device
from circuits.digests import digest
from circuits.files import is_litter, remove_litter, replace_file
from circuits.learning.distributed import Processes
from circuits.store import LOCK, is_whole, locked, made_from
from diffusion.app.models import Models
from diffusion.app.recipe import Recipe, read_recipe, write_recipe
from diffusion.app.sources import check_corpus, corpus_of, encoded_corpus, load_tokenizer, read_digests
from diffusion.decoding.joint import JointHead
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.errors import CheckpointError
from diffusion.head import FORMAT as HEAD
from diffusion.head import CoupledHead
from diffusion.text.corpus import Corpus, join_documents, load_corpus, windows
from diffusion.text.tokenizer import TextTokenizer

JOINT = "joint"
"""What folders of denoisers that were trained together with a head begin with."""
HELD_OUT = "held_out.jsonl.gz"
"""The held-out documents of a folder that was packed; its texts are called "text"."""
_LEARNT = ("denoiser", "likelihood", "head", "circuit.json", "checkpoints", "cache")

_Stage = TypeVar("_Stage", bound=Callable[..., Any])
_Model = TypeVar("_Model")


def stage(method: _Stage) -> _Stage:
    """Let a method of a :class:`Folder` work there alone, after what killed processes left was removed."""

    @functools.wraps(method)
    def alone(self: Folder, *arguments: Any, **options: Any) -> Any:
        with self.alone():
            return method(self, *arguments, **options)

    return cast(_Stage, alone)


class Folder:
    """A folder of models.

    Args:
        path: the folder; created by what is first written into it.
        progress: draw a progress bar for every stage.
        device: where denoiser and circuit run.
        processes: those that work together; the first one keeps others out, and writes.
        log_dir: a folder for TensorBoard, with a run for every stage that learns; None: none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        progress: bool = True,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.processes = processes or Processes()
        self.progress = progress and self.is_first
        self.device = checked_device("device", device)
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._is_alone = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes, as the first of those that work together, or the only one."""
        return self.processes.rank == 0

    @property
    def results(self) -> Path:
        """Where tables and pictures go."""
        return self.path / "results"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working in the folder; raises StorageError where one does."""
        if self._is_alone or not self.is_first:
            yield
            return
        with locked(self.path):
            self._is_alone = True
            try:
                for place, _, _ in os.walk(self.path):
                    remove_litter(Path(place))
                yield
            finally:
                self._is_alone = False

    def models(self, head: JointHead | None = None) -> Models:
        """Return what decodes: the denoiser, the tokenizer, and a head if one is given."""
        return Models(
            name=str(self.path), denoiser=self.denoiser(), tokenizer=self.tokenizer(), head=head, device=self.device
        )

    def recipe(self) -> Recipe:
        """Return what the folder was made from; raises CheckpointError if that cannot be read, or is not there."""
        path = self.path / "recipe.json"
        if not path.exists():
            raise CheckpointError(
                f"{self.path}: expected a model, got none; make one with `unfactor train --out {self.path}`"
            )
        return read_recipe(path)

    def denoiser(self) -> TransformerDenoiser:
        """Load the denoiser, the one that the head was trained together with where it was."""
        joint = list(self.path.glob(f"{JOINT}-*"))  # others than the head's are of fits that were interrupted
        if joint:
            own = self.path / joint_name(made_from(self.path / "head", HEAD)) if (self.path / "head").exists() else None
            if own in joint:
                return TransformerDenoiser.load(own, device=self.device).eval()
        return self.base_denoiser()

    def base_denoiser(self) -> TransformerDenoiser:
        """Load the denoiser as `unfactor train` left it; raises CheckpointError if it is not there."""
        self.recipe()
        if not (self.path / "denoiser").exists():
            raise CheckpointError(
                f"{self.path}: expected a denoiser, got none yet; run `unfactor train --out {self.path}`"
            )
        return TransformerDenoiser.load(self.path / "denoiser", device=self.device).eval()

    def tokenizer(self) -> TextTokenizer:
        """Load the tokenizer; raises CheckpointError if it is not there, or not as it was written."""
        return load_tokenizer(self.path)

    def head(self) -> CoupledHead:
        """Load the output layer, active at every mask ratio until tuned; raises CheckpointError if it is not there."""
        self.recipe()
        if not (self.path / "head").exists():
            raise CheckpointError(
                f"{self.path}: expected a circuit, got none yet; run `unfactor fit --out {self.path}`"
            )
        return CoupledHead.load(self.path / "head", device=self.device)

    def finished(self, name: str, load: Callable[[], _Model | None]) -> _Model | None:
        """Return what a stage made, None where it has to be made: it is not there, or was damaged.

        Raises CheckpointError where it is as it was written, and of no use to this version of the library.
        """
        if not (self.path / name).exists():
            return None
        try:
            return load()
        except CheckpointError:
            if is_whole(self.path / name):
                raise
            return None

    def claim(self, recipe: Recipe) -> Corpus:
        """Return the recipe's text; refuse a folder that has learnt from another one, or as another denoiser.

        Raises:
            CheckpointError: the folder was made with another recipe, or is none of ours.
            CorpusError: the text cannot be read, or is not the one that the folder was made from.
        """
        corpus = corpus_of(recipe)
        is_ours = (self.path / "recipe.json").exists()
        if is_ours and any((self.path / name).exists() for name in _LEARNT):
            found = self.recipe()
            if read_digests(self.path).get("corpus") == corpus.digest:  # wherever it lies now
                found = replace(found, text=replace(found.text, corpus=recipe.text.corpus))
            for part in ("text", "denoiser", "seed"):
                if getattr(found, part) != getattr(recipe, part):
                    raise CheckpointError(
                        f"{self.path}: expected a folder that was made with this {part}, got one with another, "
                        f"{getattr(found, part)}; choose another --out"
                    )
            check_corpus(self.path, corpus)
        elif not is_ours:
            check_unused(self.path)
        return corpus

    def record(self, recipe: Recipe, **digests: str) -> None:
        """Write down what the folder is made from, with hashes of it."""
        if self.is_first:
            write_recipe(recipe, self.path / "recipe.json", read_digests(self.path) | digests)

    def claimed_corpus(self, recipe: Recipe) -> Corpus:
        """Return the recipe's text; raises CorpusError unless it is the one that the folder was made from."""
        corpus = corpus_of(recipe)
        check_corpus(self.path, corpus)
        return corpus

    def held_out(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the documents that training did not see: all of them, or those that a packed folder has."""
        packed = self.path / HELD_OUT
        if packed.exists():
            return load_corpus(packed, field="text", held_out_fraction=0.0).train
        return self.claimed_corpus(recipe).held_out

    def held_out_prompts(self, recipe: Recipe, count: int) -> list[str]:
        """Return the beginnings of some held-out documents, one context length each; the recipe's seed chooses.

        Where all documents are shorter, some of them one after the other.
        """
        tokenizer, length = self.tokenizer(), recipe.denoiser.context_length
        encoded = map(tokenizer.encode, self.held_out(recipe))
        beginnings = [tokens[:length] for tokens in encoded if len(tokens) > length]
        beginnings = beginnings or windows(self.held_out_stream(recipe), length=max(1, length)).tolist()
        order = torch.randperm(len(beginnings), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        return [tokenizer.decode(beginnings[index]) for index in order[:count]]

    def held_out_stream(self, recipe: Recipe) -> Tensor:
        """Return the tokens of :meth:`held_out`, with the end of each."""
        return self.stream(self.held_out(recipe))

    def held_out_windows(self, recipe: Recipe, span: int, count: int) -> Tensor:
        """Return at most so many windows of :meth:`held_out_stream`, where the models run."""
        return windows(self.held_out_stream(recipe), length=span, max_windows=count).to(self.device)

    def stream(self, documents: tuple[str, ...], tokenizer: TextTokenizer | None = None) -> Tensor:
        """Return the tokens of documents, with the end of each; of the folder's tokenizer, or of one that is given."""
        tokenizer = tokenizer or self.tokenizer()
        return join_documents(encoded_corpus(self.path, documents, tokenizer), eos_id=tokenizer.eos_id)

    def keep(self, table: Any, name: str) -> None:
        """Write a table to the results, as JSON and as text."""
        table.save(self.results / f"{name}.json")
        with replace_file(self.results / f"{name}.txt") as new:
            new.write_text(f"{table}\n")

    def log(self, name: str) -> Path | None:
        """Return the folder that a stage logs to, if it does."""
        return None if self._log_dir is None else self._log_dir / name

    def checkpoint(self, name: str) -> Path:
        """Return the file of a run that may be interrupted."""
        return self.path / "checkpoints" / f"{name}.safetensors"


def joint_name(settings: Any) -> str:
    """Return the name of the folder of a denoiser that was trained together with a head of these settings."""
    return f"{JOINT}-{digest(json.dumps(settings, sort_keys=True))[:8]}"


def check_unused(folder: Path) -> None:
    """Raise CheckpointError if a folder holds what is not ours; a run that was killed at its beginning left nothing."""
    if not folder.is_dir():
        return
    names = {name for name in os.listdir(folder) if name != LOCK and not is_litter(name)}
    if names == {"results"} and not any((folder / "results").iterdir()):  # so it was left before
        return
    if names:
        raise CheckpointError(
            f"{folder}: expected an empty folder or one of unfactor, got other files in it; choose another --out"
        )
