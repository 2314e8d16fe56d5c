"""Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 x 28 gray pixels, in ten classes."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PACKAGE = "dataset-fashion-mnist"
_PREFIXES = {"train": "train", "test": "t10k"}


def read_fashion_mnist(split: str, folder: Path = DEFAULT_FOLDER) -> tuple[Tensor, Tensor]:
    """Return the images (examples, 28, 28) as bytes and the labels (examples,) of the split "train" or "test".

    Raises:
        FileNotFoundError: the folder does not hold the IDX files, neither plain nor gzipped.
    """
    prefix = _PREFIXES[split]
    return _read_idx(folder, f"{prefix}-images-idx3-ubyte"), _read_idx(folder, f"{prefix}-labels-idx1-ubyte").long()


def _read_idx(folder: Path, name: str) -> Tensor:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.exists():
        content = plain.read_bytes()
    elif packed.exists():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise FileNotFoundError(
            f"Fashion-MNIST: neither {name} nor {name}.gz is in {folder}. "
            f"On Debian and Ubuntu run: apt-get install {_PACKAGE}. Elsewhere give the files' folder by --data."
        )
    # IDX: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension as a big-endian word.
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).reshape(shape)
