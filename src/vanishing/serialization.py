"""Saving a finished model as one folder, and loading it: `model.safetensors` and `vanishing.json`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vanishing import hugging_face
from vanishing.blend import BlendedBlock, BlendedWeight
from vanishing.compressors.base import BlockCompressor, Compressor
from vanishing.encodings import (
    DTYPES,
    checksum,
    decode,
    dtype_name,
    encode,
    parts_problem,
    read_grid,
    suffixes,
)
from vanishing.errors import FileError, TransitionError, VanishingError
from vanishing.folder import replace_folder
from vanishing.layers import Factored, factor
from vanishing.manifest import (
    SAVE_AGAIN,
    WEIGHTS,
    FileEntry,
    LayerEntry,
    Manifest,
    PackedTensor,
    TensorEntry,
    join,
    read_manifest,
    seal,
    write_manifest,
)
from vanishing.receipt import FinishedLayer, Grid, Receipt, attach_receipt, read_receipt
from vanishing.recipe import Recipe

logger = logging.getLogger(__name__)
