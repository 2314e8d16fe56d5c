"""How one tensor is stored: dense, sparse, or as packed integer codes; each decodes to exactly what was encoded.

A negative zero is the one value that may change: the sparse and the packed form give it back as zero.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy
import torch
from torch import Tensor

from vanishing.layers.base import Layout
from vanishing.manifest import DenseTensor, DType, PackedTensor, SparseTensor, TensorEntry
from vanishing.receipt import Grid

_HEADER_BYTES = 100
"""What one more stored part adds to the header of the file, about."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Encoded:
    """One tensor as it is stored.

    Args:
        entry: its description for the manifest.
        parts: suffix of the stored name ("" for the tensor's own) -> what is stored under it.
        off_grid: whether a grid was given and is not what the values lie on.
    """

    entry: TensorEntry
    parts: dict[str, Tensor]
    off_grid: bool


_Attempt = tuple[int, Callable[[], Encoded | None]]
"""About how many bytes an encoding takes, and what makes it: None where it would not give the tensor back."""


def encode(tensor: Tensor, grid: Grid | None = None) -> Encoded:
    """Return the smallest encoding of a tensor that gives it back.

    Args:
        tensor: any shape, on any device.
        grid: the values that it is thought to lie on; whether it does is found out.
    """
    tensor = tensor.detach().cpu().contiguous()
    floating = tensor.dtype in FLOATS and tensor.numel() > 0
    attempts: list[_Attempt] = [(tensor.nbytes + _HEADER_BYTES, lambda: _dense(tensor))]
    if floating:
        kept = int(torch.count_nonzero(tensor))
        mask_bytes = _packed_bytes(tensor.numel(), 1)
        attempts.append((mask_bytes + kept * tensor.element_size() + 2 * _HEADER_BYTES, lambda: _sparse(tensor)))
        if grid is not None and grid.layout.shape == tuple(tensor.shape):
            attempts += _packings(tensor, grid, kept)
    missed = False
    for _, attempt in sorted(attempts, key=operator.itemgetter(0)):
        found = attempt()
        if found is not None:
            break
        missed = True
    assert found is not None, "the dense form always gives the tensor back"
    if grid is None or isinstance(found.entry, PackedTensor):
        return found
    fits = floating and grid.layout.shape == tuple(tensor.shape)
    # Without a mask, a grid need not have the zeros that a weight has.
    return replace(found, off_grid=not fits or (missed and _packed(tensor, grid, masked=True) is None))


