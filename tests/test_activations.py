"""Quantized inputs, against torchao, the formulas of LSQ, and what a brute search finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, MappingType, PerRow
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
from torchao.quantization.quant_primitives import _fake_quantize_affine, choose_qparams_affine

import reference
import vanishing
from vanishing import (
    ActivationQuantization,
    Calibration,
    ConfigError,
    HeadPruning,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Quantization,
    Range,
    Recipe,
    RecipeError,
    Rule,
    Score,
    StepSchedule,
)
from vanishing.compressors.activation_quantization import LearnedQuantizer
from vanishing.input_range import InputRange
from vanishing.layers import QuantizedInput
from vanishing.layers.quantized_input import InputQuantizer, TensorQuantizer, TokenQuantizer

TYPES = [torch.float32, torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("symmetric", [True, False])
W8A8 = Quantization(bits=8) | ActivationQuantization(bits=8)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers of which a few are large, a token of zeros, and one on one side of zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3
    x[0] = 0
    x[1] = x[1].abs()
    return x.to(dtype)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def at_once(model: nn.Module, technique: vanishing.Compressor, calibration: object = None) -> nn.Module:
    recipe = Recipe({"*": technique}, schedule=StepSchedule(at=0))
    return vanishing.prepare(model, recipe, calibration=calibration).finish()  # type: ignore[arg-type]


def quantizer_of(model: nn.Module) -> InputQuantizer:
    return next(module.quantizer for module in model.modules() if isinstance(module, QuantizedInput))


# The numbers, against torchao


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@both
def test_a_token_has_the_values_that_torchaos_int8_kernels_take(symmetric: bool, dtype: torch.dtype) -> None:
    x = inputs(6, 5, 24, dtype=dtype)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    expected = Int8Tensor.from_hp(x, PerRow(), mapping_type=mapping).dequantize()
    assert torch.equal(TokenQuantizer(8, symmetric, 1)(x), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_token_has_the_values_of_torchaos_fake_quantizer(bits: int, dtype: torch.dtype) -> None:
    x = inputs(6, 24, dtype=dtype)
    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{bits}"), "per_token", is_symmetric=False, eps=torch.finfo(torch.float32).eps
    )
    assert torch.equal(TokenQuantizer(bits, False, 1)(x), IntxFakeQuantizer(config)(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
@both
def test_one_range_gives_the_values_of_torchao_and_the_gradients_of_pytorch(symmetric: bool, bits: int) -> None:
    seen, x = inputs(6, 24), inputs(6, 24, seed=1) * 2
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    block = seen.shape
    eps = torch.finfo(torch.float32).eps
    scale, zero = choose_qparams_affine(seen, mapping, block, torch.int8, low, high, eps, torch.float32)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(theirs, float(scale), int(zero), low, high)
    model = nn.Sequential(nn.Linear(24, 4))
    technique = ActivationQuantization(bits=bits, range=Range.EXTREMES, symmetric=symmetric)
    got = quantizer_of(at_once(model, technique, [seen[:3], seen[3:]]))(ours)
    assert torch.equal(got, _fake_quantize_affine(x, block, scale, zero, torch.int8, low, high))
    direction = inputs(6, 24, seed=2)
    expected.backward(direction)
    got.backward(direction)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < int((ours.grad == 0).sum() - (direction == 0).sum()) < x.numel()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_convolution_has_a_range_for_each_example(dimensions: int) -> None:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layer = kind(3, 4, 2)
    x = inputs(4, 3, *[5] * dimensions)
    expected = torch.stack([reference.quantize_symmetric(each.flatten(), 8).reshape(each.shape) for each in x])
    got = quantizer_of(at_once(nn.Sequential(layer), W8A8))
    torch.testing.assert_close(got(x), expected, rtol=1e-6, atol=0)
    # Without a dimension for examples there is one.
    torch.testing.assert_close(got(x[2]), expected[2], rtol=1e-6, atol=0)


def test_the_gradient_of_a_token_is_straight_through() -> None:
    x = inputs(6, 24).requires_grad_()
    direction = inputs(6, 24, seed=2)
    TokenQuantizer(4, True, 1)(x).backward(direction)
    assert torch.equal(x.grad, direction)  # type: ignore[arg-type]


# Calibrated and learned ranges


@pytest.mark.parametrize("bits", [4, 8])
@both
def test_the_least_error_is_that_of_a_brute_search(symmetric: bool, bits: int) -> None:
    x = inputs(40, 64)

    def error(quantizer: InputQuantizer) -> float:
        return float((quantizer(x) - x).square().mean())

    low, high = (x.min().reshape(1), x.max().reshape(1))
    observer, errors = InputRange(), []
    for part in x.split(7):
        observer.observe((part,), {})
    for share in torch.linspace(0.005, 1, 400):
        candidate = InputRange()
        candidate.observe((torch.cat([low, high]) * share,), {})
        technique = ActivationQuantization(bits=bits, range=Range.EXTREMES, symmetric=symmetric)
        errors.append(error(technique._quantizer(view(candidate))))
    found = error(
        ActivationQuantization(bits=bits, range=Range.LEAST_ERROR, symmetric=symmetric)._quantizer(view(observer))
    )
    assert found <= 1.03 * min(errors)
    if bits == 4:
        assert found < 0.8 * errors[-1]


def view(observer: InputRange) -> vanishing.compressors.LayerView:
    layer = nn.Linear(4, 4)
    kind = vanishing.layers.find_kind(layer)
    assert kind is not None
    return vanishing.compressors.LayerView(layer, kind, layer.weight, kind.layout(layer, (4, 4)), observed=observer)


@pytest.mark.parametrize("shape", [(6, 24), (6, 5, 24)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("behind_relu", [False, True])
def test_a_learned_step_has_the_values_and_gradients_of_lsq(
    behind_relu: bool, bits: int, shape: tuple[int, ...]
) -> None:
    low, high = (0, 2**bits - 1) if behind_relu else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    zero = torch.tensor([-(2.0 ** (bits - 1))], dtype=torch.float64) if behind_relu else None
    x = inputs(*shape).double()
    x = x.relu() + 1e-9 if behind_relu else x
    quantizer = LearnedQuantizer(bits, x.abs().mean().reshape(1), zero)
    torch.testing.assert_close(quantizer.step, (2 * x.abs().mean() / high**0.5).reshape(1))
    step = quantizer.step.detach().clone().requires_grad_()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = reference.learned_step(theirs, step, low, high, x[0].numel())
    got = quantizer(ours)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direction = inputs(*shape, seed=2).double()
    expected.backward(direction)
    got.backward(direction)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(quantizer.step.grad, step.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(quantizer.plain()(x), got.detach())


def test_a_step_is_learned_while_the_original_fades_and_stays_afterwards() -> None:
    model, x = perceptron(), inputs(16, 24)
    technique = Quantization(bits=4) | ActivationQuantization(bits=4, range=Range.LEARNED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe({"*": technique}, schedule=LinearSchedule(start=1, steps=3))
    transition = vanishing.prepare(model, recipe, calibration=[x], optimizer=optimizer)
    (step, _) = [p for name, p in model.named_parameters() if name.endswith("step")]
    values = []
    for _ in range(5):
        model(x).square().mean().backward()
        values.append(float(step.detach()))
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    # Until the fade begins it has no part in anything.
    assert values[0] == values[1] == values[2] and len(set(values[2:])) == 3
    transition.finish()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and id(step) not in held
    quantizer = quantizer_of(model)
    assert isinstance(quantizer, TensorQuantizer) and torch.equal(quantizer.scale, step.abs())


def test_each_technique_of_a_chain_looks_at_the_batches_itself() -> None:
    x = inputs(64, 24)
    expected = at_once(perceptron(), MagnitudePruning(0.5, score=Score.WANDA), [x])
    technique = MagnitudePruning(0.5, score=Score.WANDA) | ActivationQuantization(bits=8, range=Range.EXTREMES)
    got = at_once(perceptron(), technique, [x])
    assert torch.equal(got[0].weight, expected[0].weight)  # type: ignore[index]
    torch.testing.assert_close(quantizer_of(got).scale, (x.abs().max() / 127.5).reshape(1))
    labels = Calibration(batches=[x], loss=lambda model, batch: model(batch).square().mean())
    technique = MagnitudePruning(0.5, score=Score.FIRST_ORDER) | ActivationQuantization(bits=8, range=Range.EXTREMES)
    got = at_once(perceptron(), technique, labels)
    expected = at_once(perceptron(), MagnitudePruning(0.5, score=Score.FIRST_ORDER), labels)
    assert torch.equal(got[0].weight, expected[0].weight)  # type: ignore[index]


def test_weights_are_drawn_to_their_codes_as_without_quantized_inputs() -> None:
    ends = []
    for technique in (Quantization(bits=2, damping=0.1), Quantization(bits=2, damping=0.1) | ActivationQuantization(8)):
        model = perceptron()[:1]
        transition = vanishing.prepare(model, technique, steps=1)
        transition.step()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(5):
            (0.0 * model(inputs(4, 24)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        ends.append(model[0].get_submodule("parametrizations.weight").get_parameter("original"))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], perceptron()[0].get_parameter("weight"))


# In a model


def test_the_blend_is_that_of_the_layers_outputs() -> None:
    model, plain, x = perceptron()[:1], perceptron()[:1], inputs(16, 24)
    technique = Quantization(bits=4) | ActivationQuantization(bits=4)
    transition = vanishing.prepare(model, technique, steps=10)
    transition.seek(7)
    small = at_once(perceptron()[:1], technique)
    torch.testing.assert_close(model(x), reference.blend_outputs(0.3, plain, small, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_weight", [Quantization(bits=4), MagnitudePruning(0.5) | Quantization(bits=4)], ids=repr)
def test_weights_and_inputs_fade_each_in_a_window_of_its_own(
    on_weight: vanishing.WeightCompressor, tmp_path: Path
) -> None:
    x, on_input = inputs(16, 24), ActivationQuantization(bits=4, range=Range.EXTREMES)
    chain = on_weight | on_input
    count = len(chain.compressors) - 1
    windows = [LinearSchedule(steps=10)] * count + [LinearSchedule(start=10, steps=10)]
    recipe = Recipe({"*": Rule(chain, schedules=windows)}, schedule=StepSchedule(at=0))  # type: ignore[arg-type]
    model, plain = perceptron()[:1], perceptron()[:1]
    transition = vanishing.prepare(model, recipe, calibration=[x])
    assert torch.equal(model(x), plain(x))
    small, smaller = (at_once(perceptron()[:1], t, [x] if t is chain else None) for t in (on_weight, chain))
    transition.seek(10)
    torch.testing.assert_close(model(x), small(x))
    transition.seek(17)
    torch.testing.assert_close(model(x), reference.blend_outputs(0.3, small, smaller, x))
    transition.seek(20)
    torch.testing.assert_close(model(x), smaller(x))
    transition.finish()
    torch.testing.assert_close(model(x), smaller(x))
    vanishing.save(model, tmp_path / "small")
    assert torch.equal(vanishing.load(tmp_path / "small", perceptron()[:1])(x), model(x))
    assert vanishing.summary(model).after == vanishing.summary(smaller).after


def test_a_local_loss_compares_the_outputs_of_both_forms() -> None:
    x, technique = inputs(16, 24), Quantization(bits=4) | ActivationQuantization(bits=4)
    model, plain = perceptron()[:1], perceptron()[:1]
    recipe = Recipe({"*": technique}, schedule=LinearSchedule(steps=10), distillation=[LocalLoss(weight=1.0)])
    transition = vanishing.prepare(model, recipe)
    small = at_once(perceptron()[:1], technique)
    for step in (0, 3):
        transition.seek(step)
        model(x)
        expected = (small(x) - plain(x)).square().sum() / plain(x).square().sum()
        torch.testing.assert_close(transition.auxiliary_loss(), expected, rtol=1e-4, atol=0)


def test_under_autocast_beta_1_changes_no_bit_and_the_end_is_that_of_the_finished_model() -> None:
    model, plain, x = perceptron(), perceptron(), inputs(16, 24)
    transition = vanishing.prepare(model, W8A8, steps=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    transition.seek(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        assert output.dtype is torch.bfloat16
    output.float().square().mean().backward()
    transition.seek(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
    transition.finish()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), expected)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_a_layer_answers_for_the_one_that_it_holds_and_hooks_see_the_input_as_it_came() -> None:
    model, x = perceptron(), inputs(16, 24)
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    at_once(model, W8A8)
    model(x)
    assert torch.equal(seen[0], x)
    layer = model[0]
    assert isinstance(layer, QuantizedInput)
    assert layer.weight is layer.layer.weight and layer.in_features == 24
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_layers_that_share_a_weight_share_what_their_inputs_go_through(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
        model[2].weight = model[0].weight
        return model

    model, x = build(), inputs(16, 24)
    technique = Quantization(bits=8) | ActivationQuantization(bits=8, range=Range.EXTREMES)
    expected = at_once(model, technique, [x])(x)
    assert model[0].quantizer is model[2].quantizer and model[0].weight is model[2].weight
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build())
    assert torch.equal(loaded(x), expected)
    assert loaded[0].weight is loaded[2].weight  # type: ignore[index]


class Attention(nn.Module):
    """Self-attention with the names that HeadPruning knows."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        return self.o_proj((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("first", [LowRank(rank=3), HeadPruning(0.5), Quantization(bits=4), W8A8], ids=repr)
