"""Reading the files of a saved model, each checked against the manifest before anything in it is used."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vanishing.encodings import checksum, decode, parts_problem, read_grid, suffixes
from vanishing.errors import FileError
from vanishing.manifest import SAVE_AGAIN, WEIGHTS, FileEntry, Manifest, PackedTensor, TensorEntry
from vanishing.places import join
from vanishing.receipt import Grid

SEAL = "vanishing"
"""The key of the manifest's digest in the header of the weights."""

_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def file_entry(path: Path) -> FileEntry:
    """Return digest and length of a file."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file that the manifest lists against its length and its digest.

    Raises:
        FileError: a file is missing, is no plain file, or does not have the contents that were saved.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            status = path.stat()
            # Reading a pipe would wait forever.
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path} is not a plain file. {SAVE_AGAIN}")
            if status.st_size != entry.bytes:
                raise FileError(f"{path} has {status.st_size:,} bytes, {entry.bytes:,} were saved. {SAVE_AGAIN}")
            if file_entry(path) != entry:
                raise FileError(f"{path} is damaged: its digest is not that of what was saved. {SAVE_AGAIN}")
        except OSError as error:
            raise FileError(f"{path} cannot be read ({error.strerror}). {SAVE_AGAIN}") from error


class StoredWeights:
    """`model.safetensors`, opened: a context manager that reads tensors as the manifest describes them.

    Args:
        folder: the folder.
        manifest: its manifest.
        seal: the manifest's digest, which the header of the weights must hold.

    Raises:
        FileError: on entry, if names, types or shapes are not those of the manifest; later, if the contents are not.
    """

    def __init__(self, folder: Path, manifest: Manifest, seal: str) -> None:
        self._path, self._manifest, self._seal = folder / WEIGHTS, manifest, seal

    def __enter__(self) -> Self:
        try:
            self._file: Any = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self._path} is damaged: {error}. {SAVE_AGAIN}") from error
        self._open: Any = self._file.__enter__()
        try:
            self._check()
        except BaseException:
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)

    def values(self) -> dict[str, Tensor]:
        """Return every tensor of the file, decoded."""
        return {name: self._decode(name, entry) for name, entry in self._manifest.tensors.items()}

    def grids(self) -> dict[str, dict[str, Grid]]:
        """Return the grids of every layer of the manifest, by the names of its parameters."""
        found: dict[str, dict[str, Grid]] = {}
        for module, layer in self._manifest.modules.items():
            found[module] = {}
            for parameter in layer.grids:
                name = join(module, parameter)
                entry = self._manifest.entry(name)
                assert isinstance(entry, PackedTensor)
                found[module][parameter] = read_grid(entry, self._parts(self._manifest.ties.get(name, name), entry))
        return found

    def _check(self) -> None:
        if (self._open.metadata() or {}).get(SEAL) != self._seal:
            raise FileError(f"{self._path} and the manifest beside it do not belong together. {SAVE_AGAIN}")
        stored = set(self._open.keys())
        expected = [key for name, entry in self._manifest.tensors.items() for key in _keys(name, entry).values()]
        if stored != set(expected) or len(expected) != len(stored):
            odd = sorted(stored ^ set(expected)) or ["some"]
            raise FileError(
                f"{self._path} does not hold the tensors that the manifest lists: see {odd[0]!r}. {SAVE_AGAIN}"
            )
        for name, entry in self._manifest.tensors.items():
            found = {}
            for suffix, key in _keys(name, entry).items():
                part = self._open.get_slice(key)
                found[suffix] = (_TYPES.get(part.get_dtype(), part.get_dtype()), list(part.get_shape()))
            problem = parts_problem(entry, found)
            if problem:
                raise FileError(f"{self._path}: {name!r} is not what the manifest says: {problem}. {SAVE_AGAIN}")

    def _parts(self, name: str, entry: TensorEntry) -> dict[str, Tensor]:
        try:
            return {suffix: self._open.get_tensor(key) for suffix, key in _keys(name, entry).items()}
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self._path}: {name!r} cannot be read: {error}. {SAVE_AGAIN}") from error

    def _decode(self, name: str, entry: TensorEntry) -> Tensor:
        try:
            value = decode(entry, self._parts(name, entry))
        except ValueError as error:
            raise FileError(f"{self._path}: {name!r} cannot be decoded: {error}. {SAVE_AGAIN}") from None
        if checksum(value) != entry.crc32:
            raise FileError(f"{self._path}: {name!r} does not decode to the values that were saved. {SAVE_AGAIN}")
        return value


def _keys(name: str, entry: TensorEntry) -> dict[str, str]:
    return {suffix: join(name, suffix) if suffix else name for suffix in suffixes(entry)}
