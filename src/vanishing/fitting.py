"""Bringing a saved structure and saved weights into a fresh model: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from vanishing.compressors import BlockCompressor
from vanishing.encodings import dtype_name
from vanishing.errors import ConfigError, FileError
from vanishing.layers import QuantizedInput, Split, factor, find_kind
from vanishing.layers.quantized_input import InputQuantizer, TensorQuantizer, TokenQuantizer, quantized_dimensions
from vanishing.manifest import DType, InputEntry, LayerEntry, Manifest, TensorEntry
from vanishing.narrowing import narrowed
from vanishing.places import Places, is_below, join
from vanishing.structure import recounted

_BUILD = "Build the original architecture, with the settings that it had when it was compressed."
_TYPES = get_args(DType)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model by name, the objects themselves.

    Raises:
        FileError: something in the model's state is no plain tensor of a type that the file can hold.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise FileError(
                f"{name!r} is a {type(value).__name__}: only plain tensors can be saved and loaded. Run a lazy model "
                "once, gather a sharded one."
            )
        if dtype_name(value.dtype) not in _TYPES:
            raise FileError(
                f"{name!r} is of the type {dtype_name(value.dtype)}, which has no place in the file. Cast it."
            )
    return state


def identity(tensor: Tensor) -> Hashable:
    """Return what is equal for two names of one tensor, and only for those."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def rebuilt_names(manifest: Manifest, model: nn.Module) -> tuple[str, ...]:
    """Return every name in the model of the modules that the manifest has factored, replaced or narrowed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    rebuilt = {id(modules[n]) for n, entry in manifest.modules.items() if entry.is_rebuilt and n in modules}
    return tuple(name for name, module in modules.items() if id(module) in rebuilt)


@contextlib.contextmanager
def rebuild(folder: Path, manifest: Manifest, model: nn.Module) -> Iterator[nn.Module]:
    """Put the factored and narrowed layers and replaced blocks of a manifest in their places, out again after an error.

    Yields:
        The model, or what replaced it if the model itself is a block that was replaced.

    Raises:
        FileError: the model lacks a module, or it cannot be rebuilt.
    """
    undo: list[tuple[nn.Module, nn.Module]] = []
    places = Places(model)
    try:
        # A block comes before what is in it.
        for name in sorted(manifest.modules, key=lambda name: name.count(".") if name else -1):
            entry = manifest.modules[name]
            if not entry.is_rebuilt:
                continue
            try:
                old = model.get_submodule(name)
            except AttributeError:
                raise FileError(f"{folder} has a module {name!r} and the model has none. {_BUILD}") from None
            try:
                new = _rebuilt(manifest, name, entry, old)
            except (ConfigError, TypeError, ValueError) as error:
                raise FileError(
                    f"{folder}: the {entry.structure} module {name!r} cannot be rebuilt: {error}"
                ) from error
            places.put(old, new)
            undo.append((old, new))
            model = new if old is model else model
        yield model
    except BaseException:
        for old, new in reversed(undo):
            model = old if new is model else model
            places.put(new, old)
        raise


def _rebuilt(manifest: Manifest, name: str, entry: LayerEntry, module: nn.Module) -> nn.Module:
    if entry.counts:
        module = recounted(module, entry.counts)
    if entry.narrowed_from is not None:
        module = narrowed(module, _shapes(manifest, name, entry, module))
    if entry.structure == "weight":
        return module
    if entry.input is not None:
        return _with_quantized_input(module, entry.input)
    if entry.rank is None:
        return BlockCompressor.from_dict(entry.compressor).build(module)
    split = Split(entry.split)
    ranks = [rank for rank in (entry.rank, entry.inner_rank) if rank is not None]
    first = _stored_weight(manifest, join(name, "0.0" if split is Split.TUCKER else "0"))
    largest = max((size for p in module.parameters(recurse=False) for size in p.shape), default=0)
    held = max(first.shape, default=0) if first is not None else 0
    if split is Split.CHANNELS:
        largest = min(held, largest)
    elif split is Split.SPATIAL:
        largest = held
    if max(ranks) > max(largest, 0):
        raise ValueError(f"the file holds no factors of rank {entry.rank}. Save the model again.")
    return factor(module, *ranks, split=split).train(module.training)


def _with_quantized_input(module: nn.Module, entry: InputEntry) -> QuantizedInput:
    kind = find_kind(module)
    if kind is None or not kind.takes_activations:
        raise TypeError(f"a {type(module).__name__} takes no input that could be quantized.")
    quantizer: InputQuantizer
    if entry.range == "token":
        quantizer = TokenQuantizer(entry.bits, entry.symmetric, quantized_dimensions(module))
    else:
        scale: Tensor = module.weight.new_ones(1, dtype=torch.float32)  # type: ignore[operator]
        quantizer = TensorQuantizer(entry.bits, scale, None if entry.symmetric else torch.zeros_like(scale))
    return QuantizedInput(quantizer, module)


def _stored_weight(manifest: Manifest, layer: str) -> TensorEntry | None:
    """What the file holds as the weight of a layer, whose input may be quantized."""
    return manifest.entry(join(layer, "weight")) or manifest.entry(join(layer, "layer.weight"))


def _shapes(manifest: Manifest, name: str, entry: LayerEntry, module: nn.Module) -> dict[str, list[int]]:
    """The shapes of what is smaller in a narrowed layer, before it is factored."""
    tensors = {n: t for n, t in (module._parameters | module._buffers).items() if t is not None}
    if entry.structure != "factored":
        layer = join(name, "layer") if entry.structure == "quantized_input" else name
        known = {n: found.shape for n in tensors if (found := manifest.entry(join(layer, n))) is not None}
    else:
        tucker = entry.split == Split.TUCKER.value
        first, last = (_stored_weight(manifest, join(name, place)) for place in ("0.0" if tucker else "0", "1"))
        if first is None or last is None or min(len(first.shape), len(last.shape)) < 2:
            raise ValueError("the file holds no factors of it. Save the model again.")
        rows = last.shape[0]
        known = {"weight": [rows, first.shape[1], *tensors["weight"].shape[2:]], "bias": [rows]}
    return {n: shape for n, shape in known.items() if n in tensors and list(tensors[n].shape) != shape}


def check_fit(folder: Path, manifest: Manifest, model: nn.Module, *, unseen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the model's state, all of which has a value of its shape and kind in the file.

    Args:
        folder: the folder.
        manifest: its manifest.
        model: the model; may be on the meta device.
        unseen: names of modules that do not have their structure yet and are not looked at.

    Raises:
        FileError: names, shapes or types differ.
    """
    state = plain_state(model)

    def seen(names: set[str]) -> list[str]:
        return sorted(name for name in names if not any(is_below(name, module) for module in unseen))

    problems = [f"{name!r} is not in the file" for name in seen(state.keys() - manifest.names)]
    problems += [f"{name!r} is not in the model" for name in seen(manifest.names - state.keys())]
    for name in seen(state.keys() & manifest.names):
        entry, tensor = manifest.entry(name), state[name]
        assert entry is not None
        both_floating = tensor.is_floating_point() and getattr(torch, entry.dtype).is_floating_point
        if list(tensor.shape) != entry.shape:
            problems.append(f"{name!r} has shape {entry.shape} in the file and {list(tensor.shape)} in the model")
        elif dtype_name(tensor.dtype) != entry.dtype and not both_floating:
            problems.append(f"{name!r} is {entry.dtype} in the file and {dtype_name(tensor.dtype)} in the model")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FileError(f"{folder} does not fit the model: {'; '.join(problems[:3])}{more}. {_BUILD}")
    return state


