"""Share compiled circuits over the Hugging Face hub: folders of ``ct.save`` with a model card, no pickle anywhere."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from circuits.compile import CompiledCircuit, check_compiled
from circuits.errors import CheckpointError
from circuits.io import STRUCTURE_FILE, WEIGHTS_FILE, load, save

_FILES = (STRUCTURE_FILE, WEIGHTS_FILE)
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
    check_compiled(pc)
    _hub_class()(pc).save_pretrained(folder, **options)


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
    check_compiled(pc)
    return str(_hub_class()(pc).push_to_hub(repo_id, **options))


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = os.fspath(name_or_folder)
    if os.path.isdir(name):
        return load(name, device=device, dtype=dtype)
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_FILES), **options)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{name}: neither a folder nor a repository that can be downloaded: {error}") from error
    return load(folder, device=device, dtype=dtype)


@functools.cache
def _hub_class() -> Any:
    """Build the class that the hub's mixin needs; only now, because importing ``huggingface_hub`` takes a while."""
    from huggingface_hub import ModelCard, ModelHubMixin

    tags = ["probabilistic-circuit"]

    class CircuitOnHub(ModelHubMixin, library_name="unfactor", tags=tags, model_card_template=_CARD):
        def __init__(self, pc: CompiledCircuit) -> None:
            self.pc = pc

        def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
            return super().generate_model_card(*args, **{"circuit": str(self.pc.circuit), **options})

        def _save_pretrained(self, save_directory: Path) -> None:
            with tempfile.TemporaryDirectory() as temporary:
                saved = Path(temporary) / "circuit"
                save(self.pc, saved)
                for name in _FILES:
                    shutil.copyfile(saved / name, save_directory / name)

    return CircuitOnHub
