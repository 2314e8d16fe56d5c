"""What a model weighs, layer by layer, before and after compression."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blended_block import BlendedBlock
from vanishing.blended_weight import blended_weights, compressed_in_turn, grid_in_turn
from vanishing.encodings import encode
from vanishing.inputs import call
from vanishing.layers import Factored, LayerKind, QuantizedInput, Split, find_kind
from vanishing.places import is_below, join
from vanishing.receipt import FinishedLayer, Grid, read_receipt
from vanishing.text import as_text


@dataclass(frozen=True)
class Size:
    """The size of a layer or a model.

    Args:
        parameters: number of parameters; tied ones count once, where they come first.
        nonzeros: how many of them are not zero; None where the weights are gone.
        bytes: what they take: in memory before, in the file after.
        multiply_accumulates: products with the weights, for the example inputs or, without any, for one position (a
            token, a pixel) of each layer; None where nobody can tell.
    """

    parameters: int
    nonzeros: int | None
    bytes: int
    multiply_accumulates: int | None

    def __add__(self, other: Size) -> Size:
        values = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Size(*(None if a is None or b is None else a + b for a, b in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Passes:
    """How often a layer multiplies with its weight, and at how many positions it has outputs; None if not known."""

    weight: int | None
    output: int | None

    def __add__(self, other: Passes) -> Passes:
        pairs = ((self.weight, other.weight), (self.output, other.output))
        return Passes(*(None if a is None or b is None else a + b for a, b in pairs))


@dataclass(frozen=True)
class SummaryRow:
    """One layer: its full name, its type, the technique ("" for none) and its size before and after."""

    name: str
    layer: str
    technique: str
    before: Size
    after: Size


@dataclass(frozen=True)
class Summary:
    """Every layer that has parameters, and the total; printed, a table."""

    rows: tuple[SummaryRow, ...]

    @property
    def before(self) -> Size:
        """The whole model before compression."""
        return sum((row.before for row in self.rows), Size(0, 0, 0, 0))

    @property
    def after(self) -> Size:
        """The whole model after compression."""
        return sum((row.after for row in self.rows), Size(0, 0, 0, 0))

    def __str__(self) -> str:
        table = Table("layer", "type", "technique", show_footer=True)
        table.columns[0].footer = "total"
        total_before, total_after = dataclasses.astuple(self.before), dataclasses.astuple(self.after)
        for position, field in enumerate(dataclasses.fields(Size)):
            footer = _change(total_before[position], total_after[position])
            table.add_column(field.name.replace("_", "-"), footer, justify="right")
        for row in self.rows:
            sizes = zip(dataclasses.astuple(row.before), dataclasses.astuple(row.after), strict=True)
            names = (escape(text) for text in (row.name, row.layer, row.technique))
            table.add_row(*names, *(_change(a, b) for a, b in sizes))
        return as_text(table, width=200)


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """Return per layer and in total: parameters, non-zeros, bytes and multiply-accumulates, before and after.

    For a finished or loaded model this compares with the original; for a model in transition with what it will be;
    for any other model nothing differs. A layer that was not compressed weighs in the file what `save` would write.

    Args:
        model: any model.
        example_inputs: one batch (a tensor, a tuple of arguments or a mapping of keywords) to count the positions of
            every layer with; the model runs once, without gradients and in evaluation mode.

    Raises:
        ValueError: the model has no parameters.

    >>> small = summary(nn.Linear(4, 2))
    >>> small.after.parameters
    10
    """
    receipt = read_receipt(model)
    finished = {} if receipt is None else receipt.layers
    layers = list(_layers(model, finished))
    if not layers:
        raise ValueError(f"summary: {type(model).__name__} has no parameters to sum up.")
    blocks = {m for name, _, m in layers if _is_block(m, finished.get(name))}
    counted = [m for *_, m in layers if m not in blocks] + [m for block in blocks for m in _layers_within(block)]
    passes = _count_passes(model, counted, example_inputs)
    seen: set[int] = set()
    rows = (_row(name, path, module, finished, passes, seen) for name, path, module in layers)
    return Summary(tuple(rows))


def _layers(model: nn.Module, finished: dict[str, FinishedLayer]) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module that is one row: with parameters of its own, or standing for a layer or block as a whole.

    The name of the row comes first, then that of the module, which differ where its input is quantized.
    """
    whole: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in whole):
            continue
        if isinstance(module, QuantizedInput):
            whole.append(name)
            yield name, join(name, "layer"), module.layer
        elif _is_whole(module, finished.get(name)):
            whole.append(name)
            yield name, name, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield name, name, module


def _is_whole(module: nn.Module, finished: FinishedLayer | None) -> bool:
    """Whether one row stands for a module with all that is in it."""
    return isinstance(module, Factored) or parametrize.is_parametrized(module) or _is_block(module, finished)


