"""Depth pruning: a residual block vanishes, and what it got goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vanishing.caches import cache_places, caches_among, hold_place
from vanishing.compressors.base import BlockCompressor
from vanishing.errors import ConfigError
from vanishing.residual import OutputForm, output_form

_NO_FIT = (
    "without its weights it does not return its input alone, or it cannot be tried, so it is not known as a residual "
    "block that keeps shapes"
)


@dataclass(frozen=True)
class SkipBlock(BlockCompressor):
    """Take a residual block out: what goes into it comes out (ShortGPT, arXiv 2403.03853, removes layers so).

    A rule names whole blocks, such as the layers of a transformer or the blocks of a ResNet that change no shapes. Only
    a block that returns its input when its weights are zero is taken; everything else that a rule matches is left.

    In a language model the block's layer of a cache is kept, with one number for each token, so that lengths and
    positions stay right.

    >>> SkipBlock().to_dict()
    {'kind': 'skip_block'}
    """

    def refusal(self, block: nn.Module) -> str | None:
        if output_form(block) is None:
            return _NO_FIT
        lists = [module for module in block.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        if any(output_form(part) is not None for each in lists for part in each):
            return "it is a chain of residual blocks. Name those in it"
        return None

    def build(self, block: nn.Module) -> nn.Module:
        form = output_form(block)
        if form is None:
            raise ConfigError(f"SkipBlock cannot take out a {type(block).__name__}: {_NO_FIT}.")
        return Skipped(block, form)


class Skipped(nn.Module):
    """What is left of a residual block: it returns its hidden states as the block did.

    Args:
        block: the block; its settings, which the model around it may read, are kept.
        form: how it returns its hidden states.
    """

    def __init__(self, block: nn.Module, form: OutputForm) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str)):
                setattr(self, name, value)
        self._form = form
        self._cache_places = cache_places(block)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the first argument."""
        hidden: Tensor = arguments[0] if arguments else keywords[str(self._form.argument)]
        if self._cache_places:
            for cache in caches_among(arguments, keywords):
                for number in self._cache_places:
                    hold_place(cache, number, hidden)
        return self._form.wrap(hidden)

    def extra_repr(self) -> str:
        return f"cache_places={self._cache_places}" if self._cache_places else ""
