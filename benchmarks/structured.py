"""What is left of a model of which half the heads and hidden units or inner channels were taken out, against the whole.

ViT-Tiny/16, ResNet-18 (224 px) and MiniLM-L6 (128 tokens), random weights: counts and times do not depend on them, nor
on which half it is. ResNet-18 loses the channels inside of its blocks, and with `resnet18-all` those of the residual
stream as well, as Torch-Pruning's dependency graph finds them. Reported are
multiply-accumulates and bytes of the whole and of the small one, and the time of a forward pass at batch 1 and 32, each
pass of the small model beside one of the whole model in the same process, whole / small.

    python benchmarks/structured.py
    python benchmarks/structured.py --pairs 10 --models minilm
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from paired import machine, time_pairs, write_record
from torch import nn
from transformers import BertConfig, BertModel
from workload import Workload

import vanishing
from vanishing.integrations import torch_pruning

AT_ONCE = vanishing.StepSchedule(at=0)
UNITS = vanishing.Recipe({"*": vanishing.HeadPruning(0.5), "**": vanishing.WidthPruning(0.5)}, schedule=AT_ONCE)
CHANNELS = vanishing.Recipe({"*": vanishing.ChannelPruning(0.5)}, schedule=AT_ONCE)
BATCHES = (1, 32)


def vit() -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    # Half of three heads are none: the small models of the family have them in even numbers.
    return Workload(heads=4).model(), lambda size: {"pixel_values": torch.randn(size, 3, 224, 224)}


def minilm() -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))
    return model, lambda size: {"input_ids": torch.randint(1_000, 30_000, (size, 128))}


def resnet() -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    torch.manual_seed(0)
    return timm.create_model("resnet18"), lambda size: {"x": torch.randn(size, 3, 224, 224)}


def everywhere(model: nn.Module) -> vanishing.Transition:
    return torch_pruning.prepare(model, torch.randn(1, 3, 224, 224), sparsity=0.5, schedule=AT_ONCE)


MODELS = {
    "vit": (vit, lambda model: vanishing.prepare(model, UNITS)),
    "minilm": (minilm, lambda model: vanishing.prepare(model, UNITS)),
    "resnet18": (resnet, lambda model: vanishing.prepare(model, CHANNELS)),
    "resnet18-all": (resnet, everywhere),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    print(machine("cpu"))
    print(f"{'model':14}{'MACs, millions':>22}{'MB':>18}{'batch':>7}{'whole / small (quartiles)':>30}{'ms':>19}")
    rows = []
    for name in options.models:
        build, prepare = MODELS[name]
        whole, inputs = build()
        small = copy.deepcopy(whole)
        prepare(small).finish(force=True)
        sizes = [vanishing.summary(model, inputs(1)).after for model in (whole, small)]
        products = [size.multiply_accumulates for size in sizes]
        for batch in BATCHES:
            given = inputs(batch)
            steps = [_forward(model.eval(), given) for model in (small, whole)]
            for step in steps:
                step()
            ratios = time_pairs(steps[0], steps[1], pairs=options.pairs, device="cpu")
            rows.append({"model": name, "batch": batch, "products": products, "bytes": [size.bytes for size in sizes]})
            rows[-1] |= {"whole_to_small": asdict(ratios)}
            counts = " -> ".join(f"{count / 1e6:,.0f}" for count in products if count is not None)
            megabytes = " -> ".join(f"{size.bytes / 1e6:.1f}" for size in sizes)
            quartiles = f"{ratios.median_ratio:.2f} ({ratios.lower_quartile:.2f}-{ratios.upper_quartile:.2f})"
            times = f"{ratios.step_ms:.1f} -> {ratios.baseline_ms:.1f}"
            print(f"{name:14}{counts:>22}{megabytes:>18}{batch:7}{quartiles:>30}{times:>19}", flush=True)
    write_record(options, {"rows": rows})


def _forward(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    @torch.inference_mode()
    def step() -> None:
        model(**inputs)

    return step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs of forward passes")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.set_defaults(device="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
