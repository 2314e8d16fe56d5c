"""Textbook formulas, slow and obviously right, written without the library: what the fast code must agree with.

Weights are matrices here: rows are output channels, columns the fan-in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Pruning. Ties may be broken either way, so two masks agree when their counts and their kept magnitudes do.


def kept_count(size: int, sparsity: float) -> int:
    """Weights that stay of `size`: the zeros are `sparsity * size`, rounded to the nearest (half to even)."""
    return size - round(sparsity * size)


def kept_magnitudes(values: Tensor, count: int) -> Tensor:
    """The `count` largest magnitudes, in rising order."""
    return values.abs().flatten().sort().values[values.numel() - count :]


def prune_per_tensor(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with all but its largest magnitudes set to zero."""
    order = weight.abs().flatten().argsort()
    pruned = weight.clone().flatten()
    pruned[order[: weight.numel() - kept_count(weight.numel(), sparsity)]] = 0
    return pruned.reshape(weight.shape)


def prune_per_row(weight: Tensor, sparsity: float) -> Tensor:
    """Every row pruned on its own."""
    return torch.stack([prune_per_tensor(row, sparsity) for row in weight])


def prune_globally(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """All weights ranked together."""
    pruned = prune_per_tensor(torch.cat([w.flatten() for w in weights]), sparsity)
    parts = pruned.split([w.numel() for w in weights])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def prune_n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Of every m consecutive columns of a row, the n largest magnitudes stay; m divides the columns."""
    pruned = weight.clone()
    for row in pruned:
        for group in row.split(m):
            group[group.abs().argsort()[: m - n]] = 0
    return pruned


# Binary and ternary weights.


def signs(weight: Tensor) -> Tensor:
    """-1 where the weight is negative, +1 elsewhere."""
    return torch.tensor([-1.0 if w < 0 else 1.0 for w in weight.flatten().tolist()], dtype=weight.dtype).view_as(weight)


def binary_per_row(weight: Tensor) -> Tensor:
    """XNOR-Net (1603.05279), equation 6: sign times the mean magnitude of the row."""
    return signs(weight) * weight.abs().mean(dim=1, keepdim=True)


def binary_per_tensor(weight: Tensor) -> Tensor:
    """Sign times the mean magnitude of the weight."""
    return signs(weight) * weight.abs().mean()


def ternary_vector(weight: Tensor, scale_type: torch.dtype | None = None) -> Tensor:
    """Ternary weight networks (1605.04711), equations 5 and 6: threshold 0.7 mean |w|, scale the mean |w| above it."""
    values = weight.flatten().tolist()
    threshold = 0.7 * sum(abs(w) for w in values) / len(values)
    large = [abs(w) for w in values if abs(w) > threshold]
    mean_of_large = sum(large) / len(large) if large else 0.0
    scale = float(_stored(torch.tensor(mean_of_large, dtype=weight.dtype), scale_type))
    codes = [0.0 if abs(w) <= threshold else math.copysign(scale, w) for w in values]
    return torch.tensor(codes, dtype=weight.dtype).view_as(weight)


def ternary_per_row(weight: Tensor) -> Tensor:
    """Every row with its own threshold and scale."""
    return torch.stack([ternary_vector(row) for row in weight])


# Uniform quantization of one vector with one scale.


def quantize_symmetric(weight: Tensor, bits: int, scale_type: torch.dtype | None = None) -> Tensor:
    """Codes -2^(b-1) .. 2^(b-1) - 1 times absmax / ((2^b - 1) / 2); with one bit the closed binary form."""
    if bits == 1:
        return signs(weight) * _stored(weight.abs().mean(), scale_type)
    scale = _stored(weight.abs().max() / ((2**bits - 1) / 2), scale_type)
    if scale == 0:
        return torch.zeros_like(weight)
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def quantize_asymmetric(weight: Tensor, bits: int, scale_type: torch.dtype | None = None) -> Tensor:
    """Codes 0 .. 2^b - 1 over [min(w, 0), max(w, 0)], with a whole zero point, so that 0 is one of the values."""
    low, high = weight.min().clamp(max=0), weight.max().clamp(min=0)
    top = 2**bits - 1
    scale = _stored((high - low) / top, scale_type)
    if scale == 0:
        return torch.zeros_like(weight)
    zero_point = (-low / scale).round().clamp(0, top)
    return (((weight / scale).round() + zero_point).clamp(0, top) - zero_point) * scale


def search_scale(
    weight: Tensor,
    bits: int,
    lowest: float,
    *,
    symmetric: bool = True,
    importance: Tensor | None = None,
    scale_type: torch.dtype | None = None,
) -> Tensor:
    """Of 21 shares of the range from 1 down to `lowest`, the rounding with the least (weighted) squared error."""
    best, least = weight, math.inf
    for number in range(21):
        rounded = _rounded(weight, bits, 1 - (1 - lowest) * number / 20, symmetric, scale_type)
        errors = (rounded - weight) ** 2
        error = float((errors if importance is None else errors * importance).sum())
        if error < least:
            best, least = rounded, error
    return best


def _rounded(weight: Tensor, bits: int, share: float, symmetric: bool, scale_type: torch.dtype | None) -> Tensor:
    """A vector rounded to a grid over a share of its range."""
    top = 2**bits - 1
    low, high = share * weight.min().clamp(max=0), share * weight.max().clamp(min=0)
    span = 2 * share * weight.abs().max() if symmetric else high - low
    scale = _stored(span / top, scale_type)
    if scale == 0:
        return torch.zeros_like(weight)
    if symmetric:
        return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    zero_point = (-low / scale).round().clamp(0, top)
    return (((weight / scale).round() + zero_point).clamp(0, top) - zero_point) * scale


def quantize_groups(weight: Tensor, size: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Every `size` consecutive columns of a row quantized on their own; the last group may be shorter."""
    return torch.stack([torch.cat([quantize(group) for group in row.split(size)]) for row in weight])


def _stored(scale: Tensor, scale_type: torch.dtype | None) -> Tensor:
    return scale if scale_type is None else scale.to(scale_type).to(scale.dtype)


# Low rank.


def best_rank(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank in the Frobenius norm (Eckart, Young and Mirsky), in double precision."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]).to(weight.dtype)


def energy_rank(weight: Tensor, fraction: float) -> int:
    """The smallest rank whose squared singular values sum to at least `fraction` of all of them."""
    energies = (torch.linalg.svdvals(weight.double()) ** 2).tolist()
    total = sum(energies)
    for rank in range(1, len(energies) + 1):
        if sum(energies[:rank]) >= fraction * total:
            return rank
    return len(energies)


# Schedules of t optimizer steps, over `steps` steps.


def linear(t: int, steps: int) -> float:
    """The paper's: `max(1 - t / Q, 0)`."""
    return max(1 - t / steps, 0)


def cosine(t: int, steps: int) -> float:
    """Half a cosine wave."""
    return (1 + math.cos(math.pi * min(t / steps, 1))) / 2


def polynomial(t: int, steps: int, power: float) -> float:
    """A power of what is left (cubic: Zhu and Gupta, 1710.01878)."""
    return max(1 - t / steps, 0) ** power


def exponential(t: int, steps: int, rate: float) -> float:
    """`exp(-rate t / Q)`, shifted and scaled to run from 1 to 0."""
    return (math.exp(-rate * min(t / steps, 1)) - math.exp(-rate)) / (1 - math.exp(-rate))


def sigmoid(t: int, steps: int, steepness: float) -> float:
    """The logistic function of `-steepness (t / Q - 1/2)`, shifted and scaled to run from 1 to 0."""

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = logistic(-steepness / 2), logistic(steepness / 2)
    return (logistic(-steepness * (min(t / steps, 1) - 0.5)) - low) / (high - low)


# The blend.


def straight_through(weight: Tensor, compressed: Tensor) -> Tensor:
    """The compressed weight in the forward pass, the identity in the backward pass."""
    return weight + (compressed - weight).detach()


def decaying(weight: Tensor, pruned: Tensor, left: float) -> Tensor:
    """The pruned weight, with the gradient of its mask where weights are kept and a share of it where they are not."""
    kept = (pruned.detach() != 0).to(weight.dtype)
    return straight_through(weight * (kept + (1 - kept) * left), pruned)


def decay_of_pruned(weight: Tensor, pruned: Tensor, factor: float) -> Tensor:
    """The regularizer behind SR-STE (2102.04010): its gradient is `factor * (1 - mask) * w`."""
    return factor / 2 * ((1 - (pruned.detach() != 0).to(weight.dtype)) * weight).square().sum()


def damping(weight: Tensor, rounded: Tensor, smallest: Tensor, largest: Tensor, factor: float) -> Tensor:
    """Oscillation dampening (2203.11086): the squared distance of the clipped weight from where it is rounded to."""
    return factor * (rounded.detach() - torch.minimum(torch.maximum(weight, smallest), largest)).square().sum()


def blend_outputs(beta: float, original: Callable[..., Any], compressed: Callable[..., Any], *inputs: Any) -> Tensor:
    """Equation 1 of the paper: both forms run in full, their outputs added up."""
    return beta * original(*inputs) + (1 - beta) * compressed(*inputs)


# Distillation.


def local_loss(original: Tensor, compressed: Tensor) -> Tensor:
    """`|f(x) - g(x)|^2 / |f(x)|^2`, with f(x) a constant."""
    f = original.detach()
    return ((f - compressed) ** 2).sum() / (f**2).sum()


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Hinton et al. (1503.02531), equation 1: `exp(z_i / T) / sum_j exp(z_j / T)`."""
    raised = (logits / temperature).exp()
    return raised / raised.sum(dim=-1, keepdim=True)


def teacher_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 sum_i p_i log(p_i / q_i)`, teacher p and student q softened, the mean over rows (1503.02531, section 2)."""
    p, q = softened(teacher.detach(), temperature), softened(student, temperature)
    return temperature**2 * (p * (p / q).log()).sum(dim=-1).mean()
