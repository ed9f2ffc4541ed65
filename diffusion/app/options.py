"""The options of decoding on the command line; their help is read from the tables and docstrings that define them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from diffusion.app.option_groups import GREATEST_SEED, OptionGroup, flag, optional
from diffusion.decoding import controls
from diffusion.decoding.config import MODES, STRATEGIES, DecodingConfig
from diffusion.decoding.names import STRATEGIES as OTHER_STRATEGIES
from diffusion.decoding.names import elsewhere, flags, missing, strategy_named
from diffusion.errors import ArgumentError


def described(cls: type) -> dict[str, str]:
    """Return what a class's docstring says of its attributes, by name, as plain text."""
    _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", attributes, re.MULTILINE)
    return {name: plain(text) for name, text in entries}


def plain(text: str) -> str:
    """Return a docstring's text in one line, without its markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = " ".join(text.replace("``", "").split())
    return text[:1].upper() + text[1:]


def _table(name: str, known: Mapping[str, str]) -> str:
    about = re.sub(r",? see [A-Z]+", "", described(DecodingConfig)[name])
    return f"{about} {' '.join(f'{key}: {text}.' for key, text in known.items())}"


def _summary(cls: type) -> str:
    return plain(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0])


def _named(kind: Any, name: str, help: str) -> Any:
    return optional(kind, help, f"--{name.replace('_', '-')}", *flags(name))


CONFIG_HELP = described(DecodingConfig)
"""What :class:`~diffusion.decoding.config.DecodingConfig` says of its options."""
Decode = Annotated[
    str | None,
    typer.Option(
        help=_table("decode", {name: mode.says for name, mode in MODES.items()}), show_default=DecodingConfig.decode
    ),
]
StrategyName = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        *flags("strategy"),
        help=_table("strategy", STRATEGIES | {other: f"the same as {own}" for other, own in OTHER_STRATEGIES.items()})
        + elsewhere("strategy"),
        show_default="by the temperature",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        *flags("temperature"),
        help=CONFIG_HELP["temperature"] + elsewhere("temperature"),
        show_default="the head's if that is tuned, else 0",
    ),
]

_IMPLIED = " Alone, it chooses the strategy of its name."

OPTIONS: dict[str, Any] = {
    "decode": Decode,
    "strategy": StrategyName,
    "temperature": Temperature,
    "threshold": _named(float, "threshold", CONFIG_HELP["threshold"] + _IMPLIED),
    "entropy_bound": _named(float, "entropy_bound", CONFIG_HELP["entropy_bound"] + _IMPLIED),
    "activation_threshold": _named(
        float, "activation_threshold", CONFIG_HELP["activation_threshold"] + elsewhere("activation_threshold")
    ),
    "reverse_activation": flag(
        CONFIG_HELP["reverse_activation"] + elsewhere("reverse_activation"),
        *("--reverse-activation", *flags("reverse_activation")),
    ),
    "remask": _named(float, "remask", CONFIG_HELP["remask"]),
    "top_k": _named(int, "top_k", _summary(controls.TopK)),
    "top_p": _named(float, "top_p", _summary(controls.TopP)),
    "repetition_penalty": _named(float, "repetition_penalty", _summary(controls.RepetitionPenalty)),
    "guidance": _named(float, "guidance", _summary(controls.Guidance) + elsewhere("guidance")),
    "min_length": _named(int, "min_length", _summary(controls.MinLength)),
    "logits_eos_inf": flag("Never end the text.", "--logits-eos-inf"),
    "confidence_eos_eot_inf": flag(_summary(controls.EndLast), "--confidence-eos-eot-inf"),
    "stop": Annotated[
        list[str] | None, typer.Option(help=f"{_summary(controls.StopStrings)} May be given several times.")
    ],
    "regex": optional(str, "A regular expression that all of the new text matches."),
    "keyword": Annotated[
        list[str] | None, typer.Option(help="What has to occur in the new text. May be given several times.")
    ],
    "seed": Annotated[
        int, typer.Option(min=0, max=GREATEST_SEED, help="Of all random numbers; the same seed gives the same result.")
    ],
    "circuit": flag("With or without the circuit.", "--circuit/--no-circuit"),
    "cache": flag(
        "Keep what the denoiser computed about the text before a block, where it offers that: the same text with "
        "block-causal attention, else an approximation.",
        "--cache/--no-cache",
    ),
    "dynamic_windows": flag(
        "Decode the whole text at once, in windows of the circuit's length, or block by block."
        + elsewhere("dynamic_windows")
        + elsewhere("blocks"),
        "--dynamic-windows/--blocks",
        "/".join(name for option in ("dynamic_windows", "blocks") for name in flags(option)),
    ),
    "record": optional(Path, "Draw how the text filled in: a .png, or a .gif, which is animated."),
    "stream": flag("Show the text as it fills in.", "--stream"),
} | {name[2:].replace("-", "_"): Annotated[str | None, typer.Option(name, hidden=True)] for name in missing()}
"""Options of commands that decode, by name: their types and their help."""


class DecodingOptions(OptionGroup):
    """What the command line says about decoding."""

    OPTIONS = OPTIONS
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "logits_eos_inf": False, "confidence_eos_eot_inf": False, "seed": 0, "circuit": True, "stream": False,
        "reverse_activation": False, "dynamic_windows": False, "cache": False,
    }  # fmt: skip

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the default configuration, by name; raises ArgumentError for other projects' options."""
        for name, way_out in missing().items():
            if self.given[name[2:].replace("-", "_")] is not None:
                raise ArgumentError(f"{name[2:]}: expected an option of this program, got another project's; {way_out}")
        names = DecodingConfig.__dataclass_fields__
        changes = {name: value for name, value in self.given.items() if name in names and value is not None}
        if "strategy" in changes:
            changes["strategy"] = strategy_named(changes["strategy"])
        implied = [name for name in ("threshold", "entropy_bound") if name in changes]
        return {"strategy": implied[0], **changes} if implied else changes

    def controls(self, tokenizer: Any) -> list[controls.Control]:
        """Return the controls that the options ask for, in the order in which they act."""
        makers: list[tuple[str, Callable[[Any], controls.Control]]] = [
            ("guidance", controls.Guidance),
            ("repetition_penalty", controls.RepetitionPenalty),
            ("logits_eos_inf", lambda _: controls.EndPenalty()),
            ("min_length", controls.MinLength),
            ("top_k", controls.TopK),
            ("top_p", controls.TopP),
            ("confidence_eos_eot_inf", lambda _: controls.EndLast()),
            ("stop", lambda strings: controls.StopStrings(strings, tokenizer)),
        ]
        return [make(self.given[name]) for name, make in makers if self.given[name] not in (None, False, [])]

    def constraint(self, tokenizer: Any) -> Any:
        """Return what the text has to satisfy, or None."""
        from diffusion.decoding import constraints

        parts = []
        if self.given["regex"] is not None:
            parts.append(constraints.regex(self.given["regex"], tokenizer))
        if self.given["keyword"]:
            parts.append(constraints.keywords(self.given["keyword"], tokenizer))
        return parts[0] & parts[1] if len(parts) == 2 else parts[0] if parts else None