def _is_block(module: nn.Module, finished: FinishedLayer | None) -> bool:
    """Whether a module has taken the place of a block, or will."""
    return isinstance(module, BlendedBlock) or (finished is not None and finished.structure == "replaced")


def _layers_within(block: nn.Module) -> Iterator[nn.Module]:
    """Every layer in a block that multiplies with a weight, and what else has parameters of its own."""
    whole: set[nn.Module] = set()
    for module in block.modules():
        if module not in whole and (
            isinstance(module, Factored)
            or parametrize.is_parametrized(module)
            or any(True for _ in module.parameters(recurse=False))
        ):
            whole |= set(module.modules())
            yield module


def _row(
    name: str,
    path: str,
    module: nn.Module,
    finished: Mapping[str, FinishedLayer],
    passes: Mapping[nn.Module, Passes],
    seen: set[int],
) -> SummaryRow:
    whole = _is_whole(module, finished.get(name))
    within = {
        layer: done for layer, done in finished.items() if layer in (name, path) or (whole and is_below(layer, path))
    }
    grids = {join(layer, parameter): grid for layer, done in within.items() for parameter, grid in done.grids.items()}
    after = [(t, g) for t, g, identity in _final_tensors(module, whole, path, grids) if _is_new(identity, seen)]
    size = Size(
        parameters=sum(t.numel() for t, _ in after),
        nonzeros=sum(int(t.count_nonzero()) for t, _ in after),
        bytes=sum(p.nbytes for t, g in after for p in encode(t, g).parts.values()),
        multiply_accumulates=_products_of(
            module.replacement if isinstance(module, BlendedBlock) else module, finished.get(name), passes
        ),
    )
    # What was done to the layer itself, then to those that it is made of now.
    techniques = dict.fromkeys(repr(within[layer].compressor) for layer in sorted(within, key=len))
    before = _size_before(module, finished.get(name), size, passes)
    return SummaryRow(name, _type_name(module), ", then ".join(techniques), before, size)


def _is_new(identity: int, seen: set[int]) -> bool:
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _final_tensors(
    module: nn.Module, whole: bool, layer: str, grids: Mapping[str, Grid]
) -> Iterator[tuple[Tensor, Grid | None, int]]:
    """The parameters that a row will have in the end, each with its grid and the identity of what it comes from."""
    if isinstance(module, BlendedBlock):
        yield from ((p.detach(), None, id(p)) for p in module.replacement.parameters())
        return
    blends = dict(blended_weights(module))
    factors = next((b[0].form.factored for b in blends.values() if b[0].form.factored is not None), None)
    for factor in () if factors is None else factors.thin_layers().values():
        yield from _final_tensors(factor, True, layer, {})
    for name, stages in blends.items() if factors is None else ():
        original = module.parametrizations[name].original  # type: ignore[index,union-attr]
        grid = grid_in_turn(stages, original.detach())
        yield compressed_in_turn(stages, original).detach() + 0.0, grid, id(original)
    for name, parameter in module.named_parameters(recurse=whole):
        if not name.startswith("parametrizations."):
            yield parameter.detach(), grids.get(join(layer, name)), id(parameter)


def _products_of(module: nn.Module, finished: FinishedLayer | None, passes: Mapping[nn.Module, Passes]) -> int | None:
    """Multiply-accumulates of a layer, or of all layers in a block."""
    if module in passes and not _is_block(module, finished):
        return _products(module, passes[module])
    products = [_products(layer, passes[layer]) for layer in _layers_within(module)]
    return None if None in products else sum(n for n in products if n is not None)


def _size_before(
    module: nn.Module, finished: FinishedLayer | None, after: Size, passes: Mapping[nn.Module, Passes]
) -> Size:
    if finished is not None:
        # What a block's original multiplied is gone with it.
        products = None if finished.structure == "replaced" else _dense_products(module, passes[module])
        if products is not None and finished.narrowed_from is not None:
            products = products * math.prod(finished.narrowed_from) // _weights(module)
        return Size(finished.parameters_before, None, finished.bytes_before, products)
    if isinstance(module, BlendedBlock) or parametrize.is_parametrized(module):
        original = list(_original_parameters(module))
        count = sum(p.numel() for p in original)
        nonzeros = sum(int(p.count_nonzero()) for p in original)
        if isinstance(module, BlendedBlock):
            products = _products_of(module.original, None, passes)
        else:
            products = _dense_products(module, passes[module])
        return Size(count, nonzeros, sum(p.nbytes for p in original), products)
    return after


def _weights(module: Any) -> int:
    """The number of weights of a layer as a matrix, factored or not."""
    return math.prod(module.original_shape) if isinstance(module, Factored) else int(module.weight.numel())


