"""Over which weights a scale or a selection is taken."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vanishing.config import Config
from vanishing.errors import ConfigError


@dataclass(frozen=True)
class Granularity(Config, ABC):
    """Base of the granularities; a weight is seen as a matrix of output channels by fan-in."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale, or one selection, for the whole weight of a layer."""


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale, or one selection, for each output channel (a row of the weight's matrix)."""


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each group of consecutive inputs of an output channel; the last group may be shorter."""

    size: Annotated[int, Field(ge=1, description="the number of weights in a group, at least 1")] = 64


@dataclass(frozen=True)
class Global(Granularity):
    """One selection over all layers that a rule matches, so that layers end with sparsities of their own."""


@dataclass(frozen=True)
class NM(Granularity):
    """Of every m consecutive inputs of an output channel, n weights stay (2:4 is what NVIDIA's sparse cores run)."""

    n: Annotated[int, Field(ge=1, description="the number of weights kept in a group, at least 1")] = 2
    m: Annotated[int, Field(ge=2, description="the number of weights in a group, at least 2")] = 4

    def check(self) -> None:
        if self.n >= self.m:
            raise ConfigError(f"NM(n={self.n}, m={self.m}): n is smaller than m. Lower n or raise m.")
