"""The share of the original in what a layer or a block computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vanishing.compressors.base import Beta
from vanishing.distributed import is_distributed
from vanishing.outputs import combined


class Comparison(NamedTuple):
    """What looks at both forms in forward passes that are trained on; functions, which copies of a model share.

    Args:
        is_wanted: whether the pass that is under way is such a one.
        keep: takes how far what the compressed form has computed is from what the original has from the same inputs, a
            scalar, and in a graph that is compiled for every beta, whether the original has a share.
    """

    is_wanted: Callable[[], bool]
    keep: Callable[[Tensor, Tensor | None], None]


class Form(Enum):
    """What is looked at alone of the two forms that are blended."""

    ORIGINAL = "original"
    COMPRESSED = "compressed"
    DIFFERENCE = "difference"
    """The original, as a constant, less the compressed form."""


class Blend(nn.Module):
    """Holds beta for one layer or block: a float for eager mode and a tensor, beside it, for compiled graphs.

    A compiled graph reads the tensor, so that it is not compiled anew while beta moves, and `fading`, which changes
    once in a transition: where layers fade one after another, when the last of them has no original left.
    """

    beta_tensor: Tensor
    comparison: Comparison | None = None
    """What looks at both forms at this optimizer step, as long as both are there."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0
        self.fading = True
        self.register_buffer("beta_tensor", torch.ones(()), persistent=False)

    def set_beta(self, beta: float, *, fading: bool) -> None:
        """Set the original's share, in [0, 1], and whether compiled graphs have to run it."""
        if beta != self.beta:
            # A module's own way to set an attribute costs more than all the rest of a step of the clock.
            vars(self).update(beta=beta)
            self.beta_tensor.fill_(beta)
        if fading != self.fading:
            vars(self).update(fading=fading)

    @property
    def vanished(self) -> bool:
        """Whether the original has no part in what is computed now, and need not run."""
        return not self.fading if torch.compiler.is_compiling() else self.beta == 0.0

    def current_beta(self) -> Beta:
        """Return beta as a tensor while a graph is being compiled, else as a float."""
        return self.beta_tensor if torch.compiler.is_compiling() else self.beta

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # model.half() must not round beta; its device follows the model.
        self.beta_tensor = torch.full((), self.beta, dtype=torch.float32, device=self.beta_tensor.device)
        return self


class _WithIdle(torch.autograd.Function):
    """A tensor as it is, through which parameters that have no part in it get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def with_idle(values: Any, parameters: Iterable[Tensor], *, copy: bool = False) -> Any:
    """Return tensors in whose graph the parameters of the form that does not run take part, with zeros.

    Among several processes only: `DistributedDataParallel` waits for the gradient of every parameter.

    Args:
        values: what a form computes from, or what it computed: any nesting of tensors that can be blended.
        parameters: those of the other form.
        copy: whether the model may write into the result, which must not be a view then.
    """
    if not (is_distributed() and torch.is_grad_enabled()):
        return values
    idle = [parameter for parameter in parameters if parameter.requires_grad]
    if not idle:
        return values

    def tied(leaf: Tensor, _: Tensor, __: str) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        result: Tensor = _WithIdle.apply(leaf, *idle)
        return result.clone() if copy else result

    return combined(values, values, "", tied)
