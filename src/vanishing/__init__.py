"""Compress PyTorch models while they are fine-tuned, by Vanishing Contributions (VCON, arXiv 2510.09696)."""

from vanishing.calibration import Calibration, Observer
from vanishing.compressors import (
    ActivationQuantization,
    Binary,
    BlockCompressor,
    ChannelPruning,
    CompressedWeight,
    Compressor,
    DepthwiseSeparable,
    Gradient,
    HeadPruning,
    Importance,
    LowRank,
    MagnitudePruning,
    NarrowFeedForward,
    ProjectionCompressor,
    Quantization,
    Range,
    Replace,
    Score,
    SkipBlock,
    Ternary,
    WeightCompressor,
    WidthPruning,
)
from vanishing.distillation import LocalLoss, Teacher
from vanishing.errors import ConfigError, FileError, RecipeError, TransitionError, VanishingError
from vanishing.granularity import NM, Global, PerChannel, PerGroup, PerTensor
from vanishing.layers import Split
from vanishing.memory import MemoryEstimate, estimate_memory
from vanishing.preparation import prepare
from vanishing.recipe import Recipe, Rule
from vanishing.schedules import (
    Adaptive,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Order,
    PolynomialSchedule,
    SigmoidSchedule,
    Staggered,
    StepSchedule,
)
from vanishing.serialization import load, save
from vanishing.summary import Size, Summary, SummaryRow, summary
from vanishing.transition import Transition

__all__ = [
    "prepare",
    "Transition",
    "Recipe",
    "Rule",
    "MagnitudePruning",
    "Quantization",
    "Binary",
    "Ternary",
    "ActivationQuantization",
    "LowRank",
    "HeadPruning",
    "WidthPruning",
    "ChannelPruning",
    "Replace",
    "SkipBlock",
    "NarrowFeedForward",
    "DepthwiseSeparable",
    "LinearSchedule",
    "CosineSchedule",
    "PolynomialSchedule",
    "ExponentialSchedule",
    "SigmoidSchedule",
    "StepSchedule",
    "Staggered",
    "Order",
    "Adaptive",
    "PerTensor",
    "PerChannel",
    "PerGroup",
    "Global",
    "NM",
    "Gradient",
    "Range",
    "Score",
    "Importance",
    "Split",
    "Calibration",
    "LocalLoss",
    "Teacher",
    "save",
    "load",
    "summary",
    "Summary",
    "SummaryRow",
    "Size",
    "estimate_memory",
    "MemoryEstimate",
    "Compressor",
    "WeightCompressor",
    "ProjectionCompressor",
    "BlockCompressor",
    "CompressedWeight",
    "Observer",
    "VanishingError",
    "ConfigError",
    "RecipeError",
    "TransitionError",
    "FileError",
]

__version__ = "0.1.0"
