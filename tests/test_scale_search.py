"""Scales of least rounding error: against brute force, never worse than the whole range, and kept between searches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
import vanishing
from vanishing import (
    ConfigError,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantization,
    Recipe,
    RecipeError,
    Score,
    StepSchedule,
)
from vanishing.compressors import Chain

GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(size=5)]
Granularities = PerTensor | PerChannel | PerGroup


def weight(seed: int = 0, rows: int = 4, columns: int = 13, dtype: torch.dtype = torch.float64) -> Tensor:
    """With tails, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype) ** 3


def compressed(matrix: Tensor, technique: vanishing.Compressor, calibration: list[Tensor] | None = None) -> Tensor:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    recipe = Recipe({"*": technique}, schedule=StepSchedule(at=0))
    vanishing.prepare(nn.Sequential(layer), recipe, calibration=calibration).finish()
    return layer.weight.detach()


def blocks(matrix: Tensor, granularity: Granularities) -> list[Tensor]:
    """What shares a scale."""
    if isinstance(granularity, PerTensor):
        return [matrix.flatten()]
    size = granularity.size if isinstance(granularity, PerGroup) else matrix.shape[1]
    return [part for row in matrix for part in row.split(size)]


def assert_blocks(got: Tensor, matrix: Tensor, granularity: Granularities, find, importance: Tensor) -> None:  # type: ignore[no-untyped-def]
    scale_type = torch.bfloat16 if isinstance(granularity, PerGroup) else None
    triples = zip(*(blocks(m, granularity) for m in (got, matrix, importance)), strict=True)
    for block, original, counts in triples:
        torch.testing.assert_close(block, find(original, counts, scale_type))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_is_the_one_that_brute_force_finds(bits: int, symmetric: bool, granularity: Granularities) -> None:
    matrix = weight(bits)
    got = compressed(matrix, Quantization(bits, symmetric=symmetric, granularity=granularity, clip=0.3))

    def find(block: Tensor, _: Tensor, scale_type: torch.dtype | None) -> Tensor:
        return reference.search_scale(block, bits, 0.3, symmetric=symmetric, scale_type=scale_type)

    assert_blocks(got, matrix, granularity, find, torch.ones_like(matrix))


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -3e4]), st.floats(-10, 10, width=32))
matrices = st.integers(1, 12).flatmap(
    lambda columns: st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@settings(max_examples=50)
@given(matrices, st.sampled_from(GRANULARITIES), st.integers(2, 8), st.booleans(), st.floats(0.1, 1))
def test_no_block_has_a_larger_error_than_over_its_whole_range(
    values: list[list[float]], granularity: Granularities, bits: int, symmetric: bool, clip: float
) -> None:
    matrix = torch.tensor(values)
    searched, whole = (
        compressed(matrix, Quantization(bits, granularity=granularity, symmetric=symmetric, clip=share))
        for share in (clip, 1.0)
    )
    for one, other, block in zip(*(blocks(m, granularity) for m in (searched, whole, matrix)), strict=True):
        assert len(one.unique()) <= 2**bits
        least, most = ((each - block).double().square().sum() for each in (one, other))
        assert least <= most * (1 + 1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_weighted_errors_count_by_what_weights_are_multiplied_with(granularity: Granularities) -> None:
    matrix, x = weight(1), torch.randn(40, 13, dtype=torch.float64) * torch.logspace(-2, 1, 13, dtype=torch.float64)
    technique = Quantization(3, granularity=granularity, clip=0.3, weighted=True)
    got = compressed(matrix, technique, [x[:15], x[15:]])
    importance = x.square().mean(0).expand_as(matrix)

    def find(block: Tensor, counts: Tensor, scale_type: torch.dtype | None) -> Tensor:
        return reference.search_scale(block, 3, 0.3, importance=counts, scale_type=scale_type)

    assert_blocks(got, matrix, granularity, find, importance)
    plain = compressed(matrix, Quantization(3, granularity=granularity, clip=0.3))
    errors = [((each - matrix) ** 2 * importance).sum() for each in (got, plain)]
    assert errors[0] < errors[1]


def test_groups_of_a_convolution_have_inputs_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2, bias=False, dtype=torch.float64))
    kernel = model[0].get_parameter("weight").detach().clone() ** 3
    model[0].get_parameter("weight").data.copy_(kernel)
    x = torch.randn(9, 4, 5, 5, dtype=torch.float64) * torch.tensor([0.1, 9.0, 3.0, 0.2]).reshape(1, 4, 1, 1)
    technique = Quantization(3, clip=0.3, weighted=True)
    vanishing.prepare(model, Recipe({"*": technique}, schedule=StepSchedule(at=0)), calibration=[x]).finish()
    patches = nn.functional.unfold(x, 2).transpose(1, 2).reshape(-1, 2, 8).square().mean(0)
    for row, original, group in zip(model[0].get_parameter("weight"), kernel, [0, 0, 0, 1, 1, 1], strict=True):
        expected = reference.search_scale(original.flatten(), 3, 0.3, importance=patches[group])
        torch.testing.assert_close(row.detach().flatten(), expected)


