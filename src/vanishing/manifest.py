"""`vanishing.json`: what a saved model consists of, with a digest of every byte that decides what it computes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vanishing.errors import FileError
from vanishing.places import join

MANIFEST, WEIGHTS = "vanishing.json", "model.safetensors"
FORMAT_VERSION = 1
_MOST_BYTES = 32 * 2**20

DType = Literal[
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip
Count = Annotated[int, Field(ge=0, lt=2**62)]
Size = Annotated[int, Field(ge=1, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Strict):
    """Digest and length of one file of the folder."""

    sha256: Sha256
    bytes: Count


class _Tensor(_Strict):
    """What every encoding says; `crc32` is that of the decoded values, in row-major order and little-endian."""

    dtype: DType
    shape: list[Count]
    crc32: Annotated[int, Field(ge=0, lt=2**32)]

    @property
    def count(self) -> int:
        """The number of values of the decoded tensor."""
        return math.prod(self.shape)


class DenseTensor(_Tensor):
    """Every value, under the tensor's own name."""

    encoding: Literal["dense"] = "dense"


class SparseTensor(_Tensor):
    """One bit a value that says where it is not zero (`.mask`), and those values (`.values`), in row-major order."""

    encoding: Literal["sparse"] = "sparse"
    kept: Count

    @model_validator(mode="after")
    def _fits(self) -> SparseTensor:
        if self.kept > self.count:
            raise ValueError(f"{self.kept} values are kept of a tensor of {self.count}")
        return self


