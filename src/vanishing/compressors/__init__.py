"""The techniques, one a file."""

from vanishing.compressors.activation_quantization import ActivationQuantization, Range
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
from vanishing.compressors.feed_forward import NarrowFeedForward
from vanishing.compressors.low_rank import LowRank
from vanishing.compressors.magnitude_pruning import MagnitudePruning, Score
from vanishing.compressors.quantization import Quantization
from vanishing.compressors.replace import Replace
from vanishing.compressors.separable import DepthwiseSeparable
from vanishing.compressors.skip import SkipBlock
from vanishing.compressors.structured import ChannelPruning, HeadPruning, Importance, StructuredPruning, WidthPruning
from vanishing.compressors.ternary import Ternary

__all__ = [
    "ActivationQuantization",
    "Binary",
    "BlockCompressor",
    "Chain",
    "ChannelPruning",
    "CompressedWeight",
    "Compressor",
    "DepthwiseSeparable",
    "Gradient",
    "HeadPruning",
    "Importance",
    "LayerView",
    "LowRank",
    "MagnitudePruning",
    "Moment",
    "NarrowFeedForward",
    "ProjectedWeight",
    "ProjectionCompressor",
    "Quantization",
    "Range",
    "Replace",
    "Score",
    "SkipBlock",
    "StructuredPruning",
    "Ternary",
    "WeightCompressor",
    "WidthPruning",
]