def test_a_scale_is_searched_for_after_pruning_on_what_is_kept() -> None:
    matrix = weight(2)
    got = compressed(matrix, MagnitudePruning(0.5) | Quantization(3, clip=0.3))
    kept = reference.prune_per_tensor(matrix, 0.5)
    for row, masked in zip(got, kept, strict=True):
        torch.testing.assert_close(row, reference.search_scale(masked, 3, 0.3))


def test_calibrated_pruning_does_not_weigh_the_errors_of_rounding() -> None:
    matrix, x = weight(2), torch.randn(40, 13, dtype=torch.float64) * torch.logspace(-2, 1, 13, dtype=torch.float64)
    got = compressed(matrix, MagnitudePruning(0.5, score=Score.WANDA) | Quantization(3, clip=0.3), [x])
    for row, original in zip(got, matrix, strict=True):
        torch.testing.assert_close(row, reference.search_scale(original * (row != 0), 3, 0.3))


@pytest.mark.parametrize("technique", [Quantization(2, clip=0.3), MagnitudePruning(0.5) | Quantization(2, clip=0.3)])
def test_shares_are_kept_between_searches_and_renewed_by_turns(technique: vanishing.Compressor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 5))
    transition = vanishing.prepare(model, Recipe({"*": technique}, schedule=LinearSchedule(steps=100)))
    names = [name for name, _ in model.named_buffers() if name.endswith("share")]
    assert len(names) == 2
    changed: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(40):
        before = {name: model.get_buffer(name).clone() for name in names}
        with torch.no_grad():
            for part in (model[0], model[2]):
                latent: Tensor = part.parametrizations.weight.original  # type: ignore[union-attr, assignment]
                latent.add_(torch.randn_like(latent) * latent.abs())
        transition.step()
        for name in names:
            if not torch.equal(before[name], model.get_buffer(name)):
                changed[name].append(transition.steps_done)
    assert list(changed.values()) == [[16, 32], [15, 31]]
    transition.seek(100)
    for part in (model[0], model[2]):
        latent = part.parametrizations.weight.original.detach()  # type: ignore[union-attr, operator]
        kept = reference.prune_per_tensor(latent, 0.5) if isinstance(technique, Chain) else latent
        rounded = torch.stack([reference.search_scale(row, 2, 0.3) for row in kept])
        torch.testing.assert_close(part.weight.detach(), rounded)  # type: ignore[operator]


def test_under_a_ramp_it_is_searched_for_at_the_bits_of_the_moment() -> None:
    matrix = weight(3, dtype=torch.float32)
    layer = nn.Linear(13, 4, bias=False)
    layer.weight.data.copy_(matrix)
    recipe = Recipe({"*": Quantization(2, clip=0.3)}, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=30))
    transition = vanishing.prepare(nn.Sequential(layer), recipe)
    assert torch.equal(layer.weight, matrix)
    for step, bits in ((10, 6), (20, 4), (30, 2)):
        transition.seek(step)
        torch.testing.assert_close(
            layer.weight.detach(), torch.stack([reference.search_scale(row, bits, 0.3) for row in matrix])
        )


def test_what_cannot_be_weighted_is_refused() -> None:
    technique = Quantization(4, clip=0.5, weighted=True)
    with pytest.raises(RecipeError, match=r"'0' looks at batches, and none were given"):
        vanishing.prepare(nn.Sequential(nn.Linear(4, 4)), technique, steps=4)
    with pytest.raises(RecipeError, match=r"cannot be observed. Use weighted=False for it"):
        vanishing.prepare(nn.Sequential(nn.LSTM(4, 4)), technique, steps=4, calibration=[torch.randn(2, 3, 4)])
    with pytest.raises(ConfigError, match="After another technique use weighted=False"):
        LowRank(rank=4) | technique
