"""Whether two computations of the same thing agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDINGS = 8
_TF32_EPSILON = 2.0**-10


def difference_beyond_rounding(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float) -> float | None:
    """Return the largest difference between tensors if it is more than rounding explains, None where it is not.

    Args:
        expected: floating tensors.
        got: as many tensors of the same shapes.
        tolerance: what single precision explains, relative to the largest value of a tensor, or to 1 if that is less;
            coarser types have more.
    """
    worst = None
    for one, other in zip(expected, got, strict=True):
        finite = one.isfinite() & other.isfinite()
        # Masked outputs are infinite in the same places, with the same sign.
        same = (one == other) | (one.isnan() & other.isnan()) | finite
        if not bool(same.all()):
            return float("inf")
        if not bool(finite.any()):
            continue
        difference = float((one - other)[finite].abs().max())
        scale = max(float(one[finite].abs().max()), 1.0)
        if difference > max(tolerance, _ROUNDINGS * _epsilon(one)) * scale:
            worst = max(difference, worst or 0.0)
    return worst


def _epsilon(tensor: Tensor) -> float:
    if tensor.is_cuda and tensor.dtype == torch.float32:
        # Convolutions use TF32 unless told not to.
        return _TF32_EPSILON
    return torch.finfo(tensor.dtype).eps
