"""Recipes: everything that a run of the pipeline depends on, as a file, and the recipes that have a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from circuits.digests import digest
from circuits.reading import Range, record_of, short
from diffusion.coupling import Normalization
from diffusion.denoisers.transformer import Attention
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.json_files import read_json, write_json
from diffusion.text.tables import absolute_source
from diffusion.text.tokenizer import TokenizerKind
from diffusion.training.circuit import CircuitTraining
from diffusion.training.denoiser import DenoiserTraining
from diffusion.training.joint import JointTraining

FORMAT_VERSION = 1
_WAY_OUT = "delete the folder and start again"
Count = Annotated[int, Range(1, 1 << 31)]
Length = Annotated[int, Range(1, 1 << 20)]
Size = Annotated[int, Range(1, 1 << 16)]


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Which text, and how it becomes tokens.

    Attributes:
        corpus: "embedded", "arithmetic", "gsm8k", a dataset, or a path, see
            :func:`~diffusion.text.corpus.load_corpus`; a path becomes an absolute one, which means the same in every
            folder.
        field: the key of the text in a .jsonl corpus, or its column in a table.
        tokenizer: "characters", or "bpe" with ``vocab_size`` tokens.
        vocab_size: of the "bpe" tokenizer.
    """

    corpus: str = "embedded"
    field: str | None = None
    tokenizer: TokenizerKind = "characters"
    vocab_size: Length | None = None

    def __post_init__(self) -> None:
        if self.corpus not in ("embedded", "arithmetic", "gsm8k"):
            object.__setattr__(self, "corpus", absolute_source(self.corpus))


@dataclass(frozen=True, kw_only=True)
class DenoiserRecipe:
    """The denoiser's size and training; options are those of ``TransformerConfig`` and ``DenoiserTraining``."""

    context_length: Annotated[int, Range(0, 1 << 20)] = 32
    block_length: Length = 32
    max_length: Length = 512
    width: Size = 192
    num_layers: Size = 4
    num_heads: Size = 6
    attention: Attention = "bidirectional"
    training: DenoiserTraining = field(default_factory=DenoiserTraining)


Structure = Literal["hmm", "auto"]
Transitions = Literal["static", "gates", "low_rank"]


