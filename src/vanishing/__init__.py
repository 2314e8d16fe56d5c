"""Compress PyTorch models while they are fine-tuned, by Vanishing Contributions (VCON, arXiv 2510.09696)."""

from vanishing.compressors import (
    Binary,
    BlockCompressor,
    CompressedWeight,
    Compressor,
    Gradient,
    LowRank,
    MagnitudePruning,
    ProjectionCompressor,
    Quantization,
    Replace,
    Ternary,
    WeightCompressor,
)
from vanishing.errors import ConfigError, FileError, RecipeError, TransitionError, VanishingError
from vanishing.granularity import NM, Global, PerChannel, PerGroup, PerTensor
from vanishing.recipe import Recipe, Rule
from vanishing.schedules import (
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PolynomialSchedule,
    SigmoidSchedule,
    StepSchedule,
)
from vanishing.serialization import load, save
from vanishing.summary import Size, Summary, SummaryRow, summary
from vanishing.transition import Transition, prepare

__version__ = "0.1.0"
