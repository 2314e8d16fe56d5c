"""Why a layer or a block cannot be compressed, whatever the technique."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from vanishing.compressors import LayerView
from vanishing.inputs import evaluation
from vanishing.random_state import random_state_kept

_PROBE_TOLERANCE = 1e-4
_NO_PLACE = "the whole model has no place to be replaced in. Wrap it in nn.Sequential"


def block_problem(name: str, block: nn.Module) -> str | None:
    """Return why a block cannot be replaced, None where it can."""
    if not name:
        return f"{_NO_PLACE}, or name a block of it"
    for hook in block._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):
            return f"a hook of {type(hook).__name__} on it computes its weight. Remove that first"
    parameters: list[Tensor] = list(block.parameters())
    return _tensors_problem(parameters) if parameters else None


def weight_problem(module: nn.Module, name: str, weight: Tensor | None) -> str | None:
    """Return why a weight cannot be compressed by anything, None where it can."""
    if parametrize.is_parametrized(module, name):
        first = module.parametrizations[name][0]  # type: ignore[index]
        return f"its {name} is parametrized by {type(first).__name__}. Remove that first, or add it to ignore"
    if weight is None:
        return f"it has no parameter {name!r} of its own (weight norm, or a quantized layer?). Add it to ignore"
    return _tensors_problem([weight])


def cut_problem(layer: nn.Module) -> str | None:
    """Return why features cannot be cut out of a layer, None where they can."""
    if isinstance(layer, _BatchNorm):
        # A frozen one, or one without parameters, has channels all the same.
        return "it is parametrized. Remove that first" if parametrize.is_parametrized(layer) else None
    return weight_problem(layer, "weight", layer._parameters.get("weight"))


def replacement_problem(name: str, layer: LayerView) -> str | None:
    """Return why two plain layers cannot take the place of a layer that is to be factored, None where they can."""
    if not name:
        return _NO_PLACE
    if parametrize.is_parametrized(layer.module, "bias"):
        return "its bias is parametrized, which two plain layers could not share. Remove that first"
    if "forward" in vars(layer.module):
        return "its forward was patched on the object, which a replacement would lose. Remove the patch first"
    base_forward = layer.kind.base_forward(layer.module)
    if base_forward is None or type(layer.module).forward is base_forward:
        return None
    if _computes(layer, base_forward):
        return None
    return (
        f"{type(layer.module).__name__} does not compute what the plain layer with its weight computes, so two plain "
        f"layers cannot take its place. Add it to ignore"
    )


def input_problem(name: str, layer: LayerView) -> str | None:
    """Return why the input of a layer cannot be quantized, None where it can."""
    if not name:
        return _NO_PLACE
    if "forward" in vars(layer.module):
        return "its forward was patched on the object, so that it would not see another input. Remove the patch first"
    return None


def layers_that_are_read(model: nn.Module) -> dict[int, str]:
    """Return layers of PyTorch's own blocks, by identity, that are not called always or ever, with the reason."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[id(module.out_proj)] = "nn.MultiheadAttention reads its weight and never calls it"
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = "in evaluation nn.TransformerEncoderLayer reads its weight and does not call it"
            found |= {id(module.linear1): reason, id(module.linear2): reason}
    return found


def _tensors_problem(tensors: list[Tensor]) -> str | None:
    if any(is_lazy(t) for t in tensors):
        return "it is lazy and has no weights yet. Run one batch through the model first"
    if any(t.is_meta for t in tensors):
        return "its weights are on the meta device. Load them first"
    floating = [t for t in tensors if t.is_floating_point() and t.element_size() > 1]
    if not floating:
        return f"its weights are {tensors[0].dtype}, not floating numbers of 16 bits or more. Add it to ignore"
    if not any(t.requires_grad for t in floating):
        return "all its weights are frozen. Call requires_grad_(True) on it, or add it to ignore"
    if not all(bool(torch.isfinite(t.detach()).all()) for t in floating):
        return "its weights contain NaN or infinite values. Load a sound checkpoint, or add it to ignore"
    return None


def _computes(layer: LayerView, base_forward: object) -> bool:
    """Whether a subclass gives the plain layer's outputs for random inputs, in training and in evaluation."""
    tolerance = max(_PROBE_TOLERANCE, 8 * torch.finfo(layer.weight.dtype).eps)
    buffers = {buffer: buffer.clone() for buffer in layer.module.buffers()}
    with random_state_kept(layer.weight.device), torch.no_grad(), evaluation(layer.module):
        probe = layer.kind.probe_input(layer.module)
        try:
            for mode in (True, False):
                layer.module.train(mode)
                plain = base_forward(layer.module, probe)  # type: ignore[operator]
                output = layer.module.forward(probe)
                if not isinstance(output, Tensor) or output.shape != plain.shape:
                    return False
                if not bool((output - plain).abs().max() <= tolerance * plain.abs().max()):
                    return False
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
            # A forward that does not even take the plain layer's input is not the plain layer's.
            return False
        finally:
            for buffer, value in buffers.items():
                buffer.copy_(value)
    return True
