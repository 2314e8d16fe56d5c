"""Writing a folder all at once, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from vanishing.errors import FileError
from vanishing.manifest import MANIFEST, WEIGHTS

logger = logging.getLogger(__name__)


def replace_folder(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Give a folder new contents; until they are complete and on the disk, it keeps the old ones.

    What `write` fills is a hidden folder beside `path`, which takes its place by renames. Files in the old folder that
    its manifest does not list are the user's and are moved to the new one.

    Args:
        path: a folder that does not exist, is empty, or holds a saved model.
        write: is called with the folder to fill.

    Raises:
        FileError: `path` is something else, or could not be written; it is as it was before.
    """
    try:
        target = Path(path).resolve()
        foreign = _foreign_names(target)
        fresh = target.with_name(f".{uuid4().hex}.vanishing")
        fresh.mkdir(parents=True)
        try:
            write(fresh)
            _refuse_clash(target, foreign, {file.name for file in fresh.iterdir()})
            _flush(fresh)
            _swap(fresh, target, foreign)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, None)
        remedy = "free some space or give another path" if full else "give another path, such as a new folder inside"
        raise FileError(f"{path} could not be written: {error}. What was there is unchanged; {remedy}.") from error


def _foreign_names(target: Path) -> set[str]:
    """Names in an existing folder that no `save` wrote."""
    if not target.exists():
        return set()
    if not target.is_dir():
        raise FileError(f"{target} is a file. Give the name of a new folder.")
    if Path.cwd().is_relative_to(target):
        raise FileError(f"{target} is the current folder, which cannot be exchanged. Give a folder below or beside it.")
    names = set(os.listdir(target))
    if names and MANIFEST not in names:
        raise FileError(f"{target} holds files and no saved model. Give a new or an empty folder.")
    return names - {MANIFEST, WEIGHTS} - listed_names(target / MANIFEST)


def listed_names(manifest: Path) -> set[str]:
    """Return the names of the files that a saved model's manifest lists, none if it cannot be read."""
    # The model that is replaced may well be damaged, and that is no reason to keep it.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        data = json.loads(manifest.read_bytes())
        if isinstance(data, dict) and isinstance(data.get("files"), dict):
            return set(data["files"])
    return set()


def _refuse_clash(target: Path, foreign: set[str], written: set[str]) -> None:
    clash = sorted(foreign & written)
    if clash:
        raise FileError(f"{target / clash[0]} is not a file of the saved model there, and would be lost. Move it away.")


def _flush(folder: Path) -> None:
    for file in [*folder.rglob("*"), folder]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(fresh: Path, target: Path, foreign: set[str]) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    fresh.chmod(stat.S_IMODE(target.stat().st_mode))
    old = target.with_name(f".{uuid4().hex}.vanishing")
    target.rename(old)
    moved: list[str] = []
    try:
        for name in foreign:
            (old / name).rename(fresh / name)
            moved.append(name)
        fresh.rename(target)
    except BaseException:
        for name in moved:
            (fresh / name).rename(old / name)
        old.rename(target)
        raise
    shutil.rmtree(old, onerror=lambda *_: logger.warning("%s, the model that was replaced, could not be removed.", old))
