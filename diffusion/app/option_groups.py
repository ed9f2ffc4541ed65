"""Options that several commands of the program share, as groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

MOST = 1 << 20
"""What an option can count at most."""
GREATEST_SEED = (1 << 63) - 1
"""What every source of random numbers takes."""


def optional(kind: Any, help: str, *names: str, shown: str | bool = False, **limits: Any) -> Any:
    """Return an option of a group that need not be named: its type, its help, and what is shown as its default."""
    return Annotated[kind | None, typer.Option(*names, help=help, show_default=shown, **limits)]


def count(help: str, *names: str, shown: str | bool = False, most: int = MOST) -> Any:
    """Return an option of a group that counts from 1 on, and need not be named."""
    return optional(int, help, *names, shown=shown, min=1, max=most)


def flag(help: str, *names: str) -> Any:
    """Return an option of a group that is on or off."""
    return Annotated[bool, typer.Option(*names, help=help)]


@dataclass(frozen=True)
class OptionGroup:
    """Options that several commands have, which get them as one object, by name; those that are not named are None.

    A subclass lists them; a command takes the group by a parameter of that type, see :func:`with_options`.
    """

    OPTIONS: ClassVar[Mapping[str, Any]]
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    given: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name not in self.OPTIONS:
            raise AttributeError(name)
        return self.given[name]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the groups that its parameters are annotated with, beside its own."""
    known = inspect.signature(command, eval_str=True).parameters.values()
    groups = {one.name: one.annotation for one in known if _is_group(one.annotation)}
    options = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in known if one.name not in groups]
    for group in groups.values():
        options += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=group.DEFAULTS.get(name), annotation=annotation
            )
            for name, annotation in group.OPTIONS.items()
        ]

    def run(**given: Any) -> None:
        filled = {
            name: group({option: given.pop(option) for option in group.OPTIONS}) for name, group in groups.items()
        }
        command(**given, **filled)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in options}
    return run


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, OptionGroup)
