"""Channels that stay inside of a block: between which layers they are, and whether these can be cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from vanishing.equality import difference_beyond_rounding
from vanishing.narrowing import is_convolution, is_depthwise
from vanishing.places import join
from vanishing.random_state import random_state_kept
from vanishing.structure import Group, Part, Unit, cut, find_groups, first_tensor, group_problem, masked

_TOLERANCE = 1e-4
_IMAGE_SIZES = (8, 28, 32, 64, 224)
_LISTS = (nn.ModuleList, nn.ModuleDict)

_Leaf = tuple[str, nn.Module | None]
"""Name below a block and layer, squeeze-and-excitation, or None in the place of a block in the block."""


def groups_of(model: nn.Module, unit: Unit) -> Iterator[Group]:
    """Yield the groups of units of a kind that are known in a model."""
    return find_channel_groups(model) if unit is Unit.CHANNEL else find_groups(model, unit)


def problem_of(group: Group) -> str | None:
    """Return why units cannot be taken out of a group, None where they can."""
    return channel_problem(group) if group.unit is Unit.CHANNEL else group_problem(group)


def find_channel_groups(model: nn.Module) -> Iterator[Group]:
    """Yield the groups of a model whose channels go from one convolution of a block to the next.

    A block is the innermost module around several convolutions. Between the two there may be batch normalization,
    depthwise convolutions and squeeze-and-excitation. Layers are taken in the order in which they were registered;
    that they run in this order is what `channel_problem` tries out.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _LISTS) and not _is_squeeze(module):
            leaves = list(_leaves("", module))
            for start in range(len(leaves)):
                group = _group(name, module, leaves[start:])
                if group is not None:
                    yield group


def _leaves(prefix: str, module: nn.Module) -> Iterator[_Leaf]:
    for name, child in module.named_children():
        path = join(prefix, name)
        if isinstance(child, (_ConvNd, _BatchNorm)) or _is_squeeze(child):
            yield path, child
        elif not isinstance(child, _LISTS) and len(_convolutions(child)) > 1:
            yield path, None
        else:
            yield from _leaves(path, child)


def _convolutions(module: nn.Module) -> list[_ConvNd]:
    return [each for each in module.modules() if isinstance(each, _ConvNd)]


def _is_squeeze(module: nn.Module) -> bool:
    """Whether a module looks like squeeze-and-excitation: to fewer channels, and back to as many."""
    layers = [each for each in module.modules() if isinstance(each, (_ConvNd, _BatchNorm))]
    if len(layers) != 2 or any(isinstance(layer, _BatchNorm) for layer in layers):
        return False
    reduce, expand = _convolutions(module)
    pointwise = all(_is_dense(each) and set(each.kernel_size) == {1} for each in (reduce, expand))
    fewer = reduce.in_channels > reduce.out_channels
    return (
        pointwise and fewer and (expand.in_channels, expand.out_channels) == (reduce.out_channels, reduce.in_channels)
    )


def _is_dense(module: nn.Module | None) -> bool:
    return isinstance(module, _ConvNd) and is_convolution(module) and module.groups == 1


def _group(owner_name: str, owner: nn.Module, leaves: Sequence[_Leaf]) -> Group | None:
    """The group of the channels that the first of some layers makes; None if there is none."""
    (path, first), *others = leaves
    if not isinstance(first, _ConvNd) or not _is_dense(first):
        return None
    count = first.out_channels
    makers = [Part(join(owner_name, path), first, 1)]
    gates: list[Part] = []
    takers: list[Part] = []
    for path, layer in others:
        name = join(owner_name, path)
        if isinstance(layer, _ConvNd) and _is_dense(layer) and layer.in_channels == count:
            # What scales the channels last stands last among their makers.
            every = (*gates, *makers)
            return Group(Unit.CHANNEL, count, every, (Part(name, layer, 1), *takers), owner, owner_name, ())
        norm = isinstance(layer, _BatchNorm) and layer.num_features == count
        if layer is not None and (norm or (is_depthwise(layer) and layer.out_channels == count)):
            makers.append(Part(name, layer, 1))
        elif layer is not None and _is_squeeze(layer):
            reduce, expand = ((n, m) for n, m in layer.named_modules() if isinstance(m, _ConvNd))
            if expand[1].out_channels != count:
                return None
            takers.append(Part(join(name, reduce[0]), reduce[1], 1))
            gates.append(Part(join(name, expand[0]), expand[1], 1))
        else:
            return None
    return None


def channel_problem(group: Group) -> str | None:
    """Return why channels cannot be taken out of a group, None where they can.

    Copies of the block, with other scales and statistics, are compared on a random input: every other channel ignored,
    and every other channel cut out.
    """
    if group.count == 1:
        # There is nothing to take out, which is for the technique to say.
        return None
    weight = group.taker.layer.get_parameter("weight")
    what = type(group.owner).__name__
    keep = torch.arange(0, group.count, 2, device=weight.device)
    with random_state_kept(weight.device), torch.no_grad():
        whole = copy.deepcopy(group)
        whole.owner.eval()
        vary(whole.owner)
        ignored, smaller = masked(whole, keep), copy.deepcopy(whole)
        cut(smaller, keep)
        channels = _convolutions(group.owner)[0].in_channels
        for size in _IMAGE_SIZES:
            probe = torch.randn(2, channels, *[size] * (weight.dim() - 2)).to(weight)
            try:
                before, expected = (first_tensor(each.owner(probe.clone())) for each in (whole, ignored))
            except Exception:
                # It takes something else.
                continue
            if difference_beyond_rounding([before], [expected], _TOLERANCE) is None:
                return f"the outputs of {what} do not depend on them, so that cutting cannot be tried"
            return _difference(smaller.owner, probe, expected)
    return f"{what} cannot be tried: it takes something else than images of {channels} channels"


def _difference(smaller: nn.Module, probe: Tensor, expected: Tensor) -> str | None:
    reason = f"{type(smaller).__name__} does not follow when channels are cut out of its layers"
    try:
        got = first_tensor(smaller(probe))
    except Exception as error:
        return f"{reason} ({' '.join(str(error).split()):.100})"
    same = expected.shape == got.shape and difference_beyond_rounding([expected], [got], _TOLERANCE) is None
    return None if same else reason


@torch.no_grad()
def vary(owner: nn.Module) -> None:
    """Give a module other scales and statistics: a scale of zero, as many blocks start with, would hide all else."""
    for tensor in (*owner.parameters(), *owner.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
