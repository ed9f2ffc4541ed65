"""Chat templates: how a conversation is written for a model that was trained on conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.reading import read_text, unreadable
from diffusion.errors import ArgumentError

FILE_NAME = "chat_template.jinja"
_LARGEST = 1 << 20


@dataclass(frozen=True)
class ChatTemplate:
    """A template in the language of Jinja, run in a sandbox, with the special tokens that it may use by name."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """Return the template of a folder, or of the settings in ``tokenizer_config.json``; None: there is none."""
        source = settings.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        path = folder / FILE_NAME
        if path.is_file():
            try:
                source = read_text(path, limit=_LARGEST)
            except (OSError, ValueError) as error:
                raise unreadable(path, error, way_out="download the model again") from error
        if not isinstance(source, str):
            return None
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            tokens[name] = token if isinstance(token, str) else ""
        return cls(source, tokens)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the conversation as text; raises ArgumentError if the template refuses these messages, or is none."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"messages: expected some that the chat template takes, got an error of it: {error}"
            ) from error
