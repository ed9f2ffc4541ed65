"""lm-evaluation-harness with models of ours: its own program, and in it the model ``unfactor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusion.app.models import open_models
from diffusion.decoding.config import DecodingConfig
from diffusion.errors import ArgumentError
from diffusion.evaluation.lm_eval import DiffusionLM, HarnessOptions

NAME = "unfactor"
"""The harness's name for the model."""

_OPENING = ("device", "dtype", "revision", "trust_remote_code")
_ANSWERING = tuple(one.name for one in fields(HarnessOptions) if one.name != "config")
_DECODING = tuple(DecodingConfig.__dataclass_fields__)


class UnfactorLM(DiffusionLM):
    """The model that ``--model unfactor`` makes of ``--model_args``.

    Args:
        pretrained: a folder that ``unfactor train`` made, or a model by its name on the hub or its path.
        head: a saved head; None: the folder's, and none of a model by name.
        circuit: whether a head is used at all.
        batch_size: texts at a time.
        max_batch_size: is not used.
        others: ``dtype``, ``device``, ``revision`` and ``trust_remote_code`` of the model; and the options of
            :class:`~diffusion.evaluation.lm_eval.HarnessOptions` and of
            :class:`~diffusion.decoding.config.DecodingConfig`.
    """

    def __init__(
        self,
        pretrained: str,
        head: str | None = None,
        circuit: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        known = (*_OPENING, *_ANSWERING, *_DECODING)
        unknown = sorted(set(others) - set(known))
        if unknown:
            raise ArgumentError(
                f"model_args: expected pretrained, head, circuit, {', '.join(known)}, got {unknown[0]!r}"
            )
        if not str(batch_size).isdecimal():
            raise ArgumentError(f"batch_size: expected a whole number, got {batch_size!r}")
        options = HarnessOptions(
            config={name: others[name] for name in _DECODING if name in others},
            batch_size=int(batch_size),
            **{"progress": True, **{name: others[name] for name in _ANSWERING if name in others}},
        )
        is_folder = (Path(pretrained) / "recipe.json").exists()
        opening = {name: others[name] for name in _OPENING if others.get(name) is not None}
        opened = open_models(
            Path(pretrained) if is_folder else None,
            model=None if is_folder else str(pretrained),
            head=None if head is None else Path(head),
            use_circuit=circuit,
            **opening,
        )
        super().__init__(
            opened.denoiser, opened.tokenizer, head=opened.head, options=options, name=Path(opened.name).name
        )


def register() -> None:
    """Make the model known to the harness in this process; a second time does nothing."""
    import lm_eval.models  # noqa: F401  which fills the registry: it is filled only while it is empty
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=UnfactorLM)


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness's program with these arguments, as ``lm-eval`` would, and with the model ``unfactor`` in it."""
    from lm_eval.__main__ import cli_evaluate

    register()
    before = sys.argv
    try:
        sys.argv = ["lm-eval", *arguments]
        cli_evaluate()
    finally:
        sys.argv = before