class PackedTensor(_Tensor):
    """Codes of `bits` each (`.codes`) with `.scale` and maybe `.zero_point`; all in the order of the weight's matrix.

    A value is `(code - zero_point) * scale`, computed in `arithmetic` and then brought to `dtype`. Without a zero point
    the stored code is larger than the signed one by `2**(bits-1)`; with one bit, 0 and 1 mean -scale and +scale. With
    `kept`, `.mask` has a bit for every value and only the values that are not zero have a code.
    """

    encoding: Literal["packed"] = "packed"
    bits: Annotated[int, Field(ge=1, le=8)]
    group: Size | None = None
    kept: Count | None = None
    zero_point: bool = False
    arithmetic: Literal["float64", "float32", "float16", "bfloat16"]
    view: list[Size]
    order: list[Count]
    rows: Size

    @property
    def columns(self) -> int:
        """The fan-in of the weight's matrix."""
        return self.count // self.rows

    @property
    def groups(self) -> int:
        """The number of groups of columns."""
        return 1 if self.group is None else -(-self.columns // self.group)

    @model_validator(mode="after")
    def _fits(self) -> PackedTensor:
        if math.prod(self.view) != self.count or self.count % self.rows or self.count == 0:
            raise ValueError(f"view {self.view} and {self.rows} rows are no matrix of a tensor of {self.count} values")
        if sorted(self.order) != list(range(len(self.view))):
            raise ValueError(f"order {self.order} is not a permutation of the {len(self.view)} dimensions of the view")
        if self.kept is not None and self.kept > self.count:
            raise ValueError(f"{self.kept} values are kept of a tensor of {self.count}")
        return self


TensorEntry = DenseTensor | SparseTensor | PackedTensor


class InputEntry(_Strict):
    """What the input of a layer goes through: rounding to `bits`, with a range for each token or one for all.

    The latter is given by `.quantizer.scale` and, if not symmetric, `.quantizer.zero_point` below the layer.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    range: Literal["token", "tensor"] = "token"


class LayerEntry(_Strict):
    """One layer of the model that is not, or not only, what the fresh architecture has there.

    `rank` is that of a factored layer, `split` how its weight was split, `inner_rank` the rank between the first two
    layers of a Tucker split. `compressor` makes a replaced block anew, and with the next two tells `summary` what was
    done. `grids` names the parameters below the layer whose codes are stored. `narrowed_from` is the shape
    that the weight of a narrower layer had, and `counts` holds what attributes of a module with fewer units are now.
    `input` is for a layer with a quantized input, which stands below the name of the entry as `.layer`.
    """

    structure: Literal["weight", "factored", "quantized_input", "replaced"]
    rank: Size | None = None
    inner_rank: Size | None = None
    split: Literal["channels", "spatial", "tucker"] = "channels"
    compressor: dict[str, Any] | None = None
    parameters_before: Count | None = None
    bytes_before: Count | None = None
    grids: list[str] = []
    narrowed_from: list[Size] | None = None
    counts: dict[str, Size] = {}
    input: InputEntry | None = None

    @property
    def is_rebuilt(self) -> bool:
        """Whether the fresh architecture has something else there than the same layer."""
        return self.structure != "weight" or self.narrowed_from is not None or bool(self.counts)

    @model_validator(mode="after")
    def _complete(self) -> LayerEntry:
        if (self.rank is not None) != (self.structure == "factored"):
            raise ValueError("a factored layer has a rank, and no other layer has")
        if (self.input is not None) != (self.structure == "quantized_input"):
            raise ValueError("a layer with a quantized input has an entry for it, and no other layer has")
        if (self.inner_rank is not None) != (self.split == "tucker") or (
            self.rank is None and self.split != "channels"
        ):
            raise ValueError("a Tucker split has two ranks, and no other layer has")
        if self.structure == "replaced" and self.compressor is None:
            raise ValueError("a replaced block needs its compressor")
        return self


class Manifest(_Strict):
    """All of `vanishing.json`."""

    format: Literal["vanishing"] = "vanishing"
    format_version: Literal[1] = 1
    library_version: str
    files: dict[FileName, FileEntry] = {}
    recipe: dict[str, Any] | None = None
    modules: dict[str, LayerEntry] = {}
    tensors: dict[str, Annotated[TensorEntry, Field(discriminator="encoding")]]
    ties: dict[str, str] = {}
    buffers: dict[str, DType] = {}
    digest: Sha256 | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for alias, name in self.ties.items():
            if alias in self.tensors or name not in self.tensors:
                raise ValueError(f"ties: {alias!r} must be another name of a tensor of the file, not of {name!r}")
        for module, layer in self.modules.items():
            for parameter in layer.grids:
                if not isinstance(self.entry(join(module, parameter)), PackedTensor):
                    raise ValueError(f"modules: {join(module, parameter)!r} is said to have codes and has none")
        if MANIFEST in self.files:
            raise ValueError(f"files: {MANIFEST} cannot hold its own digest")
        return self

    @property
    def names(self) -> set[str]:
        """The names of the model's state that have a value in the file."""
        return self.tensors.keys() | self.ties.keys()

    def entry(self, name: str) -> TensorEntry | None:
        """Return the entry of a tensor by any of its names."""
        return self.tensors.get(self.ties.get(name, name))

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds: every field that differs from its default, and always those at the top."""
        data = self.model_dump(exclude_defaults=True)
        top = {name: data.get(name, getattr(self, name)) for name in type(self).model_fields if name != "digest"}
        for name, entry in top["tensors"].items():
            top["tensors"][name] = {"encoding": self.tensors[name].encoding} | entry
        return top


def seal(data: dict[str, Any]) -> str:
    """Return the digest that stands in the weights' own header: of everything in the manifest that decides the outputs.

    Without it, a manifest that was changed by hand and given a new digest could turn good weights into another model.
    """
    files = {name: entry for name, entry in data["files"].items() if name != WEIGHTS}
    return _digest({key: data.get(key) for key in ("modules", "tensors", "ties", "buffers")} | {"files": files})


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """Write `vanishing.json`, one layer, tensor and file a line, with the digest of it all."""
    data = data | {"digest": _digest(data)}
    lines = [f"  {json.dumps(key)}: {_lines(value)}" for key, value in data.items()]
    (folder / MANIFEST).write_text("{\n" + ",\n".join(lines) + "\n}", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the checked manifest of a folder, and its plain values.

    Raises:
        FileError: it is missing, damaged, too new, or names something that is not allowed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {MANIFEST}"
        raise FileError(f"{folder} {what}: it is not a model that vanishing saved. Give the folder that save() wrote.")
    if path.stat().st_size > _MOST_BYTES:
        raise FileError(
            f"{path} has more than {_MOST_BYTES:,} bytes, which no saved model needs. Save the model again."
        )
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("format") != "vanishing":
            raise FileError(f"{path} is not in the format of vanishing. Give the folder that save() wrote.")
        version = data.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FileError(
                f"{path} was written by a newer vanishing (format {version}, this one reads {FORMAT_VERSION}). "
                "Upgrade vanishing."
            )
        stated = data.get("digest")
        if stated != _digest({key: value for key, value in data.items() if key != "digest"}):
            raise FileError(f"{path} was altered or damaged: its digest is not that of its contents. {SAVE_AGAIN}")
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise FileError(f"{path} is not valid: {where}: {first['msg']}. {SAVE_AGAIN}") from None
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is not valid JSON ({error}). {SAVE_AGAIN}") from None
    if WEIGHTS not in manifest.files:
        raise FileError(f"{path} does not list {WEIGHTS}. {SAVE_AGAIN}")
    return manifest, data


SAVE_AGAIN = "Copy the folder again from where it came, or save the model again."


def _digest(data: dict[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _lines(value: Any) -> str:
    if not isinstance(value, dict) or not value or not all(isinstance(entry, dict) for entry in value.values()):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n  }"
