"""Size of a saved model: compressed layers' weights in the file against the same weights dense in single precision.

The bytes are those of the stored tensors that belong to a compressed layer's weight (codes, scales, masks, values,
factors), read from the header of the `model.safetensors` that `vanishing.save` wrote. Low rank is compared with its
factors in single precision. The last two columns are the whole folder, with everything that is not compressed, and
the same model saved dense.

    python benchmarks/file_size.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel
from workload import Workload

import vanishing

MIB = 2**20
TECHNIQUES: dict[str, vanishing.Compressor] = {
    "pruning 90 %": vanishing.MagnitudePruning(sparsity=0.9),
    "binary, scale a row": vanishing.Binary(),
    "binary, scale a tensor": vanishing.Binary(granularity=vanishing.PerTensor()),
    "ternary": vanishing.Ternary(),
    "4 bits, groups of 64": vanishing.Quantization(bits=4, granularity=vanishing.PerGroup(size=64)),
    "4 bits, groups of 64, zero points": vanishing.Quantization(
        bits=4, granularity=vanishing.PerGroup(size=64), symmetric=False
    ),
    "8 bits": vanishing.Quantization(bits=8),
    "pruning 50 %, 4 bits": vanishing.MagnitudePruning(sparsity=0.5) | vanishing.Quantization(bits=4),
    "low rank 16": vanishing.LowRank(rank=16),
    "low rank 16, 8 bits": vanishing.LowRank(rank=16) | vanishing.Quantization(bits=8),
}


@dataclass(frozen=True)
class Size:
    """What one technique makes of one model, in bytes."""

    model: str
    technique: str
    dense_weight_bytes: int
    stored_weight_bytes: int
    factor_bytes: int
    folder_bytes: int
    dense_folder_bytes: int


def mini_lm() -> nn.Module:
    """Return BERT in the dimensions of MiniLM-L6, with random weights."""
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))


MODELS: dict[str, Callable[[], nn.Module]] = {"MiniLM-L6": mini_lm, "ViT-Tiny/16": Workload().model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    titles = f"{'dense MiB':>10}{'stored':>8}{'ratio':>8}{'/ factors':>11}{'folder':>9}{'dense':>8}"
    print(f"{'model':13}{'technique':35}{titles}")
    sizes = []
    for model in MODELS:
        for technique in TECHNIQUES:
            size = measure(model, technique)
            sizes.append(asdict(size))
            factors = f"{size.stored_weight_bytes / size.factor_bytes:11.4f}" if size.factor_bytes else " " * 11
            ratio = f"{size.stored_weight_bytes / size.dense_weight_bytes:8.4f}{factors}"
            weights = f"{size.dense_weight_bytes / MIB:10.2f}{size.stored_weight_bytes / MIB:8.2f}{ratio}"
            folders = f"{size.folder_bytes / MIB:9.2f}{size.dense_folder_bytes / MIB:8.2f}"
            print(f"{model:13}{technique:35}{weights}{folders}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(sizes, indent=2) + "\n")


def measure(model_name: str, technique: str) -> Size:
    """Return the sizes of a model whose encoder's linear layers are compressed at once, finished and saved."""
    model = MODELS[model_name]()
    layers = {
        name: module.weight.nbytes
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(("classifier", "pooler"))
    }
    with tempfile.TemporaryDirectory() as folder:
        vanishing.save(model, Path(folder, "dense"))
        recipe = vanishing.Recipe(
            rules=dict.fromkeys(layers, TECHNIQUES[technique]), schedule=vanishing.StepSchedule(at=0)
        )
        vanishing.prepare(model, recipe).finish()
        vanishing.save(model, Path(folder, "small"))
        header = _read_header(Path(folder, "small", "model.safetensors"))
        folder_bytes, dense_folder_bytes = (_folder_bytes(Path(folder, name)) for name in ("small", "dense"))
    stored = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if any(name.startswith(f"{layer}.") for layer in layers) and ".bias" not in name
    )
    finished = [model.get_submodule(name) for name in layers]
    factors = sum(4 * part.weight.numel() for layer in finished if isinstance(layer, nn.Sequential) for part in layer)
    return Size(
        model=model_name,
        technique=technique,
        dense_weight_bytes=sum(layers.values()),
        stored_weight_bytes=stored,
        factor_bytes=factors,
        folder_bytes=folder_bytes,
        dense_folder_bytes=dense_folder_bytes,
    )


def _read_header(path: Path) -> dict[str, dict[str, list[int]]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
