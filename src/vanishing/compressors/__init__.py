"""The techniques, one a file."""

from vanishing.compressors.base import (
    BlockCompressor,
    CompressedWeight,
    Compressor,
    Gradient,
    LayerView,
    Moment,
    ProjectedWeight,
    ProjectionCompressor,
    WeightCompressor,
)
from vanishing.compressors.binary import Binary
from vanishing.compressors.chain import Chain
from vanishing.compressors.low_rank import LowRank
from vanishing.compressors.magnitude_pruning import MagnitudePruning, Score
from vanishing.compressors.quantization import Quantization
from vanishing.compressors.replace import Replace
from vanishing.compressors.structured import HeadPruning, StructuredPruning, WidthPruning
from vanishing.compressors.ternary import Ternary

__all__ = [
    "Binary",
    "BlockCompressor",
    "Chain",
    "CompressedWeight",
    "Compressor",
    "Gradient",
    "HeadPruning",
    "LayerView",
    "LowRank",
    "MagnitudePruning",
    "Moment",
    "ProjectedWeight",
    "ProjectionCompressor",
    "Quantization",
    "Replace",
    "Score",
    "StructuredPruning",
    "Ternary",
    "WeightCompressor",
    "WidthPruning",
]