class Fit:
    """Saved values on their way into a model of their structure.

    Args:
        folder: the folder.
        manifest: its manifest.
        model: the model, with the saved structure.
        values: the decoded tensors.

    Raises:
        FileError: the values do not fit the model; it was not changed.
    """

    def __init__(self, folder: Path, manifest: Manifest, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        state = check_fit(folder, manifest, model)
        sources: dict[Hashable, str] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._exchanges: list[tuple[Tensor, Tensor]] = []
        for name, target in state.items():
            source = manifest.ties.get(name, name)
            first = sources.setdefault(identity(target), source)
            if first != source and not torch.equal(values[first], values[source]):
                raise FileError(
                    f"{folder}: {name!r} and {first!r} are one tensor in the model, two in the file. {_BUILD}"
                )
            if target.is_meta:
                raise FileError(
                    f"{folder}: {name!r} of the model is on the meta device. Build the model on a real one."
                )
            expanded = any(step == 0 and size > 1 for step, size in zip(target.stride(), target.shape, strict=True))
            if expanded or target.dtype != values[source].dtype:
                # Memory is taken here, so that `assign` has no reason to fail half way.
                self._exchanges.append((target, values[source].to(target.device, copy=True)))
            else:
                self._copies.append((target, values[source]))
        for name, buffer in model.named_buffers(remove_duplicate=False):
            dtype = getattr(torch, manifest.buffers.get(name, dtype_name(buffer.dtype)))
            if name not in state and buffer.dtype != dtype and buffer.is_floating_point() and dtype.is_floating_point:
                self._exchanges.append((buffer, buffer.detach().to(dtype)))

    def assign(self) -> None:
        """Give the model its weights, in their saved types, and its other buffers the types that they had."""
        for target, value in self._copies:
            target.data.copy_(value)
        for target, value in self._exchanges:
            target.data = value
