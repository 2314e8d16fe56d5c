"""Exact selection of the largest magnitudes, with a guess of the smallest one that stays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NEIGHBORHOODS = (0.01, 0.2)


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
    on_cpu = magnitudes[0].device.type == "cpu"
    if guess:
        select_near = _select_near_on_cpu if on_cpu else _select_near
        for width in _NEIGHBORHOODS:
            selected = select_near(magnitudes, keep, guess, width)
            if selected is not None:
                return selected
    every = torch.cat([m.flatten() for m in magnitudes])
    if on_cpu:
        border = torch.as_tensor(np.partition(_array(every), total - keep)[total - keep], dtype=every.dtype)
    else:
        border = every.kthvalue(total - keep + 1).values
    return _select_from(magnitudes, keep, border), float(border)


def _select_near(
    magnitudes: Sequence[Tensor], keep: int, guess: float, width: float
) -> tuple[list[Tensor], float] | None:
    """Return masks and border if the border lies within a share `width` of the guess, else None."""
    border = border_near(magnitudes, keep, guess, width)
    return None if border is None else (_select_from(magnitudes, keep, border), float(border))


def _select_near_on_cpu(
    magnitudes: Sequence[Tensor], keep: int, guess: float, width: float
) -> tuple[list[Tensor], float] | None:
    """`_select_near` with NumPy, which compares several times faster than PyTorch on a CPU."""
    low, high = guess * (1 - width), guess * (1 + width)
    arrays = [_array(m) for m in magnitudes]
    masks = [array >= high for array in arrays]
    places = [np.flatnonzero((array >= low) ^ mask) for array, mask in zip(arrays, masks, strict=True)]
    candidates = np.concatenate([array[place] for array, place in zip(arrays, places, strict=True)])
    wanted = keep - sum(np.count_nonzero(mask) for mask in masks)
    if not 0 < wanted <= len(candidates):
        return None
    border = np.partition(candidates, len(candidates) - wanted)[len(candidates) - wanted]
    stays = candidates >= border
    excess = np.count_nonzero(stays) - wanted
    if excess:
        stays[np.flatnonzero(candidates == border)[-excess:]] = False
    ends = itertools.accumulate(len(place) for place in places)
    for mask, place, end in zip(masks, places, ends, strict=True):
        mask[place] = stays[end - len(place) : end]
    shaped = [torch.from_numpy(mask).reshape(m.shape) for mask, m in zip(masks, magnitudes, strict=True)]
    return shaped, float(border)


def _array(magnitudes: Tensor) -> np.ndarray:
    """Return the values in a row, in a type that NumPy has."""
    exact = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.float()
    return exact.numpy().reshape(-1)


def _select_from(magnitudes: Sequence[Tensor], keep: int, border: Tensor) -> list[Tensor]:
    """Return the masks of what is not below the border, without the last of too many equal ones."""
    masks = [m >= border for m in magnitudes]
    excess = int(sum(mask.count_nonzero() for mask in masks)) - keep
    for mask, m in zip(reversed(masks), reversed(magnitudes), strict=True):
        if excess <= 0:
            break
        last_ties = (m == border).nonzero()[-excess:]
        mask[tuple(last_ties.T)] = False
        excess -= len(last_ties)
    return masks


def border_near(magnitudes: Sequence[Tensor], keep: int, guess: float, width: float) -> Tensor | None:
    """Return the smallest magnitude that stays if it lies within a share `width` of the guess, else None."""
    low, high = guess * (1 - width), guess * (1 + width)
    near_or_above = torch.cat([m[m >= low] for m in magnitudes])
    candidates = near_or_above[near_or_above <= high]
    wanted = keep - (near_or_above.numel() - candidates.numel())
    if not 0 < wanted <= candidates.numel():
        return None
    return candidates.kthvalue(candidates.numel() - wanted + 1).values
