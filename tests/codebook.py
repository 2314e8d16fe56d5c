"""A technique of a user's own, written with nothing but the public interface: k-means weights with a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import vanishing


@dataclass(frozen=True)
class Codebook(vanishing.ProjectionCompressor):
    """Replace each weight by the nearest of `2**bits` values, found by k-means (Deep Compression, arXiv 1510.00149).

    Args:
        bits: width of an index into the codebook, 1 to 8.
        rounds: rounds of Lloyd's algorithm, from evenly spaced quantiles.
    """

    bits: Annotated[int, Field(ge=1, le=8, description="the width of an index in bits, 1 to 8")]
    rounds: Annotated[int, Field(ge=0, description="a number of rounds of k-means, at least 0")] = 5

    def project(self, matrix: Tensor, strength: float) -> Tensor:
        values = matrix.flatten().to(torch.promote_types(matrix.dtype, torch.float32))
        size = 2**self.bits
        quantiles = (torch.arange(size, dtype=values.dtype, device=values.device) + 0.5) / size
        centers = torch.quantile(values, quantiles)
        for _ in range(self.rounds):
            members = torch.nn.functional.one_hot(_nearest(values, centers), size).to(values.dtype)
            counts = members.sum(0)
            centers = torch.where(counts > 0, values @ members / counts.clamp(min=1), centers)
        return centers[_nearest(values, centers)].to(matrix.dtype).reshape(matrix.shape)


def _nearest(values: Tensor, centers: Tensor) -> Tensor:
    return (values[:, None] - centers).abs().argmin(1)
