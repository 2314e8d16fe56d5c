"""A weight's matrix cut into the blocks that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vanishing.granularity import Granularity, PerChannel, PerGroup


def to_blocks(matrix: Tensor, granularity: Granularity) -> Tensor:
    """Return the matrix with what shares a scale as its last dimension, a short last group padded with 0.

    (1, rows * columns) per tensor, (rows, columns) per channel, (rows, groups, size) per group.
    """
    if isinstance(granularity, PerGroup):
        padded = functional.pad(matrix, (0, -matrix.shape[1] % granularity.size))
        return padded.reshape(matrix.shape[0], -1, granularity.size)
    return matrix if isinstance(granularity, PerChannel) else matrix.reshape(1, -1)


def from_blocks(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Return blocks in the (rows, columns) of the matrix that they were cut from."""
    if blocks.shape == matrix.shape:
        return blocks
    return blocks.reshape(matrix.shape[0], -1)[:, : matrix.shape[1]]


def total(blocks: Tensor) -> Tensor:
    """Return the sum of each block in at least single precision: half precision overflows and cannot count."""
    return blocks.sum(-1, keepdim=True, dtype=torch.promote_types(blocks.dtype, torch.float32))


def block_sizes(matrix: Tensor, blocks: Tensor, granularity: Granularity) -> Tensor | float:
    """Return how many weights of the matrix each block holds, broadcastable against their scales."""
    size = blocks.shape[-1]
    short = -matrix.shape[1] % size if isinstance(granularity, PerGroup) else 0
    if not short:
        # A float: dividing by an integer is several times slower.
        return float(size)
    sizes = torch.full((1, blocks.shape[1], 1), float(size), device=matrix.device, dtype=matrix.dtype)
    sizes[:, -1] -= short
    return sizes


def stored_scale(scale: Tensor, granularity: Granularity) -> Tensor:
    """Return a scale rounded to what the file holds: bfloat16 for groups, where it is a real share of the bytes."""
    return scale.to(torch.bfloat16).to(scale.dtype) if isinstance(granularity, PerGroup) else scale


def grid_scale(scale: Tensor, granularity: Granularity) -> Tensor:
    """Return the scales of blocks as (rows or 1, groups or 1) in the type in which the file holds them."""
    kept = scale.reshape(scale.shape[0], -1)
    return kept.to(torch.bfloat16) if isinstance(granularity, PerGroup) else kept.clone()
