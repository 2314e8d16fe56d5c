"""Quantization, binary and ternary weights: few values in every group, zeros that stay, gradients that are clipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vanishing
from vanishing import (
    Binary,
    Gradient,
    LinearSchedule,
    MagnitudePruning,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantization,
    Recipe,
    Ternary,
)

GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(size=5)]
Granularities = PerTensor | PerChannel | PerGroup


def finished(compressor: vanishing.Compressor, matrix: Tensor) -> Tensor:
    """A linear layer's weight after a transition without training."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    vanishing.prepare(nn.Sequential(layer), compressor, steps=1).finish(force=True)
    return layer.weight.detach()


def groups_of(matrix: Tensor, granularity: Granularities) -> list[Tensor]:
    """What shares a scale."""
    if isinstance(granularity, PerTensor):
        return [matrix.flatten()]
    size = granularity.size if isinstance(granularity, PerGroup) else matrix.shape[1]
    return [group for row in matrix for group in row.split(size)]


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -3e4]), st.floats(-10, 10, width=32))
matrices = st.integers(1, 12).flatmap(
    lambda columns: st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@settings(max_examples=50)
@given(values=matrices, granularity=st.sampled_from(GRANULARITIES), bits=st.integers(1, 8), symmetric=st.booleans())
def test_every_group_has_few_values_near_its_weights(
    values: list[list[float]], granularity: Granularities, bits: int, symmetric: bool
) -> None:
    matrix = torch.tensor(values)
    got = finished(Quantization(bits=bits, granularity=granularity, symmetric=symmetric or bits == 1), matrix)
    assert got.isfinite().all()
    for group, original in zip(groups_of(got, granularity), groups_of(matrix, granularity), strict=True):
        assert len(group.unique()) <= 2**bits
        if bits > 1:
            span = 2 * original.abs().max() if symmetric else original.clamp(min=0).max() - original.clamp(max=0).min()
            # Half a step, and bfloat16's rounding of a group's scale.
            reach = float(span) / (2**bits - 1) * 0.51 + float(original.abs().max()) * 0.01 + 1e-37
            assert (group - original).abs().max() <= reach


@settings(max_examples=50)
@given(values=matrices, granularity=st.sampled_from(GRANULARITIES))
def test_a_binary_group_has_one_magnitude_and_a_ternary_one_zero_too(
    values: list[list[float]], granularity: Granularities
) -> None:
    matrix = torch.tensor(values)
    for group in groups_of(finished(Binary(granularity=granularity), matrix), granularity):
        assert len(group.abs().unique()) == 1
    for group in groups_of(finished(Ternary(granularity=granularity), matrix), granularity):
        assert len(group[group != 0].abs().unique()) <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_an_asymmetric_code_uses_the_whole_range_and_keeps_zero(bits: int, granularity: Granularities) -> None:
    matrix = torch.rand(4, 15) + 0.5
    matrix[:, 3] = 0.0
    got = finished(Quantization(bits=bits, granularity=granularity, symmetric=False), matrix)
    assert not got[:, 3].any()
    assert got.min() >= 0
    torch.testing.assert_close(got.max(), matrix.max(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("make", [lambda g: Quantization(bits=1, granularity=g), lambda g: Binary(granularity=g)])
def test_one_bit_after_pruning_has_the_mean_magnitude_of_what_is_kept(granularity: Granularities, make) -> None:  # type: ignore[no-untyped-def]
    matrix = torch.randn(6, 15)
    pruned = finished(MagnitudePruning(0.6), matrix)
    got = finished(MagnitudePruning(0.6) | make(granularity), matrix)
    assert torch.equal(got.sign(), pruned.sign())
    for group, original in zip(groups_of(got, granularity), groups_of(pruned, granularity), strict=True):
        kept = original[original != 0].abs()
        if len(kept):
            torch.testing.assert_close(group[group != 0].abs(), kept.mean().expand_as(kept), rtol=1e-2, atol=0)


def test_what_was_pruned_stays_zero_under_any_quantizer_and_gets_its_gradient() -> None:
    for second in (Quantization(bits=2), Quantization(bits=3, symmetric=False), Ternary(), Binary()):
        layer = nn.Linear(16, 4, bias=False)
        recipe = Recipe({"*": MagnitudePruning(0.5) | second}, schedule=LinearSchedule(steps=4))
        transition = vanishing.prepare(nn.Sequential(layer), recipe)
        latent: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        mask = latent.abs() >= latent.abs().flatten().topk(32).values[-1]
        with transition.compressed():
            assert not layer.weight[~mask].any()
            layer.weight.sum().backward()
        assert latent.grad is not None
        assert torch.equal(latent.grad, torch.ones(4, 16))


@pytest.mark.parametrize(
    "compressor",
    [
        Quantization(bits=1, gradient=Gradient.CLIPPED),
        Binary(gradient=Gradient.CLIPPED),
        Ternary(gradient=Gradient.CLIPPED),
        MagnitudePruning(0.0) | Binary(gradient=Gradient.CLIPPED),
    ],
    ids=repr,
)
def test_a_clipped_gradient_stops_beyond_twice_the_scale(compressor: vanishing.Compressor) -> None:
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -9.0]]))
    transition = vanishing.prepare(nn.Sequential(layer), compressor, steps=4)
    transition.seek(1)
    layer.weight.sum().backward()
    latent: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    assert latent.grad is not None
    assert latent.grad.tolist() == [[1.0] * 7 + [0.75]]


@pytest.mark.parametrize(
    ("compressor", "most"),
    [
        (Quantization(bits=4, granularity=PerGroup(size=64)), 0.14),
        (Binary(), 0.035),
        (Ternary(), 0.07),
        (MagnitudePruning(0.9), 0.14),
        (MagnitudePruning(0.9) | Quantization(bits=4), 0.05),
        (MagnitudePruning(0.9) | Binary(), 0.04),
        (MagnitudePruning(0.5) | Binary(), 0.05),
    ],
    ids=repr,
)
def test_the_file_is_small(compressor: vanishing.Compressor, most: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(768, 512, bias=False))
    vanishing.prepare(model, compressor, steps=1).finish(force=True)
    vanishing.save(model, tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size <= most * 4 * 768 * 512
    loaded = vanishing.load(tmp_path / "small", nn.Sequential(nn.Linear(768, 512, bias=False)))
    assert torch.equal(loaded[0].weight, model[0].weight)  # type: ignore[arg-type, index]
