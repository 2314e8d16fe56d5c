"""Tasks of the benchmark: a model, data in memory, and how the two are trained and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_TEST_BATCH = 256


@dataclass(frozen=True)
class Examples:
    """Labeled examples.

    Args:
        inputs: (examples, ...).
        targets: (examples,), class indices.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A classification task: the same seed gives the same split, the same first weights and the same order of batches.

    Args:
        name: what the task is called in tables.
        seed: what everything random about the task follows from.
        make_model: returns the architecture with random weights.
        layers: glob on the names of the modules that are compressed.
        train: the examples to learn from.
        test: the examples to be judged on.
        batch_size: examples a step.
    """

    name: str
    seed: int
    make_model: Callable[[], nn.Module]
    layers: str
    train: Examples
    test: Examples
    batch_size: int

    def batches(self, steps: int) -> Iterator[Examples]:
        """Yield one batch for each of `steps` optimizer steps, epoch after epoch, each in an order of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < self.batch_size:
                order = torch.randperm(len(self.train.targets), generator=generator)
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            yield Examples(self.train.inputs[chosen], self.train.targets[chosen])

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the mean cross entropy of a batch."""
        return functional.cross_entropy(model(batch.inputs), batch.targets)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of the test examples that the model gets right, and leave it in the mode it was in."""
        was_training = model.training
        model.eval()
        parts = zip(self.test.inputs.split(_TEST_BATCH), self.test.targets.split(_TEST_BATCH), strict=True)
        right = sum(int((model(inputs).argmax(dim=1) == targets).sum()) for inputs, targets in parts)
        model.train(was_training)
        return right / len(self.test.targets)


class SmallViT(nn.Module):
    """A vision transformer for small gray images: pre-norm blocks, learned positions, mean pooling.

    Args:
        image: side of the square image in pixels.
        patch: side of a square patch in pixels.
        width: number of features of a token.
        depth: number of blocks.
        heads: number of attention heads.
        classes: number of classes.
    """

    def __init__(
        self, *, image: int = 8, patch: int = 2, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.position = nn.Parameter(0.5 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, 1, image, image)."""
        patches = functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(tokens.mean(dim=1)))


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (batch, tokens, width) after the block."""
        qkv = self.qkv(self.norm_attention(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(mixed)
        return tokens + self.down(functional.gelu(self.up(self.norm_mlp(tokens))))