@pytest.mark.parametrize("second", [W8A8, MagnitudePruning(0.5)], ids=repr)
def test_a_compressed_model_is_compressed_again_and_loaded(
    first: vanishing.Compressor, second: vanishing.Compressor, tmp_path: Path
) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(Attention())

    model, x = build(0), torch.randn(2, 5, 16)
    at_once(model, first)
    if first == second:
        with pytest.raises(RecipeError, match="its input is quantized already"):
            at_once(model, second)
        return
    at_once(model, second)
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build(1))
    assert torch.equal(loaded(x), model(x))
    summary = vanishing.summary(loaded, (x,))
    assert str(summary) == str(vanishing.summary(model, (x,)))
    # What was done to the same layer before is not repeated.
    both = first == W8A8 or isinstance(first, LowRank)
    expected = f"{first!r}, then {second!r}" if both else repr(second)
    assert [row.technique for row in summary.rows] == [expected] * 4


def test_a_row_of_the_summary_is_the_layer_by_its_old_name() -> None:
    model, x = perceptron(), inputs(16, 24)
    before = vanishing.summary(model, x)
    transition = vanishing.prepare(model, W8A8, steps=1)
    during = vanishing.summary(model, x)
    transition.step()
    after = vanishing.summary(transition.finish(), x)
    for summary in (during, after):
        assert [(row.name, row.layer) for row in summary.rows] == [("0", "Linear"), ("2", "Linear")]
        assert summary.before.bytes == before.before.bytes
        assert summary.after == during.after
        assert summary.after.multiply_accumulates == before.after.multiply_accumulates
    assert {row.technique for row in after.rows} == {repr(W8A8)}