def decode(entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of an entry whose parts have the shapes that `parts_problem` asks for.

    Raises:
        ValueError: a mask does not have as many bits set as there are values.
    """
    if isinstance(entry, DenseTensor):
        return parts[""]
    if isinstance(entry, SparseTensor):
        mask = _unpack_mask(parts["mask"], entry.count, entry.kept)
        return (
            torch.zeros(entry.count, dtype=dtype_of(entry)).masked_scatter_(mask, parts["values"]).reshape(entry.shape)
        )
    return _decode_packed(entry, parts)


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """Return the type of the decoded tensor."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> DType:
    """Return the name of a type in the manifest."""
    return cast(DType, str(dtype).removeprefix("torch."))


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def suffixes(entry: TensorEntry) -> set[str]:
    """Return the suffixes of the names under which an entry's parts are stored."""
    if isinstance(entry, DenseTensor):
        return {""}
    if isinstance(entry, SparseTensor):
        return {"mask", "values"}
    return (
        {"codes", "scale"}
        | ({"zero_point"} if entry.zero_point else set())
        | ({"mask"} if entry.kept is not None else set())
    )


def parts_problem(entry: TensorEntry, found: Mapping[str, tuple[str, list[int]]]) -> str | None:
    """Return what is wrong with the types and shapes of an entry's parts, None where nothing is.

    Args:
        entry: the entry.
        found: suffix -> (name of the type, shape) of each part of `suffixes(entry)`, as stored.
    """
    kept = entry.count if isinstance(entry, DenseTensor) or entry.kept is None else entry.kept
    expected: dict[str, tuple[str, list[int]]] = {"mask": ("uint8", [_packed_bytes(entry.count, 1)])}
    if isinstance(entry, DenseTensor):
        expected = {"": (entry.dtype, entry.shape)}
    elif isinstance(entry, SparseTensor):
        expected["values"] = (entry.dtype, [kept])
    else:
        scale_dtype, scale_shape = found["scale"]
        if scale_dtype not in {dtype_name(dtype) for dtype in FLOATS}:
            return f"its scale is of type {scale_dtype}"
        full = (entry.rows, entry.groups)
        if len(scale_shape) != 2 or any(size not in (1, most) for size, most in zip(scale_shape, full, strict=True)):
            return f"its scale of shape {scale_shape} does not fit {full[0]} rows of {full[1]} groups"
        expected |= {"codes": ("uint8", [_packed_bytes(kept, entry.bits)]), "zero_point": ("uint8", scale_shape)}
    for suffix, got in found.items():
        if suffix in expected and got != expected[suffix]:
            return f"{suffix or 'its values'}: expected {expected[suffix]}, the weights hold {got}"
    return None


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes of `bits` each without gaps, the first one in the lowest bits of the first byte.

    Args:
        codes: (n,) uint8, each below `2**bits`.
        bits: 1 to 8.

    Returns:
        (ceil(n * bits / 8),) uint8; unused bits are 0.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    # Eight codes are `bits` whole bytes: one 64-bit word holds both.
    eights = numpy.pad(codes.numpy(), (0, -codes.numel() % 8)).reshape(-1, 8)
    words = numpy.zeros(len(eights), dtype="<u8")
    for i in range(8):
        words |= eights[:, i].astype("<u8") << numpy.uint64(i * bits)
    packed = words.view(numpy.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(packed[: _packed_bytes(codes.numel(), bits)].copy())


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the (count,) uint8 codes that `pack` packed."""
    padded = numpy.pad(packed.numpy(), (0, -packed.numel() % bits)).reshape(-1, bits)
    words = numpy.pad(padded, ((0, 0), (0, 8 - bits))).view("<u8")[:, 0]
    codes = numpy.empty((len(words), 8), dtype=numpy.uint8)
    for i in range(8):
        codes[:, i] = words >> numpy.uint64(i * bits) & numpy.uint64(2**bits - 1)
    return torch.from_numpy(codes.reshape(-1)[:count])


def read_grid(entry: PackedTensor, parts: Mapping[str, Tensor]) -> Grid:
    """Return the grid that a tensor was packed with."""
    return Grid(
        bits=entry.bits,
        scale=parts["scale"],
        zero_point=parts["zero_point"] if entry.zero_point else None,
        group=entry.group,
        layout=_layout(entry),
    )


def _packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _layout(entry: PackedTensor) -> Layout:
    return Layout(shape=tuple(entry.shape), view=tuple(entry.view), order=tuple(entry.order), rows=entry.rows)


def _packings(tensor: Tensor, grid: Grid, kept: int) -> list[_Attempt]:
    scales = [grid.scale] if grid.zero_point is None else [grid.scale, grid.zero_point]
    shared = sum(scale.nbytes + _HEADER_BYTES for scale in scales) + _HEADER_BYTES
    whole = shared + _packed_bytes(tensor.numel(), grid.bits)
    masked = shared + _packed_bytes(kept, grid.bits) + _packed_bytes(tensor.numel(), 1) + _HEADER_BYTES
    return [
        (whole, lambda: _packed(tensor, grid, masked=False)),
        (masked, lambda: _packed(tensor, grid, masked=True)),
    ]


def _dense(tensor: Tensor) -> Encoded:
    entry = DenseTensor(dtype=dtype_name(tensor.dtype), shape=list(tensor.shape), crc32=checksum(tensor))
    return Encoded(entry, {"": tensor}, off_grid=False)


def _sparse(tensor: Tensor) -> Encoded:
    mask = tensor.reshape(-1) != 0
    parts = {"mask": pack(mask.to(torch.uint8), 1), "values": tensor.reshape(-1)[mask]}
    entry = SparseTensor(
        dtype=dtype_name(tensor.dtype), shape=list(tensor.shape), crc32=0, kept=parts["values"].numel()
    )
    return Encoded(entry.model_copy(update={"crc32": checksum(decode(entry, parts))}), parts, off_grid=False)


def _packed(tensor: Tensor, grid: Grid, *, masked: bool) -> Encoded | None:
    matrix = grid.layout.to_matrix(tensor)
    codes = _codes(matrix, grid).reshape(-1)
    parts = {"scale": grid.scale.detach().cpu().contiguous()}
    if grid.zero_point is not None:
        parts["zero_point"] = grid.zero_point.detach().cpu().contiguous()
    kept = None
    if masked:
        mask = matrix.reshape(-1) != 0
        codes = codes[mask]
        parts["mask"], kept = pack(mask.to(torch.uint8), 1), codes.numel()
    parts["codes"] = pack(codes, grid.bits)
    # A model that was cast after it was finished holds values that were computed in the type that it had before.
    for arithmetic in dict.fromkeys((tensor.dtype, torch.float32, torch.bfloat16, torch.float16)):
        entry = PackedTensor(
            dtype=dtype_name(tensor.dtype),
            shape=list(tensor.shape),
            crc32=0,
            bits=grid.bits,
            group=grid.group,
            kept=kept,
            zero_point=grid.zero_point is not None,
            arithmetic=dtype_name(arithmetic),  # type: ignore[arg-type]
            view=list(grid.layout.view),
            order=list(grid.layout.order),
            rows=grid.layout.rows,
        )
        decoded = decode(entry, parts)
        if torch.equal(decoded, tensor):
            return Encoded(entry.model_copy(update={"crc32": checksum(decoded)}), parts, off_grid=False)
    return None


def _codes(matrix: Tensor, grid: Grid) -> Tensor:
    """The nearest stored codes of a matrix; where the scale is 0 any code will do."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    steps = matrix.to(wide) / _spread(grid.scale.detach().cpu().to(wide), grid.group, matrix.shape[1])
    if grid.bits == 1 and grid.zero_point is None:
        return (steps > 0).to(torch.uint8)
    if grid.zero_point is None:
        offset: Tensor | int = 2 ** (grid.bits - 1)
    else:
        offset = _spread(grid.zero_point.detach().cpu().to(wide), grid.group, matrix.shape[1])
    return steps.nan_to_num_(0.0).round_().add_(offset).clamp_(0, 2**grid.bits - 1).to(torch.uint8)


def _decode_packed(entry: PackedTensor, parts: Mapping[str, Tensor]) -> Tensor:
    arithmetic: torch.dtype = getattr(torch, entry.arithmetic)
    codes = unpack(parts["codes"], entry.bits, entry.count if entry.kept is None else entry.kept)
    mask = None
    if entry.kept is not None:
        mask = _unpack_mask(parts["mask"], entry.count, entry.kept)
        codes = torch.zeros(entry.count, dtype=torch.uint8).masked_scatter_(mask, codes)
    steps = codes.reshape(entry.rows, entry.columns).to(arithmetic)
    if entry.zero_point:
        steps -= _spread(parts["zero_point"].to(arithmetic), entry.group, entry.columns)
    elif entry.bits == 1:
        steps.mul_(2).sub_(1)
    else:
        steps -= 2 ** (entry.bits - 1)
    values = steps.mul_(_spread(parts["scale"].to(arithmetic), entry.group, entry.columns)).to(dtype_of(entry))
    if mask is not None:
        values.masked_fill_(~mask.reshape(values.shape), 0)
    return _layout(entry).from_matrix(values)


def _spread(scale: Tensor, group: int | None, columns: int) -> Tensor:
    """Scales of groups as scales of columns, (rows or 1, columns or 1)."""
    if group is None or scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group, dim=1)[:, :columns]


def _unpack_mask(packed: Tensor, count: int, kept: int) -> Tensor:
    mask = unpack(packed, 1, count).to(torch.bool)
    if int(mask.sum()) != kept:
        raise ValueError(f"its mask keeps {int(mask.sum())} values and {kept} are stored")
    return mask
