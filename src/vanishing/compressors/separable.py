"""Depthwise separable convolutions: channels are filtered one by one, then mixed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vanishing.compressors.base import BlockCompressor
from vanishing.errors import ConfigError


@dataclass(frozen=True)
class DepthwiseSeparable(BlockCompressor):
    """Replace a convolution by a depthwise and a pointwise one (MobileNets, arXiv 1704.04861, section 3.1).

    Of a k x k convolution of c to d channels, `c k^2 + c d` of `c d k^2` weights are left. The two start from the best
    approximation of the original's weight: for each input channel the first singular vectors of its d x k^2 matrix.
    Taken are plain `nn.Conv2d` layers without groups that become smaller so.

    >>> smaller = DepthwiseSeparable().build(nn.Conv2d(16, 32, 3, padding=1))
    >>> sum(p.numel() for p in smaller.parameters())
    688
    """

    def refusal(self, block: nn.Module) -> str | None:
        # A subclass may compute something else with its weight.
        if type(block) is not nn.Conv2d:
            return "it is no plain Conv2d"
        if block.groups > 1:
            return f"it has {block.groups} groups already"
        channels, kernel = block.in_channels, block.weight[0, 0].numel()
        if channels * (kernel + block.out_channels) >= channels * kernel * block.out_channels:
            return "a depthwise and a pointwise convolution would not be smaller"
        return None

    def build(self, block: nn.Module) -> nn.Module:
        refusal = self.refusal(block)
        if refusal is not None or not isinstance(block, nn.Conv2d):
            raise ConfigError(f"DepthwiseSeparable cannot replace a {type(block).__name__}: {refusal}.")
        options: dict[str, Any] = {"device": block.weight.device, "dtype": block.weight.dtype}
        depthwise = nn.Conv2d(
            block.in_channels,
            block.in_channels,
            block.kernel_size,  # type: ignore[arg-type]
            stride=block.stride,  # type: ignore[arg-type]
            padding=block.padding,  # type: ignore[arg-type]
            dilation=block.dilation,  # type: ignore[arg-type]
            groups=block.in_channels,
            bias=False,
            padding_mode=block.padding_mode,
            **options,
        )
        pointwise = nn.Conv2d(block.in_channels, block.out_channels, 1, bias=block.bias is not None, **options)
        with torch.no_grad():
            channels = block.weight.float().flatten(2).transpose(0, 1)
            mixing, sizes, filters = torch.linalg.svd(channels, full_matrices=False)
            # Both halves get the same share, so that one learning rate fits them.
            root = sizes[:, :1].sqrt()
            depthwise.weight.copy_((filters[:, 0] * root).view_as(depthwise.weight))
            pointwise.weight.copy_((mixing[:, :, 0] * root).T.reshape(pointwise.weight.shape))
            if block.bias is not None and pointwise.bias is not None:
                pointwise.bias.copy_(block.bias)
        return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise)).train(block.training)
