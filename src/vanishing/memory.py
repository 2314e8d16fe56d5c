"""What a training step will take of memory, found by trying small batches."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vanishing.random_state import random_state_kept
from vanishing.transition import Transition

_FEW, _MORE = 2, 4
_MIDDLE = 0.5


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of the memory that the tensors of a training hold at once, in bytes.

    Args:
        parameters: the model in transition, with its buffers, and a recipe's teacher.
        optimizer: the optimizer's state.
        step: everything that comes and goes with a step: activations, gradients, blended weights.
    """

    parameters: int
    optimizer: int
    step: int

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.parameters + self.optimizer + self.step


def estimate_memory(
    transition: Transition,
    compute_loss: Callable[[int], Tensor],
    batch_size: int,
    *,
    moments: int = 2,
    accumulate: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of a training in the middle of its fade, where both forms take part.

    Forward and backward run with batches of 2 and of 4; every allocation grows in a line with the batch, so that its
    size in the whole one is known. The model is left as it was, without gradients.

    Args:
        transition: of the model that will be trained.
        compute_loss: returns the loss of a batch of so many examples; the longest ones, where lengths differ.
        batch_size: examples that go through the model at once.
        moments: tensors that the optimizer keeps for every trained parameter: 2 for Adam, 1 for momentum, 0 for SGD.
        accumulate: whether gradients are summed over several batches, and so are there in every forward pass.

    Raises:
        TransitionError: the transition is over.
        ValueError: `batch_size` is below 1, or `moments` below 0.
        TypeError: `compute_loss` returns something else than a loss.

    >>> from vanishing import MagnitudePruning, prepare
    >>> model = nn.Linear(8, 8)
    >>> transition = prepare(nn.Sequential(model), MagnitudePruning(sparsity=0.5), steps=10)
    >>> estimate_memory(transition, lambda size: model(torch.zeros(size, 8)).sum(), 64).optimizer
    576
    """
    for name, value, least in (("batch_size", batch_size, 1), ("moments", moments, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"estimate_memory: {name} is a whole number, at least {least}, got {value!r}.")
    model = transition.model
    trained = [p for p in model.parameters() if p.requires_grad]
    teacher = transition._teacher
    held = [*model.parameters(), *model.buffers(), *([] if teacher is None else teacher.tensors)]
    with _left_as_it_was(model), transition._overridden(_MIDDLE):
        few, more = (_timeline(model, held, compute_loss, size, accumulate) for size in (_FEW, _MORE))
    return MemoryEstimate(
        parameters=sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()),
        optimizer=moments * sum(p.numel() * p.element_size() for p in trained),
        step=_peak(few, more, batch_size),
    )


def _timeline(
    model: nn.Module, known: list[Tensor], compute_loss: Callable[[int], Tensor], size: int, accumulate: bool
) -> list[int]:
    """Bytes that a step holds, after every allocation."""
    for parameter in model.parameters():
        # Gradients that are there in every forward pass are a part of the step.
        parameter.grad = None
    held = 0
    if accumulate:
        _loss(compute_loss, size).backward()
        held = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with _Allocations([*known, *gradients], held) as allocations:
        _loss(compute_loss, size).backward()
    return allocations.timeline


def _loss(compute_loss: Callable[[int], Tensor], size: int) -> Tensor:
    loss = compute_loss(size)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            "estimate_memory: compute_loss must return the loss of a batch, a tensor of one number to train by."
        )
    return loss


def _peak(few: list[int], more: list[int], size: int) -> int:
    if len(few) != len(more):
        # Another path for another batch: the peaks are all that can be compared.
        few, more = [max(few)], [max(more)]
    pairs = zip(few, more, strict=True)
    return round(max(a + (b - a) / (_MORE - _FEW) * (size - _FEW) for a, b in pairs))


class _Allocations(TorchDispatchMode):
    """Notes the bytes of all storages that operations make, until they are freed."""

    def __init__(self, known: list[Tensor], held: int) -> None:
        super().__init__()
        self.timeline = [held]
        self._held = held
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._held += storage.nbytes()
        self.timeline.append(self._held)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._held -= self._sizes.pop(key, 0)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run a model in training mode, then take back what that changed."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    gradients = {p: p.grad for p in model.parameters()}
    model.train()
    try:
        with random_state_kept(device):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
