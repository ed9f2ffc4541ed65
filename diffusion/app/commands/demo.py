"""The demonstration: what a circuit returns to a small denoiser, with the models that are shipped or trained anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from diffusion.app.commands.common import DeviceName, FieldName, Out, Quiet, app, open_workspace, preset_recipe
from diffusion.app.models import DEFAULT_OUT
from diffusion.app.terminal import conclusion, print_annotations, print_curve, print_gap, print_texts, say
from diffusion.errors import ArgumentError

# so that all of it is over within 90 seconds on two busy cores
_STEPS = (1, 2, 4, 8)
_CURVE_TEXTS, _ANNOTATION_TEXTS, _GAP_WINDOWS = 16, 48, 16


@app.command()
def demo(
    out: Out = DEFAULT_OUT,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the models first, in place of those that are shipped.")
    ] = False,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="With --from-scratch: 'gsm8k' (downloaded), 'embedded' (Python's documentation), 'arithmetic', or a "
            ".txt/.jsonl file, also .gz.",
            show_default="gsm8k; embedded for other presets",
        ),
    ] = None,
    field: FieldName = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="With --from-scratch: 'gsm8k' (that of the shipped models, hours), 'default' (minutes), 'large' "
            "(better figures, about 10 minutes), or 'tiny' (a test).",
            show_default="gsm8k; default for 'embedded' and 'arithmetic'",
        ),
    ] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Show what a circuit returns to a small denoiser: with shipped models in a minute, or after training some."""
    workspace = open_workspace(out, device, quiet)
    if from_scratch:
        recipe = _chosen_recipe(corpus, field, preset)
        workspace.train(recipe)
        workspace.fit(recipe)
    else:
        from diffusion.app.packing import unpack

        for name, value in (("corpus", corpus), ("field", field), ("preset", preset)):
            if value is not None:
                raise ArgumentError(
                    f"{name}: expected none, for the shipped models are trained, got {value!r}; train on it with "
                    "--from-scratch"
                )
        unpack(out)
        recipe = workspace.recipe()
    _show(workspace, recipe)
    say(
        f"unfactor generate --out {out} --prompt 'She has ' --steps 8 --temperature 1; unfactor evaluate --out {out} "
        "for tighter intervals; unfactor demo --from-scratch --corpus with a text of your own",
        title="Next:",
    )


def _chosen_recipe(corpus: str | None, field: str | None, preset: str | None) -> Any:
    """Return the recipe that the options name: by default that of the shipped models."""
    from diffusion.text.gsm8k import FIELD

    if preset is None:
        preset = "default" if corpus in ("embedded", "arithmetic") else "gsm8k"
    if corpus is None:
        corpus = "gsm8k" if preset == "gsm8k" else "embedded"
    if field is None and preset == "gsm8k" and (corpus == "gsm8k" or ".jsonl" in corpus):
        field = FIELD
    return preset_recipe(preset, corpus, field)


def _show(workspace: Any, recipe: Any) -> None:
    """Show and measure, one after the other, and write the page with all of it."""
    from diffusion.app.measures import evaluate_annotations
    from diffusion.app.showing import fill_hole, report, report_sections, show_blocks

    few_texts = replace(recipe, texts=min(recipe.texts, _CURVE_TEXTS))
    more_texts = replace(recipe, texts=min(recipe.texts, _ANNOTATION_TEXTS))
    shown = show_blocks(workspace, recipe)
    print_texts(shown.cells(), f"The same {recipe.denoiser.block_length} tokens in one call, at temperature 1")
    curve = workspace.evaluate_few_steps(few_texts, sketch=_STEPS)
    print_curve(curve)
    say(f"(the picture is {workspace.results / 'few_steps.png'})")
    annotations = evaluate_annotations(workspace, more_texts, steps=_STEPS)
    if annotations is not None:
        print_annotations(annotations)
    elif recipe.text.corpus == "arithmetic":
        from diffusion.app.terminal import print_few_steps

        print_few_steps(workspace.evaluate_arithmetic(more_texts))
    gap = workspace.evaluate_gap(replace(recipe, gap_windows=min(recipe.gap_windows, _GAP_WINDOWS)))
    print_gap(gap)
    infilled = fill_hole(workspace, recipe)
    if infilled is not None:
        print_texts(infilled.cells(), f"A hole in a held-out text; the constraint is {infilled.pattern}")
    parts = {"shown": shown, "curve": curve, "annotations": annotations, "gap": gap, "infilled": infilled}
    report(workspace, report_sections(workspace, **parts), shown)
    say(conclusion(gap.rows[-1]), title="\nShown:")
    say(
        f"to look at: {workspace.results / 'report.html'}; tables and pictures are beside it, the models in "
        f"{workspace.path}/",
        title="Files:",
    )
