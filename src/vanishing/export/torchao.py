"""torchao: real int8 kernels for finished layers whose weights and inputs are codes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vanishing.layers import QuantizedInput
from vanishing.layers.quantized_input import InputQuantizer, TensorQuantizer
from vanishing.places import Places, join
from vanishing.receipt import Grid, read_receipt

try:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8StaticActivationInt8WeightConfig,
        MappingType,
        PerRow,
        PerTensor,
        quantize_,
    )
except ImportError as error:
    raise ImportError("vanishing.export.torchao needs torchao: pip install 'vanishing[torchao]'.") from error

logger = logging.getLogger(__name__)


@torch.no_grad()
def use_int8_kernels(model: nn.Module) -> nn.Module:
    """Let torchao's int8 kernels run the linear layers whose inputs have 8 bits and whose weights are codes.

    Each becomes a plain `nn.Linear` with a weight of torchao, as its `quantize_` makes it, but with the codes and
    scales that were trained (`quantize_` alone looks for new ones). Other layers stay as they are, with a warning in
    the log: convolutions, inputs of other widths, and weights without codes, in groups or with a zero point.

    Args:
        model: a finished or loaded model; changed in place, for inference.

    Returns:
        The same model. `vanishing.save` does not take it any more.

    Raises:
        ValueError: there is no such layer.
    """
    receipt = read_receipt(model)
    layers = {} if receipt is None else receipt.layers
    grids = {join(name, p): grid for name, done in layers.items() for p, grid in done.grids.items()}
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedInput)]
    problems = {name: _problem(module, grids.get(join(name, "layer.weight"))) for name, module in found}
    if all(problems.values()):
        listed = "; ".join(f"{name!r}: {problem}" for name, problem in list(problems.items())[:3])
        reasons = f" ({listed})" if listed else ""
        raise ValueError(
            f"use_int8_kernels: the model has no layer that int8 kernels could run{reasons}. "
            "Compress it by Quantization(bits=8) | ActivationQuantization(bits=8)."
        )
    places = Places(model)
    for name, module in found:
        if problems[name]:
            logger.warning("%s stays as it is: %s.", name, problems[name])
            continue
        layer = module.layer
        codes, scale = _codes(layer.get_parameter("weight"), grids[join(name, "layer.weight")])
        quantize_(layer, _config(module.quantizer, layer))
        weight: Any = layer.get_parameter("weight")
        weight.qdata.copy_(codes)
        weight.scale.copy_(scale)
        if isinstance(module.quantizer, TensorQuantizer):
            # One scale of all inputs is taken for a matrix alone.
            layer.__class__ = LinearOnRows
        places.put(module, layer)
    return model


class LinearOnRows(nn.Linear):
    """A linear layer that sees its input as a matrix, one row a token."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features)."""
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(*input.shape[:-1], -1)


def _problem(module: QuantizedInput, grid: Grid | None) -> str | None:
    if type(module.layer) is not nn.Linear:
        return f"torchao has no int8 kernel for {type(module.layer).__name__}"
    if module.quantizer.bits != 8:
        return f"its inputs have {module.quantizer.bits} bits"
    if grid is None:
        return "its weight has no codes"
    if grid.zero_point is not None or grid.group is not None:
        return "its weight has a zero point or groups"
    weight = module.layer.weight
    codes, scale = _codes(weight, grid)
    rounding = torch.finfo(weight.dtype).eps * weight.abs()
    if not bool(((codes * scale - weight).abs() <= rounding).all()):
        return "its weight changed since finish"
    return None


def _codes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The codes, (rows, columns), and the scale of every row, (rows, 1)."""
    scale = grid.scale.to(weight.device, torch.float32).expand(weight.shape[0], 1)
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale


def _config(quantizer: InputQuantizer, layer: nn.Module) -> object:
    mapping = MappingType.SYMMETRIC if quantizer.symmetric else MappingType.ASYMMETRIC
    if not isinstance(quantizer, TensorQuantizer):
        return Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping, set_inductor_config=False)
    zero_point = quantizer.zero_point
    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=quantizer.scale.float().reshape(1, 1),
        act_quant_zero_point=None if zero_point is None else zero_point.reshape(1, 1),
        granularity=[PerTensor(), PerRow()],
        act_mapping_type=mapping,
        set_inductor_config=False,
    )