# What is refused


def test_a_glob_leaves_layers_that_are_not_called_and_says_why() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LSTM(8, 8), nn.Linear(8, 8))
    rows = {row.name: row for row in Recipe({"*": W8A8}, schedule=StepSchedule(at=0)).match(model).rows}
    assert [name for name, row in rows.items() if row.outcome == "compress"] == ["2"]
    assert "reads its weight and never calls it" in rows["0.self_attn.out_proj"].detail
    assert "in evaluation nn.TransformerEncoderLayer reads" in rows["0.linear1"].detail
    assert "more than multiply its one input" in rows["1"].detail


def test_what_cannot_be_done_is_said_before_anything_changes() -> None:
    for bits in (1, 9):
        with pytest.raises(ConfigError, match="the width of a code in bits, 2 to 8"):
            ActivationQuantization(bits=bits)
    with pytest.raises(ConfigError, match="in the order low rank, pruning, quantization, activation quantization"):
        _ = ActivationQuantization(bits=8) | Quantization(bits=8)
    with pytest.raises(ConfigError, match=r"Finish that, then prepare ActivationQuantization"):
        _ = LowRank(rank=2) | ActivationQuantization(bits=8)
    with pytest.raises(ConfigError, match="no strength between none and full"):
        Recipe({"*": W8A8}, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=4))
    model = perceptron()
    with pytest.raises(RecipeError, match="looks at batches, and none were given"):
        vanishing.prepare(model, ActivationQuantization(bits=8, range=Range.LEARNED), steps=4)
    with pytest.raises(RecipeError, match="the whole model has no place to be replaced in"):
        vanishing.prepare(nn.Linear(4, 4), W8A8, steps=4)
    model[0].forward = model[0].forward
    with pytest.raises(RecipeError, match="its forward was patched on the object"):
        vanishing.prepare(model, W8A8, steps=4)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
