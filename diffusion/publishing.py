"""Folders of heads: read back, and shared over the Hugging Face hub with a model card; no pickle anywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch

from circuits.io.hub import Published, local_folder
from circuits.reading import parsed_json, record_of, short
from circuits.store import MANIFEST
from diffusion.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

FILES = ("circuit/structure.json", "circuit/weights.safetensors", f"circuit/{MANIFEST}", "head.safetensors", MANIFEST)
"""Of one head."""
TAGS = ("probabilistic-circuit", "masked-diffusion", "coupled-head")
CARD = """---
{{ card_data }}
---

A joint output layer for masked diffusion language models, by the library `unfactor`: tokens that are decoded in the
same step are drawn together from the product of the model's prediction and a probabilistic circuit, exactly.

{{ facts }}

```python
import diffusion as df

denoiser = df.load_denoiser("name/of-the-model")
head = df.{{ kind }}.from_pretrained("name/of-this-repository")  # or the folder; nothing in it is executed
out = df.generate(denoiser, prompt, gen_length={{ block_length }}, head=head)
```
"""


class OnHub:
    """What a head needs to be saved in, loaded from and uploaded to repositories of the hub."""

    downloaded: ClassVar[tuple[str, ...]] = FILES
    """Patterns of the names of its files."""

    decoding: dict[str, Any]
    """Options of :class:`~diffusion.decoding.config.DecodingConfig` that decoding with the head takes by default."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, decoding: Any = None, **options: Any) -> None:
        """Save the head in a folder as the hub expects it: what ``save`` writes, and a model card if there is none.

        Args:
            folder: is made if it is not there; other files in it stay.
            decoding: a ``df.DecodingConfig``, or its options by name: how to decode where nothing else is said; None:
                what :attr:`decoding` says.
            options: those of ``huggingface_hub.ModelHubMixin.save_pretrained``, for instance ``push_to_hub=True``.

        Raises:
            ArgumentError: ``decoding`` is something else, or the head cannot be saved.
        """
        self._published(decoding).save(folder, **options)

    def push_to_hub(self, repo_id: str, *, decoding: Any = None, **options: Any) -> str:
        """Upload the head to a repository of the hub, which is created if it is not there.

        Args:
            repo_id: "name" or "organisation/name".
            decoding: as in :meth:`save_pretrained`.
            options: those of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private=``, ``token=``, ``branch=``, ...

        Returns:
            The address of the commit.

        Raises:
            ArgumentError: ``decoding`` is something else, or the head cannot be saved.
        """
        return self._published(decoding).push(repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a head from a folder, or from a repository of the hub. Nothing in it is executed.

        Args:
            name_or_folder: a folder that :meth:`save_pretrained` or ``save`` wrote, or the name of a repository.
            device: where the parameters go.
            revision: branch, tag or commit of the repository.
            options: those of ``huggingface_hub.snapshot_download``: ``token=``, ``cache_dir=``, ...

        Raises:
            CheckpointError: there is no such head, or it is corrupt or hostile.
        """
        folder = local_folder(name_or_folder, cls.downloaded, revision=revision, **options)
        return cast(Any, cls).load(folder, device=device)

    def _published(self, decoding: Any) -> Published:
        head: Any = self
        chosen = head.decoding if decoding is None else options_of(decoding)

        def write(folder: Path) -> None:
            before, head.decoding = head.decoding, chosen
            try:
                head.save(folder)
            finally:
                head.decoding = before

        rows = {"block": f"{head.block_length} positions"} | self.facts() | {"decoding": _said(chosen)}
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
        filled = {"kind": type(self).__name__, "block_length": str(head.block_length), "facts": table}
        return Published(write, self.files(), CARD, filled, TAGS)

    def files(self) -> tuple[str, ...]:
        """Return the names of its files, the manifest last."""
        return FILES

    def facts(self) -> dict[str, str]:
        """Return what a model card says about it."""
        return facts(self)


def options_of(decoding: Any) -> dict[str, Any]:
    """Return the options of a decoding configuration, or of a table, by name; raises ArgumentError for others."""
    if is_dataclass(decoding) and not isinstance(decoding, type):
        return asdict(decoding)
    if isinstance(decoding, Mapping):
        return dict(decoding)
    raise ArgumentError(f"decoding: expected df.DecodingConfig(...) or its options by name, got {decoding!r:.80}")


def facts(head: Any) -> dict[str, str]:
    """Return what a model card says about a df.CoupledHead, from the head itself."""
    named = [getattr(made, "name", type(made).__name__) for made in head.conditioners]
    own = "" if head.vocabulary is None else ", with ids of their own in the model's vocabulary"
    threshold = head.activation_threshold
    return {
        "circuit": str(head.pc.circuit),
        "tokens": f"{head.vocab_size}{own}",
        "tokenizer": f"fingerprint {head.tokenizer_fingerprint}" if head.tokenizer_fingerprint else "unknown",
        "normalisation": head.normalization,
        "evidence": "on all tokens" if head.top_k is None else f"on the {head.top_k} best tokens of every position",
        "conditioners": ", ".join(named) or "none",
        "used where": "everywhere" if threshold >= 1 else f"less than {threshold:g} of a block is masked",
    }


def _said(decoding: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name}={value!r}" for name, value in decoding.items() if value is not None)
    return told or "the library's defaults"


def read_settings(kind: type[_T], metadata: Mapping[str, str]) -> tuple[_T, dict[str, Any] | None]:
    """Return the settings that a file holds, as a record, and the options of decoding beside it."""
    settings = parsed_json(metadata["settings"].encode())
    decoding = settings.pop("decoding", None)
    if not isinstance(decoding, (dict, NoneType)):
        raise CheckpointError(f"decoding: expected an object with keys, got {short(decoding)}")
    return record_of(kind, settings, "settings"), decoding


@contextlib.contextmanager
def named(path: Path, way_out: str) -> Iterator[None]:
    """Turn what goes wrong while a head is built of a file into a CheckpointError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError) and str(path.parent) in str(error):
            raise
        problem = f"settings: expected some, got no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {problem}; {way_out}") from error
