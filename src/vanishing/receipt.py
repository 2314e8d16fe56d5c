"""What `finish` leaves on a model, so that `save` and `summary` know what was done to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vanishing.layers.base import Layout
from vanishing.places import is_below, join

if TYPE_CHECKING:
    from vanishing.compressors.base import Compressor
    from vanishing.recipe import Recipe

_ATTRIBUTE = "_vanishing_receipt"


@dataclass(frozen=True)
class Grid:
    """The values that a quantized weight may take: `(code - zero_point) * scale` in each group of its matrix.

    Args:
        bits: width of a code in the file, 1 to 8. With 1 bit the two values are -scale and +scale.
        scale: (rows or 1, groups or 1), in the type that is stored; arithmetic is done in the weight's own type.
        zero_point: unsigned codes' zero, of the shape of `scale`; None for codes that are signed around 0, from
            `-2**(bits-1)` to `2**(bits-1) - 1`.
        group: columns that share a scale; None for all of them. The last group may be shorter.
        layout: how the weight becomes the matrix.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor | None
    group: int | None
    layout: Layout


@dataclass(frozen=True)
class FinishedLayer:
    """One compressed layer of a finished model.

    Args:
        compressor: the technique.
        structure: "weight" for the same layer with another weight, "factored" for two plain layers in its place,
            "quantized_input" for the layer with what its input goes through, "replaced" for a module of the user's.
        parameters_before: number of parameters of the original layer.
        bytes_before: their size in memory.
        grids: parameter name below the layer -> the values that it may take, for quantized weights.
        narrowed_from: shape of the original's weight, if features were cut out of it.
        counts: attribute of the module -> what it counts now, if units were cut out of the layers in it.
    """

    compressor: Compressor
    structure: str
    parameters_before: int
    bytes_before: int
    grids: dict[str, Grid]
    narrowed_from: tuple[int, ...] | None = None
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """The resolved recipe (None where this process cannot read it) and the compressed layers by full module name."""

    recipe: Recipe | None
    layers: dict[str, FinishedLayer]


def attach_receipt(model: nn.Module, receipt: Receipt) -> None:
    """Leave the receipt on a finished model as a plain attribute; it travels with copies of the model."""
    setattr(model, _ATTRIBUTE, receipt)


def extend_receipt(model: nn.Module, receipt: Receipt) -> None:
    """Leave a receipt on a model that may have been finished before; what is said of other layers stays."""
    earlier = read_receipt(model)
    known = {} if earlier is None else earlier.layers
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    replaced = [name for name, layer in receipt.layers.items() if layer.structure == "replaced"]
    layers = {name: layer for name, layer in known.items() if not any(is_below(name, block) for block in replaced)}
    for name, layer in receipt.layers.items():
        # The size before is that of the first original.
        first = known.get(name, layer)
        layers[name] = dataclasses.replace(
            layer,
            parameters_before=first.parameters_before,
            bytes_before=first.bytes_before,
            narrowed_from=first.narrowed_from or layer.narrowed_from,
            counts=first.counts | layer.counts,
        )
    attach_receipt(model, Receipt(receipt.recipe, layers))


def read_receipt(model: nn.Module) -> Receipt | None:
    """Return the receipt of a finished or loaded model, None for any other model.

    What was said of a part of it, which had a transition of its own, is in it as well.
    """
    found = {name: module.__dict__[_ATTRIBUTE] for name, module in model.named_modules() if _ATTRIBUTE in vars(module)}
    if not found:
        return None
    # A part that was finished before the whole has none left, so what it says is newer.
    layers = {join(part, name): layer for part, receipt in found.items() for name, layer in receipt.layers.items()}
    return Receipt(found[""].recipe if "" in found else None, layers)
