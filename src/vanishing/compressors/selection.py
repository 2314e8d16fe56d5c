"""Exact selection of the largest magnitudes, with a guess of the smallest one that stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NEIGHBORHOODS = (0.02, 0.2)


def keep_largest(magnitudes: Sequence[Tensor], keep: int, guess: float | None = None) -> tuple[list[Tensor], float]:
    """Return masks that keep exactly the given number of the largest magnitudes over all tensors.

    With a good guess only the magnitudes around it are sorted. The result does not depend on the guess; among equal
    magnitudes the first ones stay.

    Args:
        magnitudes: tensors of values >= 0, on one device.
        keep: how many stay, from 0 to the number of all.
        guess: the magnitude at the border in an earlier selection of about as many; None without one.

    Returns:
        Boolean masks in the shapes of the tensors, and the smallest magnitude that stays.
    """
    total = sum(m.numel() for m in magnitudes)
    if keep in (0, total):
        return [torch.full_like(m, keep > 0, dtype=torch.bool) for m in magnitudes], 0.0
    border = _border(magnitudes, keep, total, guess)
    masks, counts = zip(*(_at_least(m, border) for m in magnitudes), strict=True)
    excess = sum(counts) - keep
    for mask, m in zip(reversed(masks), reversed(magnitudes), strict=True):
        if excess == 0:
            break
        last_ties = (m == border).nonzero()[-excess:]
        mask[tuple(last_ties.T)] = False
        excess -= len(last_ties)
    return list(masks), float(border)


def _border(magnitudes: Sequence[Tensor], keep: int, total: int, guess: float | None) -> Tensor:
    """Return the smallest magnitude that stays, as a tensor of no dimensions."""
    if magnitudes[0].device.type == "cpu":
        # NumPy's partition is vectorized: faster from scratch than a warm start in PyTorch.
        every = magnitudes[0].flatten() if len(magnitudes) == 1 else torch.cat([m.flatten() for m in magnitudes])
        exact = every if every.dtype == torch.float64 else every.float()
        return torch.as_tensor(np.partition(exact.numpy(), total - keep)[total - keep], dtype=every.dtype)
    for width in _NEIGHBORHOODS if guess else ():
        border = border_near(magnitudes, keep, guess or 0.0, width)
        if border is not None:
            return border
    return torch.cat([m.flatten() for m in magnitudes]).kthvalue(total - keep + 1).values


def _at_least(magnitudes: Tensor, border: Tensor) -> tuple[Tensor, int]:
    """Return where magnitudes are not below the border, and how many there are."""
    if magnitudes.device.type == "cpu" and magnitudes.dtype in (torch.float32, torch.float64):
        # Several times faster than PyTorch on a CPU.
        above = np.greater_equal(magnitudes.numpy(), border.item())
        return torch.from_numpy(above), int(np.count_nonzero(above))
    mask = magnitudes >= border
    return mask, int(mask.count_nonzero())


def border_near(magnitudes: Sequence[Tensor], keep: int, guess: float, width: float) -> Tensor | None:
    """Return the smallest magnitude that stays if it lies within a share `width` of the guess, else None."""
    low, high = guess * (1 - width), guess * (1 + width)
    near_or_above = torch.cat([m[m >= low] for m in magnitudes])
    candidates = near_or_above[near_or_above <= high]
    wanted = keep - (near_or_above.numel() - candidates.numel())
    if not 0 < wanted <= candidates.numel():
        return None
    return candidates.kthvalue(candidates.numel() - wanted + 1).values