@dataclass(frozen=True, kw_only=True)
class CircuitRecipe:
    """The circuit's size and training.

    Attributes:
        structure: "hmm", or "auto": validation chooses among hidden Markov models of half, as many and twice the
            states, and of a quarter of them with tables of their own at every position.
        num_states: N of the hidden Markov model over a block.
        num_splits: how often the states of a smaller model are split in two on the way to N, and the model fitted again
            by maximum likelihood, see :func:`circuits.transforms.grow`; N is a multiple of 2 to that power.
        likelihood_blocks: plain training blocks: of the maximum-likelihood fit, and of the second term of the coupled
            one, where it has a ``likelihood_weight``.
        likelihood_epochs: passes over them.
        cached_blocks: noised blocks whose predictions the coupled fit trains on.
        is_calibrated: whether the prediction is calibrated by the noise level, see :mod:`diffusion.conditioners`.
        num_matching_steps: K > 0: in place of that, K steps towards the denoiser's own marginals, see
            :class:`~diffusion.conditioners.marginal_matching.MarginalMatching`; 0: none.
        has_mixture: whether the circuit is mixed with the plain prediction, by weights that noise and context decide,
            see :class:`~diffusion.conditioners.mixture_weights.MixtureWeights`.
        has_potentials: whether potentials on the latents are read from the denoiser's hidden states.
        transitions: "static", or what the denoiser's hidden states make of them: "gates" over ``num_tables`` tables, or
            "low_rank", an update of rank ``rank``.
        num_tables: T of the gates, with the circuit's own table.
        rank: R of the update.
        hidden_units: of a hidden layer in the networks that read hidden states; None: they are linear.
        normalization: of the product of prediction and circuit, "global" or "local", see :mod:`diffusion.coupling`.
        training: the coupled fit.
        joint: the training of denoiser and head together after it; None: the denoiser stays as it is.

    Raises:
        ArgumentError: the states cannot be halved so often, or there are several structures that would grow; or
            marginals are to be matched by a product that is normalised locally.
    """

    structure: Structure = "hmm"
    num_states: Size = 128
    num_splits: Annotated[int, Range(0, 16)] = 0
    likelihood_blocks: Count = 40_000
    likelihood_epochs: Count = 5
    cached_blocks: Count = 16_384
    is_calibrated: bool = True
    num_matching_steps: Annotated[int, Range(0, 64)] = 0
    has_mixture: bool = False
    has_potentials: bool = False
    transitions: Transitions = "static"
    num_tables: Size = 4
    rank: Size = 4
    hidden_units: Size | None = None
    normalization: Normalization = "global"
    training: CircuitTraining = field(default_factory=CircuitTraining)
    joint: JointTraining | None = None

    def __post_init__(self) -> None:
        parts = 1 << self.num_splits
        if self.num_states % parts or (parts > 1 and self.structure != "hmm"):
            raise ArgumentError(
                f"grow: expected a multiple of {parts} states of the structure hmm, to split {self.num_splits} times, "
                f"got {self.num_states} of {self.structure}; take other states, or grow less often, 0 for not at all"
            )
        if self.num_matching_steps and self.normalization != "global":
            raise ArgumentError(
                f"matching: expected 0 steps with normalization {self.normalization}, got {self.num_matching_steps}; "
                "leave it out, or normalise globally"
            )

    @property
    def has_calibration(self) -> bool:
        """Whether the prediction is calibrated: matched marginals take the calibration's place."""
        return self.is_calibrated and not self.num_matching_steps

    @property
    def needs_features(self) -> bool:
        """Whether something reads the denoiser's hidden states."""
        return self.has_potentials or self.transitions != "static"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run of the whole pipeline depends on; ``gap_windows`` and ``texts`` size the evaluation."""

    text: TextRecipe = field(default_factory=TextRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    circuit: CircuitRecipe = field(default_factory=CircuitRecipe)
    gap_windows: Length = 256
    texts: Length = 256
    seed: int = 0

    def with_text(self, corpus: str, field: str | None) -> Recipe:
        """Return the recipe for another corpus."""
        return replace(self, text=replace(self.text, corpus=corpus, field=field))


PRESETS: dict[str, Recipe] = {
    "default": Recipe(
        denoiser=DenoiserRecipe(training=DenoiserTraining(steps=3000, learning_rate=3e-3, validate_every=1000)),
        circuit=CircuitRecipe(num_states=64, training=CircuitTraining(steps=600)),
    ),
    "large": Recipe(
        denoiser=DenoiserRecipe(training=DenoiserTraining(steps=6000, validate_every=1000)),
        circuit=CircuitRecipe(likelihood_blocks=60_000, cached_blocks=24_576, training=CircuitTraining(steps=1200)),
        gap_windows=1024,
    ),
    "gsm8k": Recipe(
        text=TextRecipe(tokenizer="bpe", vocab_size=1024),
        denoiser=DenoiserRecipe(
            context_length=64,
            width=256,
            num_heads=8,
            training=DenoiserTraining(steps=12_000, batch_size=32, validate_every=1000),
        ),
        circuit=CircuitRecipe(
            likelihood_blocks=60_000, cached_blocks=24_576, has_potentials=True, training=CircuitTraining(steps=1200)
        ),
        gap_windows=256,
    ),
    "gpu": Recipe(
        text=TextRecipe(tokenizer="bpe", vocab_size=2048),
        denoiser=DenoiserRecipe(
            context_length=96,
            width=512,
            num_layers=12,
            num_heads=8,
            training=DenoiserTraining(
                steps=5000, batch_size=256, learning_rate=1e-3, warmup_steps=200, validate_every=1000
            ),
        ),
        circuit=CircuitRecipe(
            num_states=1024,
            likelihood_blocks=200_000,
            likelihood_epochs=3,
            has_potentials=True,
            training=CircuitTraining(steps=1200),
        ),
        gap_windows=1024,
    ),
    "tiny": Recipe(
        denoiser=DenoiserRecipe(
            width=48, num_layers=2, num_heads=2, training=DenoiserTraining(steps=120, batch_size=32)
        ),
        circuit=CircuitRecipe(
            num_states=32,
            likelihood_blocks=4_000,
            likelihood_epochs=2,
            cached_blocks=1_024,
            training=CircuitTraining(steps=60, batch_size=64),
        ),
        gap_windows=48,
        texts=16,
    ),
}


def read_recipe(path: Path) -> Recipe:
    """Read what :func:`write_recipe` wrote; raises CheckpointError if it is damaged, or of another format version."""
    content = recipe_content(path)
    try:
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise CheckpointError(f"format version: expected {FORMAT_VERSION}, got {short(found)}")
        return record_of(Recipe, content["recipe"], "recipe")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected format_version and recipe, got no {error}; {_WAY_OUT}") from error


def write_recipe(recipe: Recipe, path: Path, digests: Mapping[str, str]) -> None:
    """Write a recipe as JSON, with the hashes of what it was carried out with."""
    content = {"format_version": FORMAT_VERSION, "recipe": asdict(recipe), "digests": dict(digests)}
    write_json(path, content | {"sha256": _hash(content)})


def recipe_content(path: Path) -> dict[str, Any]:
    """Return what a recipe's file holds, as written; raises CheckpointError if it cannot be read, or was changed.

    Files of before have no hash.
    """
    content = read_json(path, way_out=_WAY_OUT)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object with keys, got {short(content)}; {_WAY_OUT}")
    sha256 = content.pop("sha256", None)
    if sha256 not in (None, _hash(content)):
        raise CheckpointError(
            f"{path}: expected the content that its hash is of, got another, it was changed; restore it, or delete its "
            "sha256 if you meant to"
        )
    return content


def _hash(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True))
