"""The model that step time, memory and file size are measured on, and the arms that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import ViTConfig, ViTForImageClassification

import vanishing

FADE = 100_000
"""Optimizer steps of the fade: long enough that no measurement moves far from the beta that it started at."""


@dataclass(frozen=True)
class Workload:
    """One training step of ViT-Tiny/16: image side in pixels, images a step, device, autocast type or None, heads."""

    size: int = 224
    batch: int = 16
    device: str = "cpu"
    autocast: torch.dtype | None = None
    heads: int = 3

    def model(self) -> nn.Module:
        """Return ViT-Tiny/16 with the same random weights for every arm."""
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=self.heads,
            intermediate_size=768,
            image_size=self.size,
            patch_size=16,
            num_labels=10,
        )
        return ViTForImageClassification(config).to(self.device).train()

    def batch_of_images(self) -> tuple[Tensor, Tensor]:
        """Return the images (batch, 3, size, size) and labels (batch,) that every step of every arm sees."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(0, 10, (self.batch,), generator=generator)
        return images.to(self.device), labels.to(self.device)


Advance = Callable[[], object]
Prepare = Callable[[nn.Module], Advance]


def make_step(workload: Workload, prepare: Prepare) -> Callable[[], None]:
    """Return one training step of an arm: clear gradients, forward, loss, backward, AdamW, the clock of the arm."""
    model = workload.model()
    advance = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = workload.batch_of_images()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(workload.device, dtype=workload.autocast, enabled=workload.autocast is not None):
            loss = cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        advance()

    return step


def dense(model: nn.Module) -> Advance:
    """Plain fine-tuning."""
    return lambda: None


def vanishing_arm(compressor: vanishing.Compressor, *, progress: float) -> Prepare:
    """All encoder linears through the library, `progress` of the way through the fade (1: the original is gone)."""
    return lambda model: _transition(model, compressor, progress).step


def finished_arm(compressor: vanishing.Compressor) -> Prepare:
    """All encoder linears compressed and finished: what an arm at the end of the fade can at best take."""

    def prepare(model: nn.Module) -> Advance:
        _transition(model, compressor, 1.0).finish()
        return dense(model)

    return prepare


def _transition(model: nn.Module, compressor: vanishing.Compressor, progress: float) -> vanishing.Transition:
    recipe = vanishing.Recipe(
        rules={nn.Linear: compressor}, ignore=["classifier"], schedule=vanishing.LinearSchedule(steps=FADE)
    )
    transition = vanishing.prepare(model, recipe)
    transition.seek(round(progress * FADE))
    return transition


class TwoPaths(nn.Module):
    """`beta * f(x) + (1 - beta) * g(x)` with both linear layers run on all tokens; g is a pruned copy."""

    mask: Tensor

    def __init__(self, original: nn.Linear, sparsity: float, beta: float) -> None:
        super().__init__()
        self.original = original
        self.beta = beta
        magnitude = original.weight.detach().abs()
        self.register_buffer(
            "mask", magnitude > magnitude.flatten().kthvalue(round(sparsity * magnitude.numel())).values
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        pruned = linear(x, weight * self.mask, self.original.bias)
        return self.beta * self.original(x) + (1 - self.beta) * pruned


class TwoPathsLowRank(nn.Module):
    """`beta * f(x) + (1 - beta) * g(x)` with f the linear layer and g its two factors, both run on all tokens."""

    def __init__(self, original: nn.Linear, rank: int, beta: float) -> None:
        super().__init__()
        self.original = original
        self.beta = beta
        u, s, v = torch.linalg.svd(original.weight.detach(), full_matrices=False)
        self.up = nn.Parameter(u[:, :rank] * s[:rank].sqrt())
        self.down = nn.Parameter(s[:rank, None].sqrt() * v[:rank])

    def forward(self, x: Tensor) -> Tensor:
        factored = linear(linear(x, self.down), self.up, self.original.bias)
        return self.beta * self.original(x) + (1 - self.beta) * factored


class FullTopK(nn.Module):
    """The pruned weight blended with the original, the k largest magnitudes selected from scratch in every forward."""

    def __init__(self, original: nn.Linear, sparsity: float, beta: float) -> None:
        super().__init__()
        self.original = original
        self.beta = beta
        self.kept = original.weight.numel() - round(sparsity * original.weight.numel())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        kept = weight.detach().abs().flatten().topk(self.kept, sorted=False).indices
        mask = torch.zeros_like(weight).flatten().index_fill_(0, kept, 1.0).view_as(weight)
        pruned = weight + (weight * mask - weight).detach()
        return linear(x, self.beta * weight + (1 - self.beta) * pruned, self.original.bias)


def textbook_arm(form: Callable[[nn.Linear], nn.Module]) -> Prepare:
    """Every encoder linear replaced by a blend written out as in a textbook."""

    def prepare(model: nn.Module) -> Advance:
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "classifier"]
        for name, layer in named:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, form(layer))
        return lambda: None

    return prepare


ARMS: dict[str, Prepare] = {
    "pruning 90 %": vanishing_arm(vanishing.MagnitudePruning(sparsity=0.9), progress=0.5),
    "binary": vanishing_arm(vanishing.Binary(), progress=0.5),
    "4 bits": vanishing_arm(vanishing.Quantization(bits=4), progress=0.5),
    "low rank 16": vanishing_arm(vanishing.LowRank(rank=16), progress=0.5),
    "low rank 16 after Q": vanishing_arm(vanishing.LowRank(rank=16), progress=1.0),
    "low rank 16, finished": finished_arm(vanishing.LowRank(rank=16)),
    "textbook: two paths": textbook_arm(lambda layer: TwoPaths(layer, 0.9, 0.5)),
    "textbook: two paths, low rank 16": textbook_arm(lambda layer: TwoPathsLowRank(layer, 16, 0.5)),
    "textbook: full top-k": textbook_arm(lambda layer: FullTopK(layer, 0.9, 0.5)),
}
