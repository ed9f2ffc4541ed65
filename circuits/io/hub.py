"""Share compiled circuits over the Hugging Face hub: folders of ``ct.save`` with a model card, no pickle anywhere."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import CheckpointError
from circuits.files import replace_file
from circuits.io import STRUCTURE_FILE, WEIGHTS_FILE, load, save
from circuits.store import MANIFEST

_FILES = (STRUCTURE_FILE, WEIGHTS_FILE, MANIFEST)
_TAGS = ("probabilistic-circuit",)
_CARD = """---
{{ card_data }}
---

{{ circuit }}, a probabilistic circuit of the library `unfactor`: likelihoods, marginals, conditional samples and most
probable explanations are exact.

```python
import circuits as ct

pc = ct.hub.from_pretrained("name/of-this-repository")  # or the folder; nothing in it is executed
ct.queries.sample(pc, 10)
```
"""


def save_pretrained(pc: CompiledCircuit, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save a circuit in a folder as the hub expects it: its structure, its weights, and a model card if there is none.

    Args:
        pc: the circuit.
        folder: is made if it is not there; other files in it stay.
        options: those of ``huggingface_hub.ModelHubMixin.save_pretrained``, for instance ``push_to_hub=True``.

    Raises:
        ArgumentError: ``pc`` is no compiled circuit, or cannot be saved.
    """
    _published(pc).save(folder, **options)


def push_to_hub(pc: CompiledCircuit, repo_id: str, **options: Any) -> str:
    """Upload a circuit to a repository of the hub, which is created if it is not there.

    Args:
        pc: the circuit.
        repo_id: "name" or "organisation/name".
        options: those of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private=``, ``token=``, ``branch=``, ...

    Returns:
        The address of the commit.

    Raises:
        ArgumentError: ``pc`` is no compiled circuit, or cannot be saved.
    """
    return _published(pc).push(repo_id, **options)


def from_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **options: Any,
) -> CompiledCircuit:
    """Load a circuit from a folder, or from a repository of the hub. Nothing in it is executed.

    Args:
        name_or_folder: a folder that :func:`save_pretrained` or ``ct.save`` wrote, or the name of a repository.
        device: where the parameters go.
        dtype: torch.float32 or torch.float64; None: as they were saved.
        revision: branch, tag or commit of the repository.
        options: those of ``huggingface_hub.snapshot_download``: ``token=``, ``cache_dir=``, ...

    Raises:
        ArgumentError: a wrong ``dtype``.
        CheckpointError: there is no such circuit, or it is corrupt or hostile.
    """
    return load(local_folder(name_or_folder, _FILES, revision=revision, **options), device=device, dtype=dtype)


@dataclass(frozen=True)
class Published:
    """Something that is shared over the hub: files, and a card that says what they are.

    Attributes:
        write: writes the files into a new folder that does not exist yet.
        files: their names; "a/b" is a file b in a folder a. The manifest comes last: until it is there, who reads the
            folder is told that it is not whole.
        card: the model card, a Jinja template; ``{{ card_data }}`` is what the hub reads, between lines of "---".
        facts: what fills in the rest of the template.
        tags: of the repository.
    """

    write: Callable[[Path], None]
    files: tuple[str, ...]
    card: str
    facts: Mapping[str, str]
    tags: tuple[str, ...]

    def save(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write files and card into a folder; options are those of ``ModelHubMixin.save_pretrained``."""
        self._on_hub().save_pretrained(folder, **options)

    def push(self, repo_id: str, **options: Any) -> str:
        """Upload them, return the commit's address; options are those of ``ModelHubMixin.push_to_hub``."""
        return str(self._on_hub().push_to_hub(repo_id, **options))

    def _on_hub(self) -> Any:
        made = _hub_class(self.card, self.tags)()
        made.published = self  # no argument of the class, for these the hub's mixin would write down
        return made


def local_folder(
    name_or_folder: str | os.PathLike[str], files: Sequence[str], *, revision: str | None = None, **options: Any
) -> Path:
    """Return a folder: the one that is named, or one with these files of a repository of the hub.

    Args:
        name_or_folder: a local folder, or the name of a repository.
        files: what is downloaded.
        revision: branch, tag or commit of the repository.
        options: those of ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointError: it is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = os.fspath(name_or_folder)
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name}: expected a folder, or a repository that can be downloaded, got "
            f"{' '.join(str(error).split()):.300}; "
            "look at the name and the connection"
        ) from error


def _published(pc: CompiledCircuit) -> Published:
    check_compiled(pc)
    return Published(lambda folder: save(pc, folder), _FILES, _CARD, {"circuit": str(pc.circuit)}, _TAGS)


@functools.cache
def _hub_class(card: str, tags: tuple[str, ...]) -> Any:
    """Build the class that the hub's mixin needs; only now, because importing ``huggingface_hub`` takes a while."""
    from huggingface_hub import ModelCard, ModelHubMixin

    class OnHub(ModelHubMixin, library_name="unfactor", tags=list(tags), model_card_template=card):
        published: Published

        def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
            return super().generate_model_card(*args, **{**self.published.facts, **options})

        def _save_pretrained(self, save_directory: Path) -> None:
            with tempfile.TemporaryDirectory() as temporary:
                saved = Path(temporary) / "saved"
                self.published.write(saved)
                for name in self.published.files:
                    with replace_file(save_directory / name) as new:
                        shutil.copyfile(saved / name, new)

    return OnHub
