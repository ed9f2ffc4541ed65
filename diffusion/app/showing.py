"""What a folder's models do on held-out text, to be looked at: blocks in one call, step by step, and holes filled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from circuits.progress import progress_bar
from diffusion.app.models import Models
from diffusion.app.recipe import Recipe
from diffusion.app.report import Filling, Section, frames_of, write_report
from diffusion.app.workspace import Workspace
from diffusion.app.writing import continue_prompts
from diffusion.decoding.constraints import regex
from diffusion.decoding.generation import infill
from diffusion.evaluation.annotations import AnnotationTable
from diffusion.evaluation.few_step_curve import FewStepCurve
from diffusion.evaluation.gap import GapTable

WITHOUT, WITH = "without circuit", "with circuit"
NUM_PROMPTS = 3
_PLAYED_STEPS = 8
_OPTIONS: dict[str, Any] = {"decode": "joint", "strategy": "entropy", "temperature": 1.0}
_ANNOTATION = re.compile(r"<<[^<>]+>>")
_PATTERN = r"<<\d{1,4}[-+*/]\d{1,4}=\d{1,4}>>"
_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]()|\-]")


@dataclass(frozen=True)
class Shown:
    """The same blocks after the same held-out prompts, without and with the circuit, each in so many calls.

    The fillings are how blocks after these prompts fill in, in more calls.
    """

    num_calls: int
    prompts: tuple[str, ...]
    without: tuple[str, ...]
    coupled: tuple[str, ...]
    fillings: tuple[Filling, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """Return a table, a title row first."""
        return [("prompt", WITHOUT, WITH), *zip(self.prompts, self.without, self.coupled, strict=True)]


@dataclass(frozen=True)
class Infilled:
    """A hole between two parts of a held-out text, filled freely and so that it matches a pattern, and the truth."""

    before: str
    after: str
    pattern: str
    truth: str
    free: str
    constrained: str

    def cells(self) -> list[tuple[str, ...]]:
        """Return a table, a title row first."""
        names = ("with the circuit", "with the circuit and the constraint", "what stood there")
        holes = (self.free, self.constrained, self.truth)
        rows = [(name, f"{self.before}[{hole}]{self.after}") for name, hole in zip(names, holes, strict=True)]
        return [("hole in brackets", "text"), *rows]


def show_blocks(workspace: Workspace, recipe: Recipe) -> Shown:
    """Write a block after each of three held-out prompts in one call, and once more step by step.

    At temperature 1, decoded jointly; the recipe's seed chooses the prompts and what is drawn.
    """
    models = workspace.models(workspace.head())
    prompts = workspace.held_out_prompts(recipe, NUM_PROMPTS)
    steps = min(_PLAYED_STEPS, models.block_length)
    sides: list[tuple[str, ...]] = []
    played = []
    with progress_bar("filling blocks", 2 + 2 * steps, enabled=workspace.progress) as advance:
        for one in (replace(models, head=None), models):
            out = _written(one, prompts, recipe, num_steps=1)
            sides.append(tuple(models.tokenizer.decode(row.tolist()) for row in out.generated))
            advance()
            out = _written(one, prompts, recipe, num_steps=steps, record=True, on_step=lambda _: advance())
            mask_id = one.denoiser.spec.mask_id
            played.append([frames_of(out, one.tokenizer, mask_id, row=row) for row in range(len(prompts))])
    fillings = [
        Filling(prompt, ((WITHOUT, alone), (WITH, coupled)))
        for prompt, alone, coupled in zip(prompts, *played, strict=True)
    ]
    without, coupled = sides
    return Shown(1, tuple(prompts), without, coupled, tuple(fillings))


def _written(models: Models, prompts: list[str], recipe: Recipe, **options: Any) -> Any:
    return continue_prompts(
        models, prompts, gen_length=models.block_length, seed=recipe.seed, stop_at_eos=False, **_OPTIONS, **options
    )


def fill_hole(workspace: Workspace, recipe: Recipe) -> Infilled | None:
    """Fill a hole in a held-out document with the circuit, freely and under a constraint, one token a call.

    The hole is the first calculator annotation of a document, and the constraint that it is one of whole numbers; in
    texts without annotations it is the middle of the document's beginning, and must have the longest of its words. None
    where no document is long enough.
    """
    models = workspace.models(workspace.head())
    found = _hole(workspace, recipe)
    if found is None:
        return None
    before, truth, after, pattern = found
    encode = models.tokenizer.encode
    ids = [*encode(before), *[models.denoiser.spec.mask_id] * len(encode(truth)), *encode(after)]
    start, stop = len(encode(before)), len(encode(before)) + len(encode(truth))
    filled = []
    whole = regex(_escaped(before) + pattern + _escaped(after), models.tokenizer)
    with progress_bar("filling a hole", 2 * (stop - start), enabled=workspace.progress) as advance:
        for constraint in (None, whole):
            out = infill(
                models.denoiser,
                torch.tensor([ids], device=workspace.device),
                head=models.head,
                constraint=constraint,
                generator=torch.Generator(device=workspace.device).manual_seed(recipe.seed),
                on_step=lambda _: advance(),
                **_OPTIONS,
            )
            filled.append(models.tokenizer.decode(out.tokens[0, start:stop].tolist()))
    return Infilled(before, after, pattern, truth, *filled)


def _hole(workspace: Workspace, recipe: Recipe) -> tuple[str, str, str, str] | None:
    """Return the text before a hole, in it and after it, and the pattern for it."""
    tokenizer, length = workspace.tokenizer(), recipe.denoiser.context_length + recipe.denoiser.block_length
    documents = workspace.held_out(recipe)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    beginnings = [tokenizer.encode(documents[index])[:length] for index in order]
    for text in map(tokenizer.decode, beginnings):
        annotation = _ANNOTATION.search(text)
        if annotation is not None and annotation.start():
            return text[: annotation.start()], annotation[0], text[annotation.end() :], _PATTERN
    for ids in beginnings:
        third = len(ids) // 3
        parts = (ids[:third], ids[third : 2 * third], ids[2 * third :])
        before, truth, after = (tokenizer.decode(part) for part in parts)
        words = re.findall(r"[A-Za-z]+", truth)
        if words:
            return before, truth, after, rf"(.|\n)*{max(words, key=len)}(.|\n)*"
    return None


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda match: "\\" + match[0], text)


def report_sections(
    workspace: Workspace,
    *,
    shown: Shown | None = None,
    curve: FewStepCurve | None = None,
    annotations: AnnotationTable | None = None,
    gap: GapTable | None = None,
    infilled: Infilled | None = None,
) -> list[Section]:
    """Return the parts of a report about a folder, in the order in which the demonstration shows them."""
    results, sections = workspace.results, []
    if shown is not None:
        words = (
            "The same block after the same held-out prompts: the denoiser is called once and fills in all tokens, "
            "without the circuit each on its own, with it jointly. At temperature 1; the seed chose the prompts."
        )
        sections.append(Section("One call", words, cells=shown.cells(), is_text=True))
    if curve is not None:
        words = (
            f"{curve.num_texts} texts of {curve.block_length} tokens. Loss: negative log-likelihood per token of what "
            "was written, judged by the denoiser itself with more calls; low loss with few distinct n-grams is "
            "repetition. In brackets: 95 % intervals."
        )
        alt = "Loss per token and trigram divergence against denoiser calls, without and with the circuit"
        sections.append(
            Section("Text in few calls", words, cells=curve.cells(), picture=results / "few_steps.png", alt=alt)
        )
    if annotations is not None:
        words = (
            f"Of the calculator annotations, such as <<48/2=24>>, in {annotations.num_texts} texts: the share that is "
            "well-formed and right as rational numbers, with a 95 % interval."
            + "".join(f" {note[0].upper()}{note[1:]}." for note in annotations.notes)
        )
        alt = "Share of right annotations against denoiser calls, without and with the circuit"
        picture = results / "annotations.png"
        sections.append(Section("Annotations that are right", words, annotations.cells(), picture=picture, alt=alt))
    if gap is not None:
        notes = "".join(f" {note[0].upper()}{note[1:]}." for note in gap.notes)
        words = f"Perplexity of masked tokens on {gap.num_windows} held-out blocks, with 95 % intervals.{notes}"
        alt = "Perplexity of masked tokens by mask ratio, and the share of the gap that the circuit closes"
        sections.append(Section("The gap", words, gap.cells(), picture=results / "gap.png", alt=alt))
    if infilled is not None:
        words = f"A hole in a held-out text, filled one token a call. The constraint: {infilled.pattern}"
        sections.append(Section("A hole under a constraint", words, infilled.cells(), is_text=True))
    return sections


def report(workspace: Workspace, sections: Sequence[Section], shown: Shown | None) -> None:
    """Write results/report.html."""
    recipe = workspace.recipe()
    size = recipe.denoiser
    write_report(
        workspace.results / "report.html",
        title="A circuit as the output layer of a masked diffusion model",
        summary=(
            f"Denoiser: {size.num_layers} layers of width {size.width}; circuit: hidden Markov model of "
            f"{recipe.circuit.num_states} states over blocks of {size.block_length} tokens; text: "
            f"{recipe.text.corpus.rpartition('/')[2]}; seed {recipe.seed}."
        ),
        sections=sections,
        fillings=() if shown is None else shown.fillings,
    )
