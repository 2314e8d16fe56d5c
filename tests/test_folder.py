"""A folder is replaced as a whole or not at all."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saved_models import MANIFEST, bert, compressed, contents, net, outputs
from vanishing import Binary, FileError, LowRank
from vanishing.serialization import load, save


def test_an_old_model_is_replaced_and_the_users_files_stay(tmp_path: Path) -> None:
    small = tmp_path / "small"
    save(compressed(Binary()), small)
    (small / "notes.md").write_text("mine")
    (small / "runs").mkdir()
    (small / "runs" / "log.txt").write_text("mine too")
    small.chmod(0o750)
    model = compressed(LowRank(rank=4))
    save(model, small)
    assert (small / "notes.md").read_text() == "mine"
    assert (small / "runs" / "log.txt").read_text() == "mine too"
    assert small.stat().st_mode & 0o777 == 0o750
    assert torch.equal(outputs(load(small, net(seed=5))), outputs(model))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_model_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    (tmp_path / "small" / MANIFEST).write_bytes(b'{"format": "van')
    save(net(), tmp_path / "small")
    load(tmp_path / "small", net(seed=5))


def test_new_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    save(net(), tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    save(net(), str(tmp_path / "empty"))
    assert contents(tmp_path / "a" / "b" / "c") == contents(tmp_path / "empty")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    save(compressed(Binary()), tmp_path / "run-1")
    (tmp_path / "latest").symlink_to("run-1")
    save(net(), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(outputs(load(tmp_path / "run-1", net(seed=5))), outputs(net()))


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"thesis holds files and no saved model. Give a new or an empty folder"):
        save(net(), tmp_path / "thesis")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileError, match=r"file is a file. Give the name of a new folder"):
        save(net(), tmp_path / "file")
    assert contents(tmp_path) == {"thesis/chapter.tex": b"years of work", "file": b"a file"}


def test_the_current_folder_is_not_exchanged_under_the_users_feet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"is the current folder"):
        save(net(), ".")
    save(net(), "below")
    load("below", net())


def test_a_users_file_with_a_name_that_save_needs_is_not_lost(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text("mine")
    with pytest.raises(FileError, match=r"config.json is not a file of the saved model there.*Move it away"):
        save(bert(), tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_text() == "mine"
    load(tmp_path / "small", net())


@pytest.mark.parametrize("where", ["save_file", "write_manifest", "fsync", "second rename", "interrupt"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(compressed(Binary()), tmp_path / "small")
    before = contents(tmp_path)
    error: BaseException = KeyboardInterrupt() if where == "interrupt" else OSError(28, "No space left on device")

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    rename = Path.rename
    failed: list[Path] = []

    def rename_that_fails_once(self: Path, target: Path) -> Path:
        if target.name == "small" and not failed:
            failed.append(target)
            raise error
        return rename(self, target)

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif where == "second rename":
        monkeypatch.setattr(Path, "rename", rename_that_fails_once)
    else:
        monkeypatch.setattr(f"vanishing.serialization.{'save_file' if where == 'interrupt' else where}", fail)
    with pytest.raises(type(error) if where == "interrupt" else FileError):
        save(net(), tmp_path / "small")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("stuck", ["results.csv", "notes"])
def test_a_file_of_the_user_that_cannot_be_moved_leaves_everything_as_it_was(
    stuck: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(compressed(Binary()), tmp_path / "small")
    (tmp_path / "small" / "notes").mkdir()
    (tmp_path / "small" / "results.csv").write_text("1")
    before = contents(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == stuck and not self.parent.name == target.parent.name == "small":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FileError, match="What was there is unchanged; give another path"):
        save(net(), tmp_path / "small")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "600k"):
        save(compressed(Binary()), tmp_path / "disk" / "small")
        before = contents(tmp_path / "disk")
        with pytest.raises(FileError, match=r"could not be written: .*No space left on device.*free some space"):
            save(net(width=400), tmp_path / "disk" / "small")
        assert contents(tmp_path / "disk") == before
        load(tmp_path / "disk" / "small", net(seed=5))
