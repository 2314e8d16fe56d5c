"""Models of transformers: what goes along in the folder, and how the architecture is rebuilt from it."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vanishing.errors import FileError
from vanishing.folder import listed_names
from vanishing.manifest import MANIFEST, Manifest

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "normalizer.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "bpe.codes", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_MOST_CONFIG_BYTES = 16 * 2**20
_LOADS_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Settings that can name a kernel on a hub, whose code would then be fetched and run."""
_FETCHES = ("backbone", "use_pretrained_backbone", "use_timm_backbone", "checkpoint_path", "pretrained_cfg")
"""Settings that can name weights elsewhere, which would then be fetched and read."""
_FETCHING_TYPES = ("timm_wrapper", "timm_backbone")
"""Model types that hand any name on to another library, which fetches it."""
_NO_SIZES = ("theta",)
"""Endings of settings that are large and size nothing."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own kind; does not import transformers."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def write_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the configuration of a model of transformers, and its tokenizer's files, into a folder.

    Args:
        model: a `PreTrainedModel`.
        tokenizer: anything with `save_pretrained`; None to copy the files from the local folder that the model came
            from, where it came from one.
        folder: an existing folder.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.to_json_file(folder / CONFIG, use_diff=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / GENERATION, use_diff=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    origin = Path(model.name_or_path or model.config.name_or_path or "")
    known: tuple[str, ...] = TOKENIZER_FILES if origin.parts else ()
    if (origin / MANIFEST).exists():
        # What lies beside a saved model and is not a part of it was never checked.
        known = tuple(name for name in known if name in listed_names(origin / MANIFEST))
    for name in known:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


class PretrainedFolder:
    """The architecture that a saved folder's `config.json` names, from classes of the installed transformers alone.

    Args:
        folder: the folder, whose files have the digests that the manifest names.
        manifest: its manifest.

    Raises:
        FileError: there is no configuration, transformers is not installed, or the configuration is not one that this
            version of transformers can build without running or fetching anything that the file names.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        if CONFIG not in manifest.files:
            raise FileError(
                f"{folder} does not say how the model is built. Build the original architecture and give it: "
                "vanishing.load(path, model)."
            )
        try:
            import transformers
        except ImportError:
            raise FileError(
                f"{folder} holds a model of transformers. Install that library: pip install 'vanishing[transformers]'."
            ) from None
        self._transformers: Any = transformers
        self._settings = self._read_settings()
        self._type = self._find_type()

    def skeleton(self) -> nn.Module:
        """Return the model without memory for its weights.

        Raises:
            FileError: the configuration asks for far more than the weights in the file.
        """
        stored = sum(entry.count for entry in self._manifest.tensors.values())
        most_values, most_parts = 10**8 + 256 * stored, 2_000 + 64 * len(self._manifest.names)
        with _bounded(self._folder, most_values, most_parts), torch.device("meta"):
            model = self._build()
        if sum(buffer.numel() for buffer in model.buffers()) > most_values:
            raise _too_large(self._folder)
        return model

    def model(self) -> nn.Module:
        """Return the model on the CPU, with weights of no meaning, in eval mode."""
        model = self._build()
        if GENERATION in self._manifest.files:
            model.generation_config = self._transformers.GenerationConfig.from_dict(self._json(GENERATION))
        # A later save finds the tokenizer's files here.
        model.name_or_path = model.config.name_or_path = str(self._folder)
        evaluated: nn.Module = model.eval()
        return evaluated

    def _build(self) -> Any:
        with self._explained():
            return self._type(self._type.config_class.from_dict(copy.deepcopy(self._settings)))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from huggingface_hub.errors import StrictDataclassError

        # What a configuration can break inside of a model's constructor has no common type.
        breaks = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError)
        try:
            yield
        except FileError:
            raise
        except (*breaks, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
            raise FileError(
                f"{self._folder / CONFIG}: transformers {self._transformers.__version__} cannot build "
                f"{self._settings['architectures'][0]} from it ({type(error).__name__}: {error}). Install the version "
                "that it was saved with, or build the model yourself and call vanishing.load(path, model)."
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        if self._manifest.files[name].bytes > _MOST_CONFIG_BYTES:
            raise FileError(f"{path} has more than {_MOST_CONFIG_BYTES:,} bytes, which no configuration needs.")
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path} is not valid JSON ({error}). Save the model again.") from None
        if not isinstance(data, dict):
            raise FileError(f"{path} is not a JSON object. Save the model again.")
        return data

    def _read_settings(self) -> dict[str, Any]:
        data = self._json(CONFIG)
        largest = max((size for entry in self._manifest.tensors.values() for size in entry.shape), default=0)
        most = max(2**20, 64 * largest)
        for key, value in _walk(data):
            if key in _LOADS_CODE and value is not None:
                raise FileError(
                    f"{self._folder / CONFIG} sets {key!r}, which a file may not. Remove it and save again."
                )
            if (key in _FETCHES and value) or (key == "model_type" and value in _FETCHING_TYPES):
                raise FileError(
                    f"{self._folder / CONFIG} has {key} = {value!r}, by which a part of the model would be fetched "
                    "from elsewhere. Build the model yourself and call vanishing.load(path, model)."
                )
            if isinstance(value, int) and abs(value) > most and not key.endswith(_NO_SIZES):
                raise FileError(
                    f"{self._folder / CONFIG}: {key} = {value} is far beyond the weights in the file. If it is meant, "
                    "build the model yourself and call vanishing.load(path, model)."
                )
        return data

    def _find_type(self) -> Any:
        names = self._settings.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        found: Any = getattr(self._transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not isinstance(found, type) or not issubclass(found, self._transformers.PreTrainedModel):
            raise FileError(
                f"{self._folder / CONFIG} names the architecture {name!r}, which is not a model of transformers "
                f"{self._transformers.__version__}. Build it yourself and call vanishing.load(path, model)."
            )
        expected = getattr(getattr(found, "config_class", None), "model_type", None)
        if expected is None or self._settings.get("model_type") != expected:
            raise FileError(
                f"{self._folder / CONFIG} is of the model type {self._settings.get('model_type')!r}; {name} needs "
                f"{expected!r}. Build the model yourself and call vanishing.load(path, model)."
            )
        return found


@contextlib.contextmanager
def _bounded(folder: Path, most_values: int, most_parts: int) -> Iterator[None]:
    """Stop a model that is being built in this thread once it has too many parameters or modules."""
    thread, values, parts = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, part: Tensor | nn.Module | None) -> None:
        nonlocal values, parts
        if threading.get_ident() == thread:
            parts += 1
            values += part.numel() if isinstance(part, Tensor) else 0
            if parts > most_parts or values > most_values:
                raise _too_large(folder)

    handles = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _too_large(folder: Path) -> FileError:
    return FileError(
        f"{folder / CONFIG} describes a model that is far larger than the weights in the file. If that is meant, "
        "build it yourself and call vanishing.load(path, model)."
    )


def _walk(data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested JSON, objects and lists too, with the name that it stands under."""
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
