"""Residual blocks, found out by trying them: without its weights such a block returns what it gets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vanishing.inputs import evaluation
from vanishing.random_state import random_state_kept

_TOLERANCE = 1e-3
_LENGTH, _SIDE = 4, 8


@dataclass(frozen=True)
class OutputForm:
    """How a block returns its hidden states.

    Args:
        argument: name of its first argument, None if it has none.
        spec: the nesting of the outputs.
        leaves: what is in it, with None in the place of the hidden states.
        place: their place among the leaves.
    """

    argument: str | None
    spec: TreeSpec
    leaves: tuple[Any, ...]
    place: int

    def wrap(self, hidden: Tensor) -> Any:
        """Return hidden states as the block does."""
        leaves = list(self.leaves)
        leaves[self.place] = hidden
        return tree_unflatten(leaves, self.spec)


def output_form(block: nn.Module) -> OutputForm | None:
    """Return how a residual block returns its hidden states; None if it is no residual block, or cannot be tried.

    The block is called with weights of zero and with normalizations of scale one, as a residual block that is
    normalized in the end (BERT's) returns normalized inputs, and one that is rectified (a ResNet's) those above zero.
    """
    if not any(parameter.dim() > 1 for parameter in block.parameters()):
        # A normalization, an activation or dropout.
        return None
    first = next(p for p in block.parameters() if p.is_floating_point())
    arguments = inspect.signature(block.forward).parameters
    name = next((n for n, p in arguments.items() if p.kind is p.POSITIONAL_OR_KEYWORD), None)
    one = torch.ones(1, 1, 1, dtype=first.dtype, device=first.device)
    # A cosine of one and a sine of zero turn nothing, and fit heads of any size.
    keywords: dict[str, Any] = {"position_embeddings": (one, 0 * one)} if "position_embeddings" in arguments else {}
    keywords |= {n: None for n in _required(arguments) if n not in (name, *keywords)}
    idle = _idle_tensors(block)
    with random_state_kept(first.device), torch.no_grad(), evaluation(block):
        for probe in _probes(block, first):
            try:
                output = functional_call(block, idle, (probe.clone(),), keywords)
            except Exception:
                # It takes something else.
                continue
            leaves, spec = tree_flatten(output)
            tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            if len(tensors) == 1 and _is_same(leaves[tensors[0]], probe):
                others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
                return OutputForm(name, spec, others, tensors[0])
    return None


def _required(arguments: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    for name, parameter in arguments.items():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            yield name


def _idle_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Weights of zero, without memory of their own; normalizations have scales of one and statistics of nothing."""
    ends = {"running_var": 1.0, "running_mean": 0.0}
    tensors = {}
    for name, parameter in block.named_parameters():
        is_scale = parameter.dim() == 1 and name.rpartition(".")[2] == "weight"
        value = parameter.new_full((), float(is_scale)).expand(parameter.shape)
        # Products with the weights of many experts at once need their memory.
        tensors[name] = value.contiguous() if parameter.dim() == 3 else value
    for name, buffer in block.named_buffers():
        statistic = ends.get(name.rpartition(".")[2])
        if statistic is not None:
            tensors[name] = torch.full_like(buffer, statistic)
    return tensors


def _probes(block: nn.Module, first: Tensor) -> Iterator[Tensor]:
    """Hidden states of a block, as wide as its first parameters: tokens, or images with channels first or last."""
    early = list(block.parameters())[:4]
    for width in dict.fromkeys(size for parameter in early for size in reversed(parameter.shape[:2])):
        image, tokens, last = (1, width, _SIDE, _SIDE), (1, _LENGTH, width), (1, _SIDE, _SIDE, width)
        for shape in (image,) if first.dim() == 4 else (tokens, image, last):
            features = 1 if shape is image else -1
            probe = torch.randn(shape, device=first.device)
            centered = probe - probe.mean(features, keepdim=True)
            normalized = centered / centered.square().mean(features, keepdim=True).sqrt().clamp(min=1e-6)
            yield normalized.to(first.dtype)
            yield normalized.abs().to(first.dtype)


def _is_same(output: Tensor, probe: Tensor) -> bool:
    if output.shape != probe.shape:
        return False
    tolerance = max(_TOLERANCE, 8 * torch.finfo(probe.dtype).eps)
    return bool((output - probe).abs().max() <= tolerance * probe.abs().max())
