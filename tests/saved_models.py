"""Finished models for the tests of saving and loading, and what a folder holds."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vanishing import (
    Binary,
    Compressor,
    LowRank,
    MagnitudePruning,
    PerGroup,
    Quantization,
    Recipe,
    StepSchedule,
    Ternary,
    prepare,
)

WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "vanishing.json", "config.json"
NOW = StepSchedule(at=0)


COMPRESSORS = {
    "pruning": MagnitudePruning(sparsity=0.9),
    "binary": Binary(),
    "ternary": Ternary(),
    "8 bits": Quantization(bits=8),
    "3 bits, asymmetric": Quantization(bits=3, symmetric=False),
    "4 bits in groups": Quantization(bits=4, granularity=PerGroup(64)),
    "5 bits in ragged groups": Quantization(bits=5, granularity=PerGroup(48), symmetric=False),
    "low rank": LowRank(rank=4),
    "pruning | 4 bits": MagnitudePruning(sparsity=0.7) | Quantization(bits=4),
    "pruning | binary": MagnitudePruning(sparsity=0.7) | Binary(),
    "low rank | 4 bits": LowRank(rank=12) | Quantization(bits=4),
}


class Net(nn.Module):
    """A convolution, a norm with buffers, two linears and a tied pair."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.embedding = nn.Embedding(30, width)
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("places", torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).mean(-1)
        x = self.second(torch.relu(self.first(x))) + self.embedding(torch.zeros(len(x), dtype=torch.int64))
        output: Tensor = self.head(x)
        return output


def net(seed: int = 0, width: int = 64) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def batch() -> Tensor:
    return torch.randn(8, 4, 10, generator=torch.Generator().manual_seed(1))


def compressed(recipe: Recipe | Compressor, model: nn.Module | None = None, steps: int = 3) -> Any:
    """A model that was trained for a few steps in transition and finished."""
    model = net() if model is None else model
    if isinstance(recipe, Compressor):
        recipe = Recipe({"*first": recipe, "*second": recipe, "*convolution": recipe}, schedule=NOW)
    transition = prepare(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    return transition.finish().eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model.eval()(batch())
    assert isinstance(result, Tensor)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 60,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **changes)).eval()


def logits(model: Any) -> Tensor:
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result