def _original_parameters(module: nn.Module) -> Iterator[Tensor]:
    if isinstance(module, BlendedBlock):
        yield from (p.detach() for p in module.original.parameters())
        return
    yield from (p.detach() for p in module.parameters(recurse=False))
    yield from (module.parametrizations[name].original.detach() for name, _ in blended_weights(module))  # type: ignore[index,union-attr]


def _factors(module: nn.Module) -> Factored | None:
    """The plain layers that take a layer's place, or have taken it; None where it stays."""
    if isinstance(module, Factored):
        return module
    return next((f for _, (blend, *_) in blended_weights(module) if (f := blend.form.factored) is not None), None)


def _products(module: nn.Module, passes: Passes) -> int | None:
    """Multiply-accumulates of the form that is left."""
    factors = _factors(module)
    if factors is None:
        return _dense_products(module, passes)
    if passes.weight is None or passes.output is None:
        return None
    first, *others = (_weights(thin) for thin in factors.thin_layers().values())
    return passes.weight * first + passes.output * sum(others)


def _dense_products(module: nn.Module, passes: Passes) -> int | None:
    """Multiply-accumulates of the layer before it was compressed."""
    factors = _factors(module)
    if factors is not None and factors.split is not Split.CHANNELS:
        # Its first layer runs at other positions than the whole kernel did.
        return None if passes.output is None else passes.output * _weights(factors)
    if passes.weight is None:
        return None
    if isinstance(module, Factored):
        return passes.weight * _weights(module)
    kind = find_kind(module)
    return 0 if kind is None else passes.weight * sum(getattr(module, n).numel() for n in kind.weight_names(module))


def _count_passes(model: nn.Module, modules: list[nn.Module], example_inputs: Any) -> dict[nn.Module, Passes]:
    """How often each layer multiplies: for the example inputs or, without any, for one position."""
    if example_inputs is None:
        return {module: _one_pass(module) for module in modules}
    counted = {module: Passes(0, 0) for module in modules}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counted[module] += _passes(module, inputs, output)

    handles = [module.register_forward_hook(count) for module in counted]
    betas = {m: (m.beta, m.fading) for m in model.modules() if isinstance(m, BlendedBlock)}
    try:
        for block in betas:
            # So that both forms run.
            block.set_beta(0.5, fading=True)
        call(model, example_inputs)
    finally:
        for block, (beta, fading) in betas.items():
            block.set_beta(beta, fading=fading)
        for handle in handles:
            handle.remove()
    return counted


def _one_pass(module: nn.Module) -> Passes:
    first = module[0] if isinstance(module, Factored) else module
    return Passes(0 if isinstance(first, nn.Embedding) else 1, 1)


def _passes(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Passes:
    factors = _factors(module)
    first = module[0] if isinstance(module, Factored) else module
    if factors is not None and factors.split is not Split.CHANNELS:
        return _split_passes(factors, inputs, output)
    kind = find_kind(first)
    if kind is None:
        return Passes(0, 0)
    if not inputs or not isinstance(inputs[0], Tensor):
        return Passes(None, None)
    if not isinstance(module, Factored):
        positions = kind.positions(module, inputs[0], output)
        outputs = output.numel() // _rows(kind, module) if isinstance(output, Tensor) else None
        return Passes(positions, outputs)
    outputs = output.numel() // module.rows
    # What goes from the first layer to the second has its channels at as many positions as the output, or the input.
    between = torch.empty(outputs * _rows(kind, first), device="meta")
    return Passes(kind.positions(first, inputs[0], between), outputs)


def _split_passes(factors: Factored, inputs: tuple[Any, ...], output: Tensor) -> Passes:
    """The positions of the first layer of a convolution that is split, and of those after it."""
    if not inputs or not isinstance(inputs[0], Tensor):
        return Passes(None, None)
    outputs = output.numel() // int(factors.out_channels)  # type: ignore[arg-type]
    if factors.split is Split.SPATIAL:
        # Columns of the kernel: as many rows as the output has, and all columns of the input.
        return Passes(outputs // output.shape[-1] * inputs[0].shape[-1], outputs)
    return Passes(inputs[0].numel() // int(factors.in_channels), outputs)  # type: ignore[arg-type]


def _rows(kind: LayerKind, module: nn.Module) -> int:
    name = kind.weight_names(module)[0]
    return kind.layout(module, tuple(getattr(module, name).shape)).rows


def _type_name(module: nn.Module) -> str:
    shown = module.original if isinstance(module, BlendedBlock) else module
    name = type(shown).__name__
    return name.removeprefix("Parametrized") if parametrize.is_parametrized(shown) else name


def _change(before: int | None, after: int | None) -> str:
    if before == after:
        return "-" if after is None else f"{after:,}"
    return f"{'-' if before is None else f'{before:,}'} → {'-' if after is None else f'{after:,}'}"
