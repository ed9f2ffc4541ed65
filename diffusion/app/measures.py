"""Measures of a folder's models beside those of the workspace: what only some texts can be judged by."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion.app.recipe import Recipe
from diffusion.app.workspace import STEPS, Workspace
from diffusion.evaluation.annotations import AnnotationTable, annotation_quality, check_annotations


def evaluate_annotations(
    workspace: Workspace, recipe: Recipe, *, steps: Sequence[int] = STEPS
) -> AnnotationTable | None:
    """Measure the share of right calculator annotations by calls per block, and draw it; results/annotations.*.

    None where the held-out text has no right annotation.
    """
    from diffusion.evaluation.plots import draw_annotations

    if not any(check_annotations("", document).num_right for document in workspace.held_out(recipe)):
        return None
    denoiser, tokenizer = workspace.denoiser(), workspace.tokenizer()
    table = annotation_quality(
        denoiser,
        workspace.head(),
        workspace.held_out_windows(recipe, denoiser.config.span, recipe.texts),
        lambda ids: tokenizer.decode(ids.tolist()),
        steps=[count for count in steps if count <= denoiser.config.block_length],
        seed=recipe.seed,
        progress=workspace.progress,
    )
    workspace.keep(table, "annotations")
    draw_annotations(table, workspace.results / "annotations.png")
    return table
