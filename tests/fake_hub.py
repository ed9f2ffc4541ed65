"""A hub that is played by a folder, so that nothing touches the network."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import hub_mixin
from huggingface_hub.errors import LocalEntryNotFoundError


class FakeHub:
    """Plays ``huggingface_hub.HfApi`` with a folder."""

    def __init__(self, root):
        self.root = Path(root)

    def __call__(self, token=None, **_):
        return self

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": f"somebody/{repo_id}"})

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://example.org/{repo_id}"

    def snapshot_download(self, repo_id, **_):
        if not (self.root / repo_id).exists():
            raise LocalEntryNotFoundError(f"no {repo_id}")
        return str(self.root / repo_id)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub
