"""What a packed folder says about itself: how it was made, what was measured, and whose text it learnt from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion.app.recipe import Recipe
from diffusion.text.gsm8k import LICENCE, URL

if TYPE_CHECKING:
    from diffusion.app.workspace import Workspace

_TABLES = {
    "gap": "Perplexity of masked tokens, and the share of the gap between one step and one token at a time that the "
    "circuit closes (in nats)",
    "few_steps": "Text in few calls: loss per token of what was written, judged one token at a time by the denoiser "
    "itself, distinct n-grams, and trigram divergence to held-out text",
    "annotations": "Calculator annotations that are right, as rational numbers",
}

_CARD = """\
# {title}

A masked-token predictor and a circuit as its output layer, small enough to come with the library. For demonstrations
and tests of decoding: it writes text in the form of its corpus, and does not solve problems.

## What it is

- Tokens: {tokens}.
- Denoiser (`denoiser/`): a bidirectional transformer, {layers} layers of width {width}, {heads} heads, {parameters:,}
  parameters; {context} tokens of context and a block of {block}. Weights are stored in float16 and loaded in float32.
- Head (`head/`): a hidden Markov model of {states} states over a block of {block} tokens{conditioners}; float32.
- The same circuit before it was fitted together with the denoiser (`likelihood/`), for comparison.
- {num_held_out} documents that training never saw (`held_out.jsonl.gz`).

## How it was made

From {corpus}. One document in ten is held out, chosen by a hash of its text and seed {seed}.

- Denoiser: {updates:,} updates of {batch} windows, AdamW, learning rate {rate:g}, loss `{loss}`, schedule `{schedule}`.
- Circuit: {epochs} passes of Anemone over {blocks:,} training blocks, then {circuit_updates:,} updates of Adam on the
  coupled objective over {cached:,} cached predictions.

The same again: `{command}`

## What was measured

On held-out documents, with 95 % intervals.

{results}
{licence}"""

_LICENCE_OF_TEXT = f"## Licence of the text\n\nGSM8K (Cobbe et al. 2021, arXiv 2110.14168):\n\n{LICENCE}"


def model_card(recipe: Recipe, workspace: Workspace, *, num_held_out: int) -> str:
    """Return the card of a folder's models, as Markdown; every number in it is the recipe's or a table's."""
    is_gsm8k = recipe.text.corpus == "gsm8k"
    denoiser, circuit, training = recipe.denoiser, recipe.circuit, recipe.denoiser.training
    config, name = workspace.denoiser().config, "GSM8K answers" if is_gsm8k else recipe.text.corpus
    kinds = {"bpe": f"{config.vocab_size:,} byte pairs", "characters": f"{config.vocab_size:,} characters"}
    return _CARD.format(
        title=f"A small denoiser of {name}, with a circuit",
        tokens=kinds[recipe.text.tokenizer],
        layers=denoiser.num_layers,
        width=denoiser.width,
        heads=denoiser.num_heads,
        parameters=workspace.denoiser().num_parameters,
        context=denoiser.context_length,
        block=denoiser.block_length,
        states=circuit.num_states,
        conditioners=_conditioners(recipe),
        num_held_out=num_held_out,
        corpus=f"the worked answers of GSM8K's training problems ({URL})" if is_gsm8k else f"the text {name}",
        seed=recipe.seed,
        updates=training.steps,
        batch=training.batch_size,
        rate=training.learning_rate,
        loss=training.loss,
        schedule=training.schedule,
        epochs=circuit.likelihood_epochs,
        blocks=circuit.likelihood_blocks,
        circuit_updates=circuit.training.steps,
        cached=circuit.cached_blocks,
        command="unfactor demo --from-scratch" + ("" if is_gsm8k else f" --corpus {recipe.text.corpus}"),
        results=_results(workspace),
        licence=_LICENCE_OF_TEXT if is_gsm8k else "",
    )


def _conditioners(recipe: Recipe) -> str:
    parts = {
        "its prediction calibrated by the noise level": recipe.circuit.has_calibration,
        "factors that give it the marginals of the denoiser": recipe.circuit.num_matching_steps > 0,
        "mixed with the plain prediction": recipe.circuit.has_mixture,
        "potentials on its states read from the denoiser's features": recipe.circuit.has_potentials,
        "transitions gated by the denoiser's features": recipe.circuit.transitions == "gates",
        "transitions moved by the denoiser's features": recipe.circuit.transitions == "low_rank",
    }
    chosen = [name for name, is_used in parts.items() if is_used]
    return ", with " + " and ".join(chosen) if chosen else ""


def _results(workspace: Workspace) -> str:
    parts = []
    for name, caption in _TABLES.items():
        path = workspace.results / f"{name}.txt"
        if path.exists():
            parts.append(f"{caption}:\n\n{path.read_text(encoding='utf-8')}")
    return "\n".join(parts) or "Nothing yet: `unfactor evaluate` measures it.\n"
