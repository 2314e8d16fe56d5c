"""The range of a layer's inputs in the calibration pass, and the part of it that is best rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vanishing.calibration import Observer
from vanishing.layers.quantized_input import code_range, scale_of_range

_BINS = 8192
_SHARES = 100
"""Shares of the whole range that are tried."""


class InputRange(Observer):
    """The smallest and the largest input, the mean magnitude, and how often which values come.

    The counts are those of equal bins between `-reach` and `reach`, a power of two; where an input is beyond it, bins
    are merged in pairs until it is not.
    """

    def __init__(self) -> None:
        self._low = self._high = self._magnitudes = torch.zeros(())
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._reach = 0.0
        self._count = 0

    @property
    def saw_nothing(self) -> bool:
        return self._count == 0

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest input, (1,) each; -1 and 1 before any."""
        one = self._low.new_ones(1)
        return (self._low.reshape(1), self._high.reshape(1)) if self._count else (-one, one)

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean of the inputs' magnitudes, (1,); 1 before any."""
        return (self._magnitudes / self._count if self._count else self._low.new_ones(())).reshape(1)

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        given = next((x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)), None)
        if given is None or not given.numel():
            return
        values = given.to(torch.promote_types(given.dtype, torch.float32)).flatten()
        low, high = values.aminmax()
        self._low = torch.minimum(low, self._low.to(low)) if self._count else low
        self._high = torch.maximum(high, self._high.to(high)) if self._count else high
        self._magnitudes = self._magnitudes.to(values) + values.abs().sum()
        self._count += values.numel()
        self._tally(values, float(torch.maximum(high, -low)))

    def _tally(self, values: Tensor, largest: float) -> None:
        # Nothing to count by in zeros alone, or beside an infinite input or one that is no number.
        if not 0.0 < largest < float("inf"):
            return
        if self._reach == 0.0:
            self._reach = 2.0 ** torch.tensor(largest).log2().ceil().item()
            self._counts = self._counts.to(values.device)
        while largest > self._reach:
            quarter = _BINS // 4
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.cat([merged.new_zeros(quarter), merged, merged.new_zeros(quarter)])
            self._reach *= 2
        bins = ((values / self._reach + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
        self._counts += torch.bincount(bins, minlength=_BINS)

    def least_error(self, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Return the share of the range, in steps of 1 %, in which rounding to codes and clipping err the least.

        Args:
            bits: width of a code.
            symmetric: whether the codes have no zero point.

        Returns:
            Its smallest and its largest value, (1,) each.
        """
        low, high = self.extremes
        if self._reach == 0.0:
            return low, high
        shares = torch.linspace(1.0, 1.0 / _SHARES, _SHARES, device=low.device, dtype=torch.float64).unsqueeze(1)
        scale, zero_point = scale_of_range(shares * low, shares * high, bits, symmetric)
        centers = (torch.arange(_BINS, device=low.device, dtype=torch.float64) + 0.5) * (2 / _BINS) - 1
        centers = centers * self._reach
        first, last = code_range(bits)
        zero = 0.0 if zero_point is None else zero_point
        rounded = (((centers / scale).round() + zero).clamp(first, last) - zero) * scale
        best = ((rounded - centers).square() * self._counts).sum(1).argmin()
        share = shares[best].to(low.dtype)
        return share * low, share * high
