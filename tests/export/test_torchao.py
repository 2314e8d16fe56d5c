"""Finished layers on torchao's int8 kernels compute what they were trained to compute."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_

import vanishing
from architectures import ARCHITECTURES
from vanishing import ActivationQuantization, PerGroup, PerTensor, Quantization, Range, Recipe, StepSchedule
from vanishing.export.torchao import use_int8_kernels
from vanishing.layers import QuantizedInput

X = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16)).to(dtype)


def finished(technique: vanishing.Compressor, model: nn.Module | None = None, x: Tensor = X) -> nn.Module:
    recipe = Recipe({"*": technique}, schedule=StepSchedule(at=0))
    model = perceptron(x.dtype) if model is None else model
    calibration = [x] if recipe.match(model).observed() else None
    return vanishing.prepare(model, recipe, calibration=calibration).finish()


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("weights", [Quantization(bits=8), Quantization(bits=4, granularity=PerTensor())], ids=repr)
@pytest.mark.parametrize("range_", Range)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_kernels_compute_the_same(symmetric: bool, range_: Range, weights: Quantization) -> None:
    model = finished(weights | ActivationQuantization(bits=8, range=range_, symmetric=symmetric))
    expected = model(X)
    assert use_int8_kernels(model) is model
    assert not any(isinstance(module, QuantizedInput) for module in model.modules())
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    assert len(layers) == 2 and all(isinstance(layer.weight, Int8Tensor) for layer in layers)
    assert relative(model(X), expected) < 2e-6


def test_in_bfloat16_they_differ_by_its_rounding() -> None:
    technique = Quantization(bits=8) | ActivationQuantization(bits=8)
    model = finished(technique, x=X.bfloat16())
    expected = model(X.bfloat16()).float()
    assert relative(use_int8_kernels(model)(X.bfloat16()).float(), expected) < 2e-2


def test_without_it_quantize_takes_other_scales() -> None:
    model = finished(Quantization(bits=8) | ActivationQuantization(bits=8))
    expected = model(X)
    plain = nn.Sequential(*(copy.deepcopy(m.layer) if isinstance(m, QuantizedInput) else m for m in model.children()))
    quantize_(plain, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    assert 5e-4 < relative(plain(X), expected) < 2e-2


def test_a_loaded_model_of_transformers_runs_on_them(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    model = finished(Quantization(bits=8) | ActivationQuantization(bits=8), architecture.build())
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small")
    batch = architecture.batch()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        got = use_int8_kernels(loaded)(**batch).logits
    # A sum in another order now and then gives an input of the next layer its next code.
    assert relative(got, expected) < 5e-3


def test_layers_that_they_cannot_run_stay_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    both = ActivationQuantization(bits=8)
    cases = {
        "convolution": (nn.Conv1d(7, 4, 3), Quantization(bits=8) | both, "no int8 kernel for Conv1d"),
        "inputs": (nn.Linear(64, 4), Quantization(bits=8) | ActivationQuantization(bits=4), "its inputs have 4 bits"),
        "dense": (nn.Linear(64, 4), both, "its weight has no codes"),
        "groups": (nn.Linear(64, 4), Quantization(bits=4, granularity=PerGroup(16)) | both, "a zero point or groups"),
        "zero_point": (nn.Linear(64, 4), Quantization(bits=4, symmetric=False) | both, "a zero point or groups"),
        "changed": (nn.Linear(64, 4), Quantization(bits=8) | both, "its weight changed since finish"),
        "fine": (nn.Linear(64, 4), Quantization(bits=8) | both, ""),
    }
    model = nn.ModuleDict({name: layer for name, (layer, *_) in cases.items()})
    rules = {name: technique for name, (_, technique, _) in cases.items()}
    vanishing.prepare(model, Recipe(rules, schedule=StepSchedule(at=0))).finish()
    with torch.no_grad():
        model.get_parameter("changed.layer.weight").mul_(1.1)
    with caplog.at_level(logging.WARNING):
        use_int8_kernels(model)
    said = {record.getMessage().split(" stays")[0]: record.getMessage() for record in caplog.records}
    assert said.keys() == cases.keys() - {"fine"}
    assert all(cases[name][2] in message for name, message in said.items())
    assert type(model["fine"]) is nn.Linear
    del model["fine"]
    with pytest.raises(ValueError, match=r"no layer that int8 kernels could run \('convolution': torchao has no"):
        use_int8_kernels(model)
    with pytest.raises(ValueError, match="Compress it by Quantization"):
        use_int8_kernels(perceptron())
