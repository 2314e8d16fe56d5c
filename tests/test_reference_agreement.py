"""The library against the textbook formulas of `reference.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn
from torch.func import functional_call

import reference
import vanishing
from vanishing import Binary, Compressor, Global, Gradient, LowRank, MagnitudePruning, Quantization, Ternary
from vanishing.compressors.selection import border_near, keep_largest
from vanishing.granularity import NM, PerChannel, PerGroup, PerTensor
from vanishing.schedules import Fade

AT_ONCE = vanishing.StepSchedule(at=0)
WHOLE_LIFE = settings(max_examples=40)
"""For tests that prepare and finish a model for every example."""

# Few distinct values make ties, zeros and constant weights; any others are kept from underflow.
VALUES = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0]) | st.floats(-2, 2, allow_subnormal=False).filter(
    lambda value: value == 0 or abs(value) > 1e-6
)


def matrices(rows: int = 5, columns: int = 12, multiple_of: int = 1) -> st.SearchStrategy[Tensor]:
    """Random matrices in double precision, in which the order of a sum cannot move a rounded value."""
    shapes = st.tuples(st.integers(1, rows), st.integers(1, columns // multiple_of).map(lambda n: n * multiple_of))
    arrays = shapes.flatmap(lambda shape: st_numpy.arrays(np.float64, shape, elements=VALUES))
    return arrays.map(lambda array: torch.from_numpy(array + 0.0))


def linear_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def finished(model: nn.Module, compressor: Compressor) -> nn.Module:
    recipe = vanishing.Recipe({"*": compressor}, schedule=AT_ONCE)
    return vanishing.prepare(model, recipe).finish()


def compressed(weight: Tensor, compressor: Compressor) -> Tensor:
    layer = finished(nn.Sequential(linear_layer(weight)), compressor)[0]  # type: ignore[index]
    return layer.weight.detach()


def assert_same_pruning(pruned: Tensor, weight: Tensor, expected: Tensor) -> None:
    """Ties may fall either way: the magnitudes that are kept agree, and what is kept is unchanged."""
    assert torch.equal(pruned.abs().flatten().sort().values, expected.abs().flatten().sort().values)
    assert bool(((pruned == weight) | (pruned == 0)).all())


# Pruning


@WHOLE_LIFE
@given(matrices(), st.floats(0, 1))
def test_pruning_a_tensor_keeps_the_largest_magnitudes(weight: Tensor, sparsity: float) -> None:
    pruned = compressed(weight, MagnitudePruning(sparsity))
    assert_same_pruning(pruned, weight, reference.prune_per_tensor(weight, sparsity))


@WHOLE_LIFE
@given(matrices(), st.floats(0, 1))
def test_pruning_rows_keeps_the_largest_magnitudes_of_each(weight: Tensor, sparsity: float) -> None:
    pruned = compressed(weight, MagnitudePruning(sparsity, granularity=PerChannel()))
    for row, original, expected in zip(pruned, weight, reference.prune_per_row(weight, sparsity), strict=True):
        assert_same_pruning(row, original, expected)


@WHOLE_LIFE
@given(matrices(), matrices(), st.floats(0, 1))
def test_global_pruning_ranks_all_layers_together(first: Tensor, second: Tensor, sparsity: float) -> None:
    model = finished(
        nn.ModuleList([linear_layer(first), linear_layer(second)]), MagnitudePruning(sparsity, granularity=Global())
    )
    pruned = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    expected = torch.cat([part.flatten() for part in reference.prune_globally([first, second], sparsity)])
    assert_same_pruning(pruned, torch.cat([first.flatten(), second.flatten()]), expected)


@WHOLE_LIFE
@given(matrices(multiple_of=4), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
def test_n_of_m_pruning_keeps_the_largest_of_every_group(weight: Tensor, n_of_m: tuple[int, int]) -> None:
    n, m = n_of_m
    pruned = compressed(weight, MagnitudePruning(granularity=NM(n=n, m=m)))
    groups = zip(pruned.reshape(-1, m), weight.reshape(-1, m), strict=True)
    for (group, original), expected in zip(groups, reference.prune_n_of_m(weight, n, m).reshape(-1, m), strict=True):
        assert_same_pruning(group, original, expected)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), Global()])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_sparsity_of_a_constant_weight_is_exact(granularity: PerTensor | PerChannel | Global, value: float) -> None:
    weight = torch.full((6, 10), value)
    model = nn.Sequential(linear_layer(weight))
    compressor = MagnitudePruning(0.7, granularity=granularity)
    transition = vanishing.prepare(model, vanishing.Recipe({"*": compressor}, schedule=AT_ONCE))
    mask = next(buffer for name, buffer in model.named_buffers() if name.endswith("mask"))
    assert int(mask.count_nonzero()) == 18
    transition.finish()
    assert int(model.get_parameter("0.weight").count_nonzero()) == (18 if value else 0)


@given(matrices(), st.data())
def test_selection_does_not_depend_on_the_guess(weight: Tensor, data: st.DataObject) -> None:
    magnitudes = [row.abs() for row in weight]
    keep = data.draw(st.integers(0, weight.numel()))
    guess = data.draw(st.none() | st.floats(0, 3))
    masks, _ = keep_largest(magnitudes, keep, guess)
    kept = torch.cat([m[mask] for m, mask in zip(magnitudes, masks, strict=True)])
    assert torch.equal(kept.sort().values, reference.kept_magnitudes(weight, keep))


@given(matrices(), st.data())
def test_warm_started_selection_is_exact_or_declines(weight: Tensor, data: st.DataObject) -> None:
    magnitudes = [row.abs() for row in weight]
    keep = data.draw(st.integers(1, weight.numel()))
    smallest_kept = reference.kept_magnitudes(weight, keep)[0]
    guess = data.draw(st.floats(0, 3) | st.just(float(smallest_kept)))
    width = data.draw(st.sampled_from([0.02, 0.2]))
    border = border_near(magnitudes, keep, guess, width)
    if border is not None:
        assert border == smallest_kept
    else:
        assert not guess * (1 - width) <= smallest_kept <= guess * (1 + width)


# Quantization

GROUP = 5


@WHOLE_LIFE
@given(matrices())
def test_binary_weights(weight: Tensor) -> None:
    by_row = reference.binary_per_row(weight)
    by_group = reference.quantize_groups(weight, GROUP, lambda w: reference.quantize_symmetric(w, 1, torch.bfloat16))
    torch.testing.assert_close(compressed(weight, Binary()), by_row)
    torch.testing.assert_close(compressed(weight, Quantization(bits=1)), by_row)
    torch.testing.assert_close(compressed(weight, Binary(granularity=PerTensor())), reference.binary_per_tensor(weight))
    torch.testing.assert_close(compressed(weight, Binary(granularity=PerGroup(size=GROUP))), by_group)


@WHOLE_LIFE
@given(matrices())
def test_ternary_weights(weight: Tensor) -> None:
    assume(all(_far_from_threshold(block) for row in weight for block in (row, *row.split(GROUP))))
    assume(_far_from_threshold(weight))
    by_group = reference.quantize_groups(weight, GROUP, lambda w: reference.ternary_vector(w, torch.bfloat16))
    torch.testing.assert_close(compressed(weight, Ternary()), reference.ternary_per_row(weight))
    torch.testing.assert_close(compressed(weight, Ternary(granularity=PerTensor())), reference.ternary_vector(weight))
    torch.testing.assert_close(compressed(weight, Ternary(granularity=PerGroup(size=GROUP))), by_group)


def _far_from_threshold(block: Tensor) -> bool:
    """Whether the rounding of the mean cannot move a weight across the ternary threshold."""
    threshold = 0.7 * block.abs().mean()
    return bool(((block.abs() - threshold).abs() >= 1e-9 * threshold).all())


@pytest.mark.parametrize("symmetric", [True, False])
@WHOLE_LIFE
@given(weight=matrices(), bits=st.integers(2, 8))
def test_uniform_quantization(symmetric: bool, weight: Tensor, bits: int) -> None:
    formula = reference.quantize_symmetric if symmetric else reference.quantize_asymmetric

    def by_group(w: Tensor) -> Tensor:
        return formula(w, bits, torch.bfloat16)

    expected: dict[PerTensor | PerChannel | PerGroup, Tensor] = {
        PerTensor(): formula(weight, bits),
        PerChannel(): torch.stack([formula(row, bits) for row in weight]),
        PerGroup(size=GROUP): reference.quantize_groups(weight, GROUP, by_group),
    }
    for granularity, quantized in expected.items():
        found = compressed(weight, Quantization(bits=bits, granularity=granularity, symmetric=symmetric))
        torch.testing.assert_close(found, quantized)


# Low rank


@WHOLE_LIFE
@given(matrices(rows=8), st.data())
def test_low_rank_is_the_best_approximation(weight: Tensor, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(weight.shape)))
    expected = reference.best_rank(weight, rank)
    layers = finished(nn.Sequential(linear_layer(weight)), LowRank(rank=rank))[0]  # type: ignore[index]
    product = (layers[1].weight @ layers[0].weight).detach()
    # With equal singular values the best approximation is not unique; its error is.
    torch.testing.assert_close((weight - product).norm(), (weight - expected).norm(), atol=1e-9, rtol=1e-9)
    assert int(torch.linalg.matrix_rank(product, atol=1e-9)) <= rank
    assert layers[1].weight.shape[1] == rank


@WHOLE_LIFE
@given(matrices(rows=8), st.floats(0.01, 1))
def test_energy_gives_the_smallest_sufficient_rank(weight: Tensor, fraction: float) -> None:
    energies = torch.linalg.svdvals(weight) ** 2
    shares = energies.cumsum(0) / energies.sum()
    assume(bool(((shares - fraction).abs() > 1e-9).all()))
    layers = finished(nn.Sequential(linear_layer(weight)), LowRank(energy=fraction))[0]  # type: ignore[index]
    assert layers.rank == reference.energy_rank(weight, fraction)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (vanishing.LinearSchedule, reference.linear),
        (vanishing.CosineSchedule, reference.cosine),
        (vanishing.PolynomialSchedule, lambda t, steps: reference.polynomial(t, steps, 3)),
        (vanishing.ExponentialSchedule, lambda t, steps: reference.exponential(t, steps, 5)),
        (vanishing.SigmoidSchedule, lambda t, steps: reference.sigmoid(t, steps, 10)),
    ],
)
@given(t=st.integers(0, 3_000), steps=st.integers(1, 2_000), start=st.integers(0, 500))
def test_schedules(
    schedule: Callable[..., Fade], formula: Callable[[int, int], float], t: int, steps: int, start: int
) -> None:
    assert math.isclose(schedule(steps=steps, start=start)(t), formula(max(t - start, 0), steps), abs_tol=1e-12)


# Blending in weight space against blending outputs


def _pruned(weight: Tensor) -> Tensor:
    return reference.straight_through(weight, reference.prune_per_tensor(weight, 0.6))


def _pruned_exactly(weight: Tensor) -> Tensor:
    return weight * (reference.prune_per_tensor(weight.detach(), 0.6) != 0)


def _four_bits(weight: Tensor) -> Tensor:
    rows = torch.stack([reference.quantize_symmetric(row, 4) for row in weight.detach()])
    return reference.straight_through(weight, rows)


def _binary_clipped(weight: Tensor) -> Tensor:
    inside = weight.detach().abs() <= 2 * weight.detach().abs().mean(dim=1, keepdim=True)
    return reference.straight_through(weight * inside, reference.binary_per_row(weight.detach()))


FORMS: dict[str, tuple[Compressor, Callable[[Tensor], Tensor]]] = {
    "pruned": (MagnitudePruning(0.6), _pruned),
    "pruned_exact_gradient": (MagnitudePruning(0.6, gradient=Gradient.EXACT), _pruned_exactly),
    "4_bits": (Quantization(bits=4), _four_bits),
    "binary_clipped": (Binary(gradient=Gradient.CLIPPED), _binary_clipped),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(3, 4, 7, dtype=torch.float64)),
    "conv2d_groups": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        lambda: torch.randn(2, 4, 5, 5, dtype=torch.float64),
    ),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (3, 4))),
}


def _gradients(output: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), of))


def _in_transition(layer: nn.Module, compressor: Compressor, step: int) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    recipe = vanishing.Recipe({"0": compressor}, schedule=vanishing.LinearSchedule(steps=10))
    vanishing.prepare(model, recipe).seek(step)
    return model


@pytest.mark.parametrize("step", [1, 4, 9])
@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("form_name", FORMS)
def test_weight_space_blends_as_outputs_do(form_name: str, layer_name: str, step: int) -> None:
    compressor, formula = FORMS[form_name]
    make, inputs = LAYERS[layer_name]
    layer, x = make().double(), inputs()
    differentiable = [x.requires_grad_()] if x.is_floating_point() else []
    model = _in_transition(layer, compressor, step)
    names = [name for name, _ in layer.named_parameters()]
    latent = [dict(model.named_parameters())[_latent_name(model, name)] for name in names]

    def compressed_layer(batch: Tensor) -> Tensor:
        weight = layer.get_parameter("weight")
        return functional_call(layer, {"weight": formula(weight.flatten(1)).reshape(weight.shape)}, (batch,))

    expected = reference.blend_outputs(1 - step / 10, layer, compressed_layer, x)
    output = model(x)
    torch.testing.assert_close(output, expected)
    expected_gradients = _gradients(expected, [*layer.parameters(), *differentiable])
    torch.testing.assert_close(_gradients(output, [*latent, *differentiable]), expected_gradients)


def _latent_name(model: nn.Module, name: str) -> str:
    return "0.parametrizations.weight.original" if name == "weight" else f"0.{name}"


@pytest.mark.parametrize("step", [1, 4, 9])
def test_low_rank_in_weight_space_blends_as_two_paths_do(step: int) -> None:
    layer = nn.Linear(7, 5).double()
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    model = _in_transition(layer, LowRank(rank=2), step)
    parameters = dict(model.named_parameters())
    latent, bias = parameters.pop("0.parametrizations.weight.original"), parameters.pop("0.bias")
    down, up = (parameters.pop(next(n for n in parameters if n.endswith(f"factors.{i}.weight"))) for i in (0, 1))
    assert not parameters
    factors = [factor.detach().clone().requires_grad_() for factor in (down, up)]

    def compressed_layer(batch: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(batch, factors[0]), factors[1], layer.bias)

    expected = reference.blend_outputs(1 - step / 10, layer, compressed_layer, x)
    output = model(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        _gradients(output, [latent, bias, down, up, x]),
        _gradients(expected, [layer.weight, layer.bias, *factors, x]),
    )
