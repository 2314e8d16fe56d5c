"""The kinds of layers whose weights can be compressed, one a file."""

from vanishing.layers import attention, convolution, embedding, experts, linear, recurrent
from vanishing.layers.base import Factored, LayerKind, Layout, Split, factor, find_kind, register_kind
from vanishing.layers.quantized_input import QuantizedInput

__all__ = [
    "Factored",
    "LayerKind",
    "Layout",
    "QuantizedInput",
    "Split",
    "attention",
    "convolution",
    "embedding",
    "experts",
    "factor",
    "find_kind",
    "linear",
    "recurrent",
    "register_kind",
]
