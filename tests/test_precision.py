"""Models and training in other types than single precision: half, bfloat16, double, and autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vanishing
from cases import LAYERS, TECHNIQUES, Pair, Run, loss, tensors
from vanishing import Binary, LinearSchedule, LowRank, MagnitudePruning, PerTensor, Quantization, Ternary
from vanishing.blend import Blend

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

END = 5
LOW = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
every_technique = pytest.mark.parametrize(
    "technique", [pytest.param(n, marks=() if t.quick else pytest.mark.slow) for n, t in TECHNIQUES.items()]
)
some_layers = pytest.mark.parametrize("layer", ["linear", "conv2d_groups", "transposed2d", "encoder", "lstm"])


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A type that a whole model may have."""
    return request.param


def pair_of(layer: str, technique: str) -> Pair:
    """A cell of the table, or skip the test where it is refused."""
    pair = Pair(LAYERS[layer], TECHNIQUES[technique])
    if pair.layer.refusal(pair.technique):
        pytest.skip("refused")
    return pair


def evaluated(run: Run) -> list[Tensor]:
    """The outputs in evaluation, by the path that training takes."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return tensors(run.model.eval()(*run.layer.batch(99, run.dtype)))
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
        run.model.train()


@some_layers
@every_technique
def test_a_model_of_another_type_is_compressed_in_it(layer: str, technique: str, dtype: torch.dtype) -> None:
    run = pair_of(layer, technique).prepare(dtype=dtype)
    if dtype is torch.float16:
        # AdamW itself divides by zero in this type: only the clock moves.
        run.transition.seek(END)
    else:
        run.train(END)
    assert all(p.dtype is dtype for p in run.model.parameters())
    expected = evaluated(run)
    assert all(tensor.dtype is dtype and tensor.isfinite().all() for tensor in expected)
    run.transition.finish()
    assert all(p.dtype is dtype for p in run.model.parameters())
    for got, wanted in zip(evaluated(run), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=LOW.get(dtype, 1e-12), atol=LOW.get(dtype, 1e-12))


@every_technique
def test_a_model_may_be_cast_during_its_transition(technique: str, dtype: torch.dtype) -> None:
    run = pair_of("linear", technique).prepare()
    run.train(2)
    run.model.to(dtype)
    # A technique on the factors of another one is in force from the beginning.
    shares = {float(m.beta_tensor) for m in run.model.modules() if isinstance(m, Blend)}
    assert run.transition.beta == 0.5 and {0.5} <= shares <= {0.5, 0.0}
    masks = [buffer for name, buffer in run.model.named_buffers() if name.endswith("mask")]
    assert all(mask.dtype is torch.bool for mask in masks)
    x = run.layer.batch(0, dtype)[0]
    for _ in range(3):
        assert run.model(x).dtype is dtype
        loss(run.model(x)).backward()
        run.transition.step()
    expected = run.model(x)
    run.transition.finish()
    torch.testing.assert_close(run.model(x), expected, rtol=LOW.get(dtype, 1e-12), atol=LOW.get(dtype, 1e-12))


@some_layers
@every_technique
def test_autocast_trains_and_evaluates_in_bfloat16(layer: str, technique: str) -> None:
    run = pair_of(layer, technique).prepare()
    plain = run.layer.build()
    batch = run.layer.batch()

    def outputs(model: nn.Module) -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return tensors(model(*batch))

    assert all(torch.equal(a, b) for a, b in zip(outputs(run.model), outputs(plain), strict=True))
    types = [tensor.dtype for tensor in outputs(plain)]
    for step in range(END):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(run.model(*run.layer.batch(step)))
        value.backward()
        assert all(
            p.grad is None or (p.grad.dtype is p.dtype and p.grad.isfinite().all()) for p in run.model.parameters()
        )
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.transition.step()
        assert [tensor.dtype for tensor in outputs(run.model)] == types
    expected = outputs(run.model)
    with torch.autocast("cpu", torch.bfloat16):
        run.transition.finish()
    for got, wanted in zip(outputs(run.model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def blended_weights(model: nn.Module) -> Iterator[Tensor]:
    """Every weight in transition as its layer uses it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            yield module.weight


@pytest.mark.parametrize("compressor", [Binary(granularity=PerTensor()), Ternary(granularity=PerTensor()), Binary()])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_scales_do_not_overflow_in_half_precision(compressor: vanishing.Compressor, low: torch.dtype) -> None:
    weight = torch.randn(600, 600)
    layers = [nn.Linear(600, 600, bias=False, dtype=dtype) for dtype in (low, torch.float32)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(weight.to(low))
    for layer in layers:
        vanishing.prepare(nn.Sequential(layer), compressor, steps=1).seek(1)
    got, expected = (layer.weight for layer in layers)
    assert got.isfinite().all()
    # A weight next to a threshold may fall on its other side.
    close = torch.isclose(got.float(), expected, rtol=1e-2, atol=0)
    assert close.float().mean() > 0.99


@pytest.mark.parametrize(
    "compressor",
    [LowRank(rank=2), MagnitudePruning(0.5), Quantization(bits=4), Binary(), LowRank(rank=2) | Quantization(bits=8)],
    ids=repr,
)
def test_gradients_accumulate_over_micro_batches(compressor: vanishing.Compressor) -> None:
    def gradients(parts: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        recipe = vanishing.Recipe({nn.Linear: compressor}, schedule=LinearSchedule(steps=4))
        vanishing.prepare(model, recipe).seek(2)
        for chunk in torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(8, 12).chunk(parts):
            model(chunk).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
