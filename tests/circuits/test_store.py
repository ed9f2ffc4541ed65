"""Folders are found whole, of one version, whoever writes beside it; what the system refuses is said in our words."""

import errno
import json
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import circuits as ct
from circuits import files, store

ROOT = Path(__file__).resolve().parents[2]

NAMES = ("a", "b")


def write_folder(path, number):
    with store.replace_folder(path, NAMES, kind="a pair") as folder:
        for name in NAMES:
            (folder / name).write_text(str(number))
        store.write_manifest(folder, format="pair", version=1, made_from={"number": number})


def read_pair(path):
    return store.read_folder(
        path, lambda folder, _: tuple((folder / name).read_text() for name in NAMES), format="pair"
    )


@pytest.fixture
def path(tmp_path):
    write_folder(tmp_path / "pair", 0)
    return tmp_path / "pair"


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """How folders are swapped in: in one step, or as on a file system that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(store, "_exchange", lambda new, folder: False)
    return request.param


def test_a_manifest_has_the_hash_of_every_file(path):
    """Written out as `sha256sum` has it."""
    content = json.loads((path / "manifest.json").read_text())
    printed = subprocess.run(["sha256sum", *NAMES], cwd=path, capture_output=True, text=True, check=True).stdout
    assert content["files"] == {name: hash for hash, name in (line.split() for line in printed.splitlines())}
    assert (content["format"], content["format_version"], content["made_from"]) == ("pair", 1, {"number": 0})
    assert store.read_manifest(path, "pair") == store.Manifest(files=content["files"], made_from={"number": 0})


def test_a_published_folder_in_a_folder_is_known_by_its_manifest(tmp_path):
    with store.replace_folder(tmp_path / "outer", ("inner", "c"), kind="an outer one") as folder:
        write_folder(folder / "inner", 1)
        (folder / "c").write_text("c")
        store.write_manifest(folder, format="outer", version=1)
    assert set(store.read_manifest(tmp_path / "outer", "outer").files) == {"c", "inner/manifest.json"}
    assert read_pair(tmp_path / "outer" / "inner") == ("1", "1")
    write_folder(tmp_path / "outer" / "inner", 2)
    with pytest.raises(
        ct.CheckpointError, match=r"inner/manifest.json: expected the content that its hash is of, got another"
    ):
        store.read_manifest(tmp_path / "outer", "outer")


def test_every_flipped_bit_and_every_missing_file_is_noticed_before_anything_is_read(path):
    draw = random.Random(0)
    for name in (*NAMES, store.MANIFEST):
        content = (path / name).read_bytes()
        for _ in range(100):
            position, bit = draw.randrange(len(content)), draw.randrange(8)
            (path / name).write_bytes(
                content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
            )
            with pytest.raises(ct.CheckpointError):
                store.read_folder(path, lambda *_: pytest.fail("read"), format="pair")
        (path / name).write_bytes(content)
    (path / "b").unlink()
    with pytest.raises(
        ct.CheckpointError,
        match=r"b: expected a file that can be read, got No such file or directory; save the folder again",
    ):
        read_pair(path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../pair/a": ""}},
        {"files": {"/dev/zero": ""}},
        {"files": {"./a": ""}},
        {"files": {str(number): "" for number in range(1000)}},
        {"files": ["a"]},
        {"manifest_version": 2},
        {"manifest_version": None},
        {"format": "triple"},
        {"format": [1]},
    ],
    ids=repr,
)
def test_manifests_that_lie_are_refused(change, path):
    content = json.loads((path / "manifest.json").read_text()) | change
    del content["sha256"]
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": store._own_hash(content)}))
    with pytest.raises(ct.CheckpointError):
        read_pair(path)


def test_a_folder_without_a_manifest_is_one_of_before(path):
    (path / "manifest.json").unlink()
    assert store.read_folder(path, lambda _, manifest: manifest, format="pair") == store.Manifest()


def test_a_reader_who_is_overtaken_gets_both_files_of_one_version(path, swap):
    for overtaken in (0, 1, 5):
        calls = []

        def read(folder, _, calls=calls, overtaken=overtaken):
            a = (folder / "a").read_text()
            calls.append(a)
            if len(calls) <= overtaken:
                write_folder(path, len(calls))
            return a, (folder / "b").read_text()

        write_folder(path, 0)
        assert store.read_folder(path, read, format="pair") == (str(overtaken), str(overtaken))
        assert len(calls) == overtaken + 1


def test_a_reader_who_is_overtaken_for_ever_is_told_so(path):
    with pytest.raises(ct.CheckpointError, match=r"expected one version .*, got .* in turn"):
        store.read_folder(path, lambda *_: write_folder(path, 1), format="pair")


def test_an_error_of_the_reader_is_its_own_unless_the_folder_was_replaced(tmp_path):
    def failing(folder, _):
        raise ct.CheckpointError(f"nothing in {folder.name}")

    for _ in range(2):
        with pytest.raises(ct.CheckpointError, match="nothing in"):
            store.read_folder(tmp_path / "pair", failing, format="pair")
        write_folder(tmp_path / "pair", 0)


def test_a_block_that_fails_leaves_the_version_before(path):
    with pytest.raises(UnicodeEncodeError):
        write_folder(path, "\ud800")
    assert read_pair(path) == ("0", "0")
    assert os.listdir(path.parent) == ["pair"]


class Killed(BaseException):
    pass


def test_a_kill_between_the_two_renames_loses_nothing(path, monkeypatch):
    """On a file system that cannot exchange there is a moment without a folder: readers find the version before."""
    monkeypatch.setattr(store, "_exchange", lambda new, folder: False)
    rename, done = Path.rename, []

    def killed_rename(self, target):
        done.append(target)
        if len(done) == 3:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_rename)
        with pytest.raises(Killed):
            write_folder(path, 1)
    assert not path.exists()
    assert read_pair(path) == ("0", "0")
    write_folder(path, 2)
    assert read_pair(path) == ("2", "2")
    assert os.listdir(path.parent) == ["pair"]


@pytest.mark.parametrize("step", ["_swap_in", "_exchange", "rename"])
def test_a_writer_who_is_overtaken_at_a_step_wins_all_the_same(step, path, swap, monkeypatch):
    """Before that step another writer publishes a whole version, once."""
    owner = Path if step == "rename" else store
    original = getattr(owner, step)

    def overtaken(*arguments):
        monkeypatch.setattr(owner, step, original)
        write_folder(path, 7)
        return original(*arguments)

    monkeypatch.setattr(owner, step, overtaken)
    write_folder(path, 2)
    assert read_pair(path) == ("2", "2")
    assert os.listdir(path.parent) == ["pair"]


# Litter and locks -------------------------------------------------------------------------------------------------


def in_another_process(code, *arguments):
    """Start a process that runs some lines and then waits; return it once it has said that it does."""
    code = f"import os, sys, time\nfrom circuits import files, store\nfrom pathlib import Path\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


WRITER = """
with files.temporary_folder(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("")
    print(flush=True)
    time.sleep(60)
"""
WORKER = """
with store.locked(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_living_one_needs_is_not(path):
    writer = in_another_process(WRITER, path.parent)
    try:
        (temporary,) = set(os.listdir(path.parent)) - {"pair"}
        write_folder(path, 1)
        assert (path.parent / temporary / "half").exists()
    finally:
        writer.kill()
        writer.communicate()
    assert (path.parent / temporary / "half").exists()
    (path.parent / ".0a1b2c3d.unfactor").mkdir()  # not ours
    with files.replace_file(path.parent / "file") as new:
        new.write_text("1")
    assert set(os.listdir(path.parent)) == {"pair", "file", ".0a1b2c3d.unfactor"}


def test_one_process_works_in_a_folder_and_the_other_is_told_which(tmp_path):
    worker = in_another_process(WORKER, tmp_path)
    try:
        with (
            pytest.raises(
                ct.errors.StorageError, match=f"got process {worker.pid} on .*, since .* at work there; wait"
            ),
            store.locked(tmp_path),
        ):
            pytest.fail("two at once")
    finally:
        worker.kill()
        worker.communicate()
    assert os.listdir(tmp_path) == [store.LOCK]
    with store.locked(tmp_path):  # of a dead process
        assert f"process {os.getpid()} on " in (tmp_path / store.LOCK).read_text()
    assert not os.listdir(tmp_path)


def test_a_folder_that_nothing_came_into_goes_again(tmp_path):
    with store.locked(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder").is_dir()
    assert not os.listdir(tmp_path)
    with store.locked(tmp_path / "new" / "folder"):
        (tmp_path / "new" / "folder" / "result").write_text("1")
    assert os.listdir(tmp_path / "new" / "folder") == ["result"]


def test_a_removed_folder_is_gone_at_once(path):
    store.remove_folder(path)
    store.remove_folder(path)
    assert not os.listdir(path.parent)


# The system says no -----------------------------------------------------------------------------------------------


def refused(call, path, way_out):
    with pytest.raises(ct.errors.StorageError, match=way_out) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ct.UnfactorError)


def savers():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    yield lambda path: ct.save(pc, path)
    yield lambda path: files.write_tensors(path, {"a": torch.zeros(3)}, format="f", version=1, metadata={})
    yield lambda path: ct.learning.fit(
        pc, torch.zeros(4, 3, dtype=torch.int64), num_epochs=1, checkpoint_path=path, progress=False
    )


@pytest.mark.parametrize("number", range(2))
def test_what_is_in_the_way_and_names_that_are_too_long_are_named(number, tmp_path):
    save = list(savers())[number]
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    refused(lambda: save(tmp_path / "file" / "x"), tmp_path / "file", "in the way, or give another place")
    refused(lambda: save(tmp_path / ("x" * 300)), "x" * 300, "give a shorter name")
    refused(lambda: save(tmp_path / "loop" / "x"), tmp_path / "loop", "another")
    if number:
        refused(lambda: save(tmp_path / "folder"), tmp_path / "folder", "remove the folder that is in the way")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop"]


def test_what_is_saved_while_the_interpreter_ends_is_there(tmp_path):
    code = "import atexit, sys, circuits as ct; pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0);"
    code += "atexit.register(ct.save, pc, sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pc"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert ct.load(tmp_path / "pc").circuit.num_vars == 3


def test_every_new_file_and_folder_is_waited_for_once(tmp_path, monkeypatch):
    """And the folder in which the new version is swapped in, after that."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    ct.save(pc, tmp_path / "pc")
    assert sorted(synced[:-1]) == ["manifest.json", "pc", "structure.json", "weights.safetensors"]
    assert synced.pop() == tmp_path.name
    synced.clear()
    with store.replace_folder(tmp_path / "outer", ("pc", "note"), kind="a test") as new:
        ct.save(pc, new / "pc")
        (new / "note").write_text("x")
    assert sorted(synced[:-1]) == ["manifest.json", "note", "outer", "pc", "structure.json", "weights.safetensors"]
    assert synced[-1] == tmp_path.name


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "No space left on device at .*; make room there"),
        (errno.EROFS, "Read-only file system at .*; give a place that you may write to"),
        (errno.EACCES, "Permission denied at .*; give a place that you may write to"),
        (errno.EIO, "Input/output error at .*; look at that place, or give another one"),
    ],
)
@pytest.mark.parametrize("step", ["mkdir", "fsync", "replace", "open"])
@pytest.mark.parametrize("which", range(3))
def test_whatever_the_system_says_at_any_step_the_version_before_stays(
    number, way_out, step, which, tmp_path, monkeypatch
):
    save, path = list(savers())[which], tmp_path / "saved"
    if which != 2:
        save(path)
    before = {place.relative_to(tmp_path): place.read_bytes() for place in tmp_path.rglob("*") if place.is_file()}
    original = getattr(os, step)

    def failing(target, *arguments, **options):
        if step in ("fsync", "replace") or ".unfactor-tmp" in str(target):
            raise OSError(number, os.strerror(number), str(target))
        return original(target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing)
        if step == "replace" and which == 0:
            patch.setattr(store, "_exchange", failing)
        refused(lambda: save(path), path, way_out)
    after = {place.relative_to(tmp_path): place.read_bytes() for place in tmp_path.rglob("*") if place.is_file()}
    assert after == before
    assert not [name for name in os.listdir(tmp_path) if files.is_litter(name)] or step == "open"  # which removal needs
    save(path)
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_that_the_umask_gives(umask, tmp_path):
    before = os.umask(umask)
    try:
        for which, save in enumerate(savers()):
            save(tmp_path / str(which))
        os.mkdir(tmp_path / "folder")
        (tmp_path / "file").write_text("")
    finally:
        os.umask(before)
    expected = {kind: stat.S_IMODE((tmp_path / kind).stat().st_mode) for kind in ("folder", "file")}
    for place in tmp_path.rglob("*"):
        assert stat.S_IMODE(place.stat().st_mode) == expected["folder" if place.is_dir() else "file"], place


def test_a_folder_elsewhere_is_written_through_a_link(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    write_folder(tmp_path / "link", 5)
    assert (tmp_path / "link").is_symlink()
    assert read_pair(path) == read_pair(tmp_path / "link") == ("5", "5")
