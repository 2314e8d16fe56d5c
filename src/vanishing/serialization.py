"""A finished model as one folder: `model.safetensors` and `vanishing.json`, checked as a whole before it is used."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vanishing import hugging_face
from vanishing.blended_block import BlendedBlock
from vanishing.blended_weight import BlendedWeight
from vanishing.compressors import Compressor
from vanishing.encodings import dtype_name, encode
from vanishing.errors import ConfigError, FileError, TransitionError
from vanishing.fitting import Fit, check_fit, identity, plain_state, rebuild, rebuilt_names
from vanishing.folder import replace_folder
from vanishing.layers import Factored, QuantizedInput
from vanishing.layers.quantized_input import TokenQuantizer
from vanishing.manifest import (
    MANIFEST,
    WEIGHTS,
    InputEntry,
    LayerEntry,
    Manifest,
    PackedTensor,
    TensorEntry,
    read_manifest,
    seal,
    write_manifest,
)
from vanishing.places import is_below, join
from vanishing.receipt import FinishedLayer, Grid, Receipt, attach_receipt, read_receipt
from vanishing.recipe import Recipe
from vanishing.stored import SEAL, StoredWeights, check_files, file_entry

logger = logging.getLogger(__name__)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""PyTorch's wrappers, for compilation and for several devices, and where the model is in them."""


def save(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Write a finished model into a folder, each weight in the smallest form that gives it back.

    The folder holds `model.safetensors`, `vanishing.json` and, for a model of transformers, its `config.json` and its
    tokenizer's files. It appears when it is complete; a model that was there before is replaced only then, and files
    that no `save` wrote stay. Weights come back bit for bit, but for the sign of a zero.

    Args:
        model: a finished model, or one that was never compressed.
        path: a folder that does not exist, is empty, or holds a saved model.
        tokenizer: a tokenizer or processor of transformers to go along. Without one, its files are copied from the
            local folder that the model was loaded from, if it was loaded from one.

    Raises:
        TransitionError: the model is still in transition.
        TypeError: the model is wrapped for compilation or several devices.
        FileError: the folder holds something else or cannot be written (it is as it was before), or the model holds
            something that is no plain tensor.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(nn.Linear(2, 2), f"{folder}/small")
    ...     loaded = load(f"{folder}/small", nn.Linear(2, 2))
    """
    inner = _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None
    if inner is not None:
        raise TypeError(f"save: the model is wrapped in {type(model).__name__}. Give the model inside: model.{inner}.")
    for name, module in model.named_modules():
        if isinstance(module, (BlendedWeight, BlendedBlock)):
            layer = name.removesuffix(".0").removesuffix(".weight").removesuffix(".parametrizations")
            raise TransitionError(f"{layer!r} is still in transition, call transition.finish() before save().")
    pretrained = hugging_face.is_pretrained(model)
    if tokenizer is not None and not pretrained:
        raise TypeError(
            f"tokenizer: {type(model).__name__} is not a model of transformers. Save the tokenizer yourself."
        )

    def write(folder: Path) -> None:
        if pretrained:
            hugging_face.write_companions(model, tokenizer, folder)
        manifest, parts = _describe(model)
        files = {file.name: file_entry(file) for file in sorted(folder.iterdir()) if file.is_file()}
        data = manifest.model_copy(update={"files": files}).to_dict()
        # With a second key the order in the header would change from run to run.
        save_file(parts, folder / WEIGHTS, metadata={SEAL: seal(data)})
        data["files"][WEIGHTS] = file_entry(folder / WEIGHTS).model_dump()
        write_manifest(folder, data)
        # safetensors makes its file readable for the owner alone, whatever the process's umask says.
        (folder / WEIGHTS).chmod((folder / MANIFEST).stat().st_mode)

    replace_folder(path, write)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save` wrote.

    All of the folder is checked before the model is touched. Nothing in it is ever run, unpickled or imported.

    Args:
        path: the folder.
        model: a freshly built original architecture. Its structure is changed in place and its weights are
            overwritten; they take the saved type and stay on their device, and the model in its mode. None builds
            the model of transformers that the folder's `config.json` describes, on the CPU and in eval mode.

    Raises:
        FileError: the folder is damaged, altered, too new, or does not fit the model, which is as it was before.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load takes the model as an nn.Module, got {type(model).__name__}.")
    folder = Path(path)
    manifest, data = read_manifest(folder)
    check_files(folder, manifest)
    with StoredWeights(folder, manifest, seal(data)) as weights:
        if model is None:
            source = hugging_face.PretrainedFolder(folder, manifest)
            skeleton = source.skeleton()
            check_fit(folder, manifest, skeleton, unseen=rebuilt_names(manifest, skeleton))
            model = source.model()
        elif read_receipt(model) is not None:
            raise FileError(
                f"{folder}: the model was compressed before. Build the original architecture anew for load()."
            )
        with rebuild(folder, manifest, model) as root:
            fit = Fit(folder, manifest, root, weights.values())
            receipt = _receipt(folder, manifest, weights.grids())
    fit.assign()
    if receipt is not None:
        attach_receipt(root, receipt)
    return root


def _describe(model: nn.Module) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest of a model without its files, and what is stored under which name."""
    receipt = read_receipt(model)
    layers = {} if receipt is None else receipt.layers
    grids = {join(layer, name): grid for layer, done in layers.items() for name, grid in done.grids.items()}
    state = plain_state(model)
    names: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        names[identity(tensor)].append(name)
    parts: dict[str, Tensor] = {}
    entries: dict[str, TensorEntry] = {}
    for first, *others in names.values():
        if state[first].is_meta:
            raise FileError(f"{first!r} is on the meta device and has no values that could be saved.")
        grid = next((grids[name] for name in (first, *others) if name in grids), None)
        encoded = encode(state[first], grid)
        if encoded.off_grid:
            logger.warning("%s: its weights changed since finish, so they are stored in full and not as codes.", first)
        entries[first] = encoded.entry
        parts |= {join(first, suffix) if suffix else first: part for suffix, part in encoded.parts.items()}
    ties = {other: first for first, *others in names.values() for other in others}
    loose = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in state}
    manifest = Manifest(
        library_version=importlib.metadata.version("vanishing"),
        recipe=None if receipt is None or receipt.recipe is None else receipt.recipe.to_dict(),
        modules=_describe_layers(
            model, layers, {n for n in state if isinstance(entries[ties.get(n, n)], PackedTensor)}
        ),
        tensors=entries,
        ties=ties,
        buffers={name: dtype_name(b.dtype) for name, b in loose.items() if b.is_floating_point()},
    )
    return manifest, _in_memory_of_their_own(parts)


