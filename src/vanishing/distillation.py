"""Distillation: what a recipe can ask the compressed form to learn from the original, besides the task."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from vanishing.config import Config
from vanishing.errors import ConfigError

_SEQUENCE_DIMENSIONS = 3


@dataclass(frozen=True)
class Distillation(Config, ABC):
    """A loss that `Transition.auxiliary_loss` adds to the task's own while the model is trained."""


@dataclass(frozen=True, kw_only=True)
class LocalLoss(Distillation):
    """Let each compressed layer or block compute what its original computes: `|f(x) - g(x)|^2 / |f(x)|^2` (Frobenius).

    The mean over all layers and blocks that are compressed; where the original has no share any more, 0. f is a
    constant in it, and g learns. Of a block both outputs are there already, and what comes before it in the model
    learns as well. A layer multiplies once more, its input being a constant; recurrent and attention layers, and those
    whose input is quantized, run once more with each form. What a layer's weight is read for without the layer being
    called is not compared.

    Args:
        weight: what the mean is multiplied by.
        every: optimizer steps from one comparison to the next; there is no local loss in the steps between.

    Raises:
        ConfigError: a value is out of range.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a factor above 0")] = 1.0
    every: Annotated[int, Field(ge=1, description="a number of optimizer steps, at least 1")] = 1


@dataclass(frozen=True, kw_only=True)
class Teacher(Distillation):
    """Let the model compute what the original computed when it was given to `prepare`.

    That one is kept as it was, in evaluation mode, without gradients, and beside the model: it is no part of it, and is
    neither trained nor saved. It has copies of the weights that are trained and shares those that are not.

    Args:
        logits: weight of the logits' loss, `T^2 KL(softmax(t / T) || softmax(s / T))`, a mean over examples or tokens
            (Hinton et al., arXiv 1503.02531, section 2); 0 for none. Logits are (batch, classes), (batch, tokens,
            classes) or (batch, classes, height, width). Given as keywords, `labels` of -100 and an `attention_mask` of
            0 leave tokens out.
        temperature: T.
        features: globs on full names of modules whose outputs are compared as well, `|t - s|^2 / |t|^2` for each
            (Frobenius; without the tokens that an `attention_mask` hides), the mean over the modules.
        feature_weight: what that mean is multiplied by.
        bfloat16: whether the teacher's copy is in that type, half as large as in single precision; it shares nothing
            then.

    Raises:
        ConfigError: a value is out of range, or there is nothing to learn.
    """

    logits: Annotated[float, Field(ge=0, allow_inf_nan=False, description="a factor, at least 0")] = 1.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a temperature above 0")] = 2.0
    features: Annotated[tuple[str, ...], Field(description="a list of globs on full names of modules")] = ()
    feature_weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a factor above 0")] = 1.0
    bfloat16: bool = False

    def check(self) -> None:
        if not self.logits and not self.features:
            raise ConfigError("Teacher(logits=0): nothing is left to learn from it. Name features, or leave it out.")


def relative_distance(expected: Any, got: Any, mask: Tensor | None = None) -> Tensor:
    """Return `|expected - got|^2 / |expected|^2` over all floating tensors of two outputs; no gradient to `expected`.

    Args:
        expected: any nesting of tensors.
        got: another one of the same structure.
        mask: (batch, tokens), true where outputs of these dimensions count; None for everywhere.
    """
    distances, norms = [], []
    for wanted, found in zip(_floating(expected), _floating(got), strict=True):
        wanted = wanted.detach()
        # Scores are masked with minus infinity, which both have.
        hidden = wanted.isinf()
        difference = (wanted - found).masked_fill(hidden, 0.0)
        wanted = wanted.masked_fill(hidden, 0.0)
        if mask is not None and wanted.dim() == _SEQUENCE_DIMENSIONS and wanted.shape[:2] == mask.shape:
            difference, wanted = difference * mask[..., None], wanted * mask[..., None]
        distances.append(difference.square().sum())
        norms.append(wanted.square().sum())
    norm = torch.stack(norms).sum()
    return torch.stack(distances).sum() / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over positions (arXiv 1503.02531).

    Args:
        student: logits, (..., classes).
        teacher: those to come close to.
        temperature: T.
        mask: (...), true where a position counts; None for everywhere.
    """
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    student, teacher = (_precise(each).flatten(0, -2) / temperature for each in (student, teacher))
    divergence = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    ) / max(len(student), 1)
    return divergence * temperature**2


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of at least one scalar, on the device of the first one."""
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _floating(outputs: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield _precise(leaf)


def _precise(values: Tensor) -> Tensor:
    """At least in single precision, which sums of many squares need."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
