"""Encodings against bit-by-bit arithmetic in Python and numpy, and against the sizes that they promise."""

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vanishing.encodings import (
    FLOATS,
    Encoded,
    checksum,
    decode,
    encode,
    pack,
    parts_problem,
    read_grid,
    suffixes,
    unpack,
)
from vanishing.layers import find_kind
from vanishing.layers.base import Layout, row_layout
from vanishing.manifest import DenseTensor, PackedTensor, SparseTensor
from vanishing.receipt import Grid

BITS = st.integers(1, 8)


def stored_bytes(encoded: Encoded) -> int:
    return sum(part.nbytes for part in encoded.parts.values())


def decoded(encoded: Encoded) -> Tensor:
    tensor = decode(encoded.entry, encoded.parts)
    assert checksum(tensor) == encoded.entry.crc32
    return tensor


def grid_values(grid: Grid, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The textbook: one weight after the other, in the order of the matrix."""
    rows, columns = codes.shape
    matrix = torch.empty(rows, columns, dtype=dtype)
    for r in range(rows):
        for c in range(columns):
            g = 0 if grid.group is None else c // grid.group
            place = (min(r, grid.scale.shape[0] - 1), min(g, grid.scale.shape[1] - 1))
            code, scale = codes[r, c].to(dtype), grid.scale[place].to(dtype)
            if grid.zero_point is not None:
                matrix[r, c] = (code - grid.zero_point[place].to(dtype)) * scale
            elif grid.bits == 1:
                matrix[r, c] = scale if code else -scale
            else:
                matrix[r, c] = (code - 2 ** (grid.bits - 1)) * scale
    return grid.layout.from_matrix(matrix)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["linear", "transposed", "convolution", "transposed convolution"]))
    if kind == "linear":
        return row_layout((rows, columns))
    if kind == "transposed":
        return Layout(shape=(columns, rows), view=(columns, rows), order=(1, 0), rows=rows)
    kernel = draw(st.integers(1, 3))
    if kind == "convolution":
        return row_layout((rows, columns, kernel))
    layer = nn.ConvTranspose1d(2 * columns, 2 * rows, kernel, groups=2)
    found = find_kind(layer)
    assert found is not None
    return found.layout(layer, tuple(layer.weight.shape))


@st.composite
def quantized(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    """A weight that lies on a grid, with the grid."""
    layout, bits = draw(layouts()), draw(BITS)
    columns = math.prod(layout.shape) // layout.rows
    group = draw(st.none() | st.integers(1, columns + 3))
    groups = 1 if group is None else -(-columns // group)
    rows = draw(st.sampled_from([1, layout.rows])) if group is None else layout.rows
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    scale_dtype = torch.bfloat16 if group is not None else dtype
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(scale_dtype)
    asymmetric = draw(st.booleans())
    zero_point = torch.randint(2**bits, (rows, groups), generator=generator, dtype=torch.uint8) if asymmetric else None
    grid = Grid(bits=bits, scale=scale, zero_point=zero_point, group=group, layout=layout)
    codes = torch.randint(2**bits, (layout.rows, columns), generator=generator)
    return grid_values(grid, codes, dtype), grid


@given(BITS, st.integers(0, 100), st.integers(0, 2**31))
def test_codes_are_packed_from_the_lowest_bit_without_gaps(bits: int, count: int, seed: int) -> None:
    codes = numpy.random.default_rng(seed).integers(2**bits, size=count, dtype=numpy.uint8)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    expected = stream.to_bytes(-(-count * bits // 8), "little")
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.numpy().tobytes() == expected
    assert unpack(packed, bits, count).tolist() == codes.tolist()


@given(st.lists(st.booleans(), max_size=50))
def test_a_mask_is_packed_as_numpy_packs_it(mask: list[bool]) -> None:
    packed = pack(torch.tensor(mask, dtype=torch.uint8), 1)
    assert packed.tolist() == numpy.packbits(numpy.array(mask, dtype=bool), bitorder="little").tolist()


@given(quantized())
def test_a_weight_on_its_grid_comes_back_exactly(case: tuple[Tensor, Grid]) -> None:
    weight, grid = case
    encoded = encode(weight, grid)
    assert torch.equal(decoded(encoded), weight)
    assert not encoded.off_grid
    if isinstance(encoded.entry, PackedTensor):
        again = read_grid(encoded.entry, encoded.parts)
        assert (again.bits, again.group, again.layout) == (grid.bits, grid.group, grid.layout)
        assert torch.equal(again.scale, grid.scale) and again.scale.dtype == grid.scale.dtype
        twice = encode(decoded(encoded), again)
        assert twice.entry == encoded.entry
        assert all(torch.equal(part, encoded.parts[suffix]) for suffix, part in twice.parts.items())


@given(quantized(), st.integers(0, 2**31), st.floats(0.1, 0.95))
def test_a_pruned_weight_on_a_grid_comes_back_exactly(case: tuple[Tensor, Grid], seed: int, sparsity: float) -> None:
    weight, grid = case
    weight = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > sparsity)
    encoded = encode(weight, grid)
    assert torch.equal(decoded(encoded), weight)
    assert not encoded.off_grid


@given(quantized(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_weight_that_was_cast_after_it_was_quantized_is_still_codes(
    case: tuple[Tensor, Grid], dtype: torch.dtype
) -> None:
    weight, grid = case
    if weight.dtype not in (torch.float32, dtype):
        return
    cast = weight.to(dtype)
    encoded = encode(cast, grid)
    assert torch.equal(decoded(encoded), cast) and decoded(encoded).dtype == dtype
    assert not encoded.off_grid


@given(
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from(FLOATS),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_any_floating_tensor_comes_back(shape: list[int], dtype: torch.dtype, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype) * (torch.rand(shape, generator=generator) >= sparsity)
    again = decoded(encode(tensor))
    assert torch.equal(again, tensor) and again.dtype == dtype


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn],
)
def test_other_types_are_stored_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.zeros(1000).to(dtype)
    encoded = encode(tensor)
    assert isinstance(encoded.entry, DenseTensor)
    assert decoded(encoded) is encoded.parts[""]


def test_complex_numbers_are_stored_as_they_are() -> None:
    tensor = torch.randn(5, 5, dtype=torch.complex64)
    assert torch.equal(decoded(encode(tensor)), tensor)


def test_nan_and_infinity_come_back_bit_for_bit() -> None:
    tensor = torch.zeros(1000)
    tensor[3], tensor[5], tensor[7] = math.nan, math.inf, -math.inf
    encoded = encode(tensor)
    assert isinstance(encoded.entry, SparseTensor)
    assert torch.equal(decoded(encoded).view(torch.int32), tensor.view(torch.int32))


def test_a_negative_zero_becomes_zero_where_zeros_are_not_stored_and_stays_elsewhere() -> None:
    sparse = torch.zeros(1000)
    sparse[1] = -0.0
    assert not torch.signbit(decoded(encode(sparse))).any()
    dense = torch.ones(1000)
    dense[1] = -0.0
    assert torch.signbit(decoded(encode(dense)))[1]


@pytest.mark.parametrize("transform", [lambda t: t.t(), lambda t: t[::2, 1:], lambda t: t[:1].expand(5, -1)])
def test_any_memory_layout_is_stored_row_by_row(transform: Any) -> None:
    tensor = transform(torch.randn(6, 8))
    encoded = encode(tensor)
    assert torch.equal(decoded(encoded), tensor)
    assert encoded.parts[""].is_contiguous()


def test_ninety_percent_pruned_takes_the_mask_and_a_tenth() -> None:
    weight = torch.randn(384, 384)
    keep = round(0.1 * weight.numel())
    weight.view(-1)[weight.abs().view(-1).topk(weight.numel() - keep, largest=False).indices] = 0
    encoded = encode(weight)
    assert isinstance(encoded.entry, SparseTensor)
    assert stored_bytes(encoded) == -(-weight.numel() // 8) + 4 * keep
    assert stored_bytes(encoded) <= 0.14 * weight.nbytes


def _symmetric(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Grid]:
    """A weight rounded to a grid by a rule of the test's own."""
    layout = row_layout(tuple(weight.shape))
    blocks = weight.unfold(1, group, group) if group else weight.unsqueeze(1)
    scale = blocks.abs().mean(-1) if bits == 1 else blocks.abs().amax(-1) / 2 ** (bits - 1)
    scale = scale.to(torch.bfloat16) if group else scale
    wide = scale.to(weight.dtype).repeat_interleave(group or weight.shape[1], dim=1)
    steps = (
        torch.where(weight > 0, 1.0, -1.0)
        if bits == 1
        else (weight / wide).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    return steps * wide, Grid(bits=bits, scale=scale, zero_point=None, group=group, layout=layout)


@pytest.mark.parametrize(
    ("bits", "group", "share"), [(1, None, 0.035), (4, 64, 0.14), (3, None, 0.098), (8, None, 0.254)]
)
def test_codes_take_their_bits_and_the_scales(bits: int, group: int | None, share: float) -> None:
    weight, grid = _symmetric(torch.randn(384, 384), bits, group)
    encoded = encode(weight, grid)
    assert isinstance(encoded.entry, PackedTensor)
    assert torch.equal(decoded(encoded), weight)
    assert stored_bytes(encoded) == weight.numel() * bits // 8 + grid.scale.nbytes
    assert stored_bytes(encoded) <= share * weight.nbytes


def test_pruned_and_quantized_takes_the_mask_and_codes_of_what_is_kept() -> None:
    weight, grid = _symmetric(torch.randn(384, 384), 4, None)
    weight *= torch.rand(weight.shape) > 0.9
    kept = int(weight.count_nonzero())
    encoded = encode(weight, grid)
    assert isinstance(encoded.entry, PackedTensor) and encoded.entry.kept == kept
    assert stored_bytes(encoded) == weight.numel() // 8 + -(-kept * 4 // 8) + grid.scale.nbytes


def test_a_binary_weight_with_zeros_needs_the_mask() -> None:
    weight, grid = _symmetric(torch.randn(64, 64), 1, None)
    weight[0, 0] = 0
    encoded = encode(weight, grid)
    assert isinstance(encoded.entry, PackedTensor) and encoded.entry.kept == weight.numel() - 1
    assert not encoded.off_grid
    assert torch.equal(decoded(encoded), weight)


def test_a_weight_that_left_its_grid_is_stored_in_full_and_said_so() -> None:
    weight, grid = _symmetric(torch.randn(64, 64), 4, None)
    weight[3, 3] *= 1.001
    encoded = encode(weight, grid)
    assert not isinstance(encoded.entry, PackedTensor) and encoded.off_grid
    assert torch.equal(decoded(encoded), weight)


def test_a_grid_of_another_shape_is_not_used() -> None:
    weight, grid = _symmetric(torch.randn(64, 64), 4, None)
    encoded = encode(weight[:32], grid)
    assert encoded.off_grid and torch.equal(decoded(encoded), weight[:32])


def test_a_tiny_weight_is_dense_and_not_off_its_grid() -> None:
    weight, grid = _symmetric(torch.randn(2, 2), 4, None)
    encoded = encode(weight, grid)
    assert isinstance(encoded.entry, DenseTensor) and not encoded.off_grid


def test_a_row_of_zeros_has_any_code() -> None:
    weight, grid = _symmetric(torch.randn(64, 64), 4, None)
    weight[5] = 0
    grid.scale[5] = 0
    encoded = encode(weight, grid)
    assert isinstance(encoded.entry, PackedTensor)
    assert torch.equal(decoded(encoded), weight)


def test_encoding_does_not_touch_the_tensor_or_keep_its_graph() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    before = weight.detach().clone()
    encoded = encode(weight)
    assert not encoded.parts[""].requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("case", ["dense", "sparse", "packed", "masked"])
def test_parts_of_any_other_type_or_shape_are_refused(case: str) -> None:
    weight, grid = _symmetric(torch.randn(64, 64), 4, 16)
    tensors = {
        "dense": (torch.randn(64, 64), None),
        "sparse": (weight * (torch.rand(64, 64) > 0.9), None),
        "packed": (weight, grid),
        "masked": (weight * (torch.rand(64, 64) > 0.9), grid),
    }
    encoded = encode(*tensors[case])
    found = {s: (str(part.dtype).removeprefix("torch."), list(part.shape)) for s, part in encoded.parts.items()}
    assert set(found) == suffixes(encoded.entry)
    assert parts_problem(encoded.entry, found) is None
    for suffix, (dtype, shape) in found.items():
        longer, other = [*shape[:-1], shape[-1] + 1], "int16"
        assert parts_problem(encoded.entry, found | {suffix: (dtype, longer)})
        assert parts_problem(encoded.entry, found | {suffix: (other, shape)})


def test_a_mask_with_another_number_of_bits_is_refused() -> None:
    encoded = encode(torch.eye(64))
    parts = encoded.parts | {"mask": torch.full_like(encoded.parts["mask"], 255)}
    with pytest.raises(ValueError, match="its mask keeps 4096 values and 64 are stored"):
        decode(encoded.entry, parts)


def test_a_scale_for_one_row_serves_all() -> None:
    layout = row_layout((8, 64))
    codes = torch.randint(16, (8, 64))
    grid = Grid(bits=4, scale=torch.tensor([[0.3]]), zero_point=None, group=None, layout=layout)
    weight = grid_values(grid, codes, torch.float32)
    assert torch.equal(decoded(encode(weight, grid)), weight)
    wide = replace(grid, scale=grid.scale.expand(8, 1))
    assert torch.equal(decoded(encode(weight, wide)), weight)