def _describe_layers(model: nn.Module, layers: dict[str, FinishedLayer], packed: set[str]) -> dict[str, LayerEntry]:
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: dict[str, LayerEntry] = {}
    for name, done in layers.items():
        module = modules.get(name)
        kinds = {"factored": Factored, "quantized_input": QuantizedInput}
        if module is None or any((done.structure == s) != isinstance(module, kind) for s, kind in kinds.items()):
            logger.warning("%s: is not the layer that finish left there, so nothing is recorded about it.", name)
            continue
        entries[name] = LayerEntry(
            structure=done.structure,  # type: ignore[arg-type]
            **_structure_of(module),
            compressor=done.compressor.to_dict(),
            parameters_before=done.parameters_before,
            bytes_before=done.bytes_before,
            grids=[parameter for parameter in done.grids if join(name, parameter) in packed],
            narrowed_from=None if done.narrowed_from is None else list(done.narrowed_from),
            counts=done.counts,
        )
    known = {id(modules[name]) for name in entries}
    replaced = [name for name, entry in entries.items() if entry.structure == "replaced"]
    for name, module in model.named_modules():
        # A Tucker split is one factored layer in another.
        around = [*replaced, *(own for own, entry in entries.items() if entry.structure == "factored")]
        inside = _is_below_any(name, around)
        if isinstance(module, Factored) and id(module) not in known and not inside:
            entries[name] = LayerEntry(structure="factored", **_structure_of(module))
        elif isinstance(module, QuantizedInput) and id(module) not in known and not _is_below_any(name, replaced):
            entries[name] = LayerEntry(structure="quantized_input", **_structure_of(module))
    return entries


def _is_below_any(name: str, modules: list[str]) -> bool:
    return any(is_below(name, module) for module in modules)


def _structure_of(module: nn.Module) -> dict[str, Any]:
    """What an entry says of a layer that `finish` or `load` has built."""
    if isinstance(module, QuantizedInput):
        quantizer = module.quantizer
        by_token = isinstance(quantizer, TokenQuantizer)
        entry = InputEntry(bits=quantizer.bits, symmetric=quantizer.symmetric, range="token" if by_token else "tensor")
        return {"input": entry}
    if not isinstance(module, Factored):
        return {}
    rank, *inner = module.ranks
    return {"rank": rank, "inner_rank": inner[0] if inner else None, "split": module.split.value}


def _in_memory_of_their_own(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those parts that share memory, which the file format does not allow."""
    seen: set[int] = set()
    result = {}
    for name, part in parts.items():
        storage = part.untyped_storage()
        shared = storage.nbytes() != part.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        result[name] = part.clone() if shared else part
    return result


def _receipt(folder: Path, manifest: Manifest, grids: Mapping[str, dict[str, Grid]]) -> Receipt | None:
    """Return the receipt of a loaded model, without what this process does not know."""
    compressors = {
        name: _known(folder, f"the technique of {name!r}", Compressor.from_dict, entry.compressor)
        for name, entry in manifest.modules.items()
        if entry.compressor is not None
    }
    layers = {
        name: FinishedLayer(
            compressor=compressor,
            structure=entry.structure,
            parameters_before=entry.parameters_before or 0,
            bytes_before=entry.bytes_before or 0,
            grids=grids[name],
            narrowed_from=tuple(entry.narrowed_from) if entry.narrowed_from else None,
            counts=entry.counts,
        )
        for name, entry in manifest.modules.items()
        if (compressor := compressors.get(name)) is not None
    }
    recipe = None if manifest.recipe is None else _known(folder, "the recipe", Recipe.from_dict, manifest.recipe)
    return Receipt(recipe=recipe, layers=layers) if layers or recipe is not None else None


def _known(folder: Path, what: str, read: Callable[[Any], Any], data: Any) -> Any:
    try:
        return read(data)
    except (ConfigError, RecursionError) as error:
        # The weights are complete without it: who only runs the model need not have the code that compressed it.
        logger.warning("%s: %s is left out of the loaded model's receipt: %s", folder, what, error)
        return None
