"""Units of a network that can be taken out: which layers make them, which layer takes them up, and how they are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vanishing.equality import difference_beyond_rounding
from vanishing.narrowing import Exchanged, cut_inputs, cut_outputs, features_shape
from vanishing.places import join
from vanishing.random_state import random_state_kept

_TOLERANCE = 1e-5


class Unit(Enum):
    """What is taken out as a whole."""

    HEAD = "attention heads"
    """Heads of an attention; with grouped queries, a head of keys and values with all queries that read it."""
    WIDTH = "hidden units of a feed-forward"
    CHANNEL = "inner channels of a block"
    """Channels between the convolutions of a block."""


@dataclass(frozen=True)
class Part:
    """One layer of a group.

    Args:
        name: its full name.
        layer: a linear layer, a convolution or a batch normalization.
        size: features of a unit, next to each other; one of a convolution is a channel.
        repeats: how often the units follow each other, as in a layer that makes queries, keys and values at once.
    """

    name: str
    layer: nn.Module
    size: int
    repeats: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its weight."""
        return features_shape(self.layer)

    def features(self, units: Tensor) -> Tensor:
        """Return the positions of the features of some units, in their order.

        Args:
            units: (count,), numbers of units, in rising order.
        """
        one = (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()
        length = self.shape[0] // self.repeats
        return torch.cat([one + length * repeat for repeat in range(self.repeats)])


@dataclass(frozen=True)
class Group:
    """Layers whose features are the same units.

    Args:
        unit: what the units are.
        count: how many there are.
        makers: layers whose outputs are the units.
        takers: layers whose inputs they are; a rule matches the first.
        owner: the module that they are in; of an attention, the one that knows how many heads it has.
        owner_name: its full name.
        counters: attributes of it that are multiples of the number of units.
        scores: (count,), how important each unit is, where something else than its weights says so.
    """

    unit: Unit
    count: int
    makers: tuple[Part, ...]
    takers: tuple[Part, ...]
    owner: nn.Module
    owner_name: str
    counters: tuple[str, ...]
    scores: Tensor | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All layers."""
        return (*self.makers, *self.takers)

    @property
    def taker(self) -> Part:
        """The layer that takes the units up, where one more only looks at them."""
        return self.takers[0]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the importance of every unit by the size of its weights, (count,).

        The norm of the weights that take the unit up times the norm of those that make what it passes on: of the
        values of a head, of the last linear layer before a hidden unit, of the scale of the last normalization before
        a channel. It is the same whichever side a scale is on.
        """
        weight = _weight(self.taker)
        taking = weight.reshape(len(weight), self.count, -1).norm(dim=(0, 2))
        maker = next(part for part in reversed(self.makers) if part.layer._parameters.get("weight") is not None)
        rows = _weight(maker).reshape(maker.repeats, self.count, -1)
        return taking * rows[-1].norm(dim=1)


def _weight(part: Part) -> Tensor:
    return part.layer.get_parameter("weight").float()


_HEAD_SIZES = ("head_dim", "attention_head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_OTHER_COUNTS = ("num_key_value_heads", "all_head_size", "attn_dim")

# Names below a module: of queries, keys and values, then of what takes the heads up.
_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("attention.query", "attention.key", "attention.value"), "output.dense"),
    (("qkv",), "proj"),
)
_FEED_FORWARDS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("intermediate.dense",), "output.dense"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("w1", "w3"), "w2"),
)


def find_groups(model: nn.Module, unit: Unit) -> Iterator[Group]:
    """Yield the groups of a model that are known by the names of their layers, as transformers and timm write them."""
    for name, module in model.named_modules():
        for makers, taker in _ATTENTIONS if unit is Unit.HEAD else _FEED_FORWARDS:
            layers = {path: _linear(module, path) for path in (*makers, taker)}
            if all(layers.values()):
                group = _group(unit, name, module, layers, makers, taker)  # type: ignore[arg-type]
                if group is not None:
                    yield group
                    break


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    for part in path.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module if isinstance(module, nn.Linear) else None


def _group(
    unit: Unit, name: str, module: nn.Module, layers: dict[str, nn.Linear], makers: Sequence[str], taker: str
) -> Group | None:
    outer = name
    counters: tuple[str, ...] = ()
    if unit is Unit.WIDTH:
        count, sizes = layers[taker].in_features, dict.fromkeys(layers, 1)
        repeats, owner_name = 1, name
        if any(layers[path].out_features != count for path in makers):
            return None
    else:
        # The queries' layer stands in the module that knows the size of a head.
        inner = makers[0].rpartition(".")[0]
        attention = module.get_submodule(inner)
        repeats = 3 if len(makers) == 1 else 1
        width = layers[taker].in_features
        queries = next((n for each in _HEAD_COUNTS if isinstance(n := getattr(attention, each, None), int)), None)
        size = next((n for each in _HEAD_SIZES if isinstance(n := getattr(attention, each, None), int)), None)
        if size is None and queries:
            size = width // queries
        if not size or width % size:
            return None
        count = layers[makers[-1]].out_features // repeats // size
        if not count or width % (count * size) or layers[makers[0]].out_features // repeats != width:
            return None
        group_size = width // count
        sizes = dict.fromkeys(makers, size) | {makers[0]: group_size, taker: group_size}
        known = (*_HEAD_COUNTS, *_OTHER_COUNTS)
        multiples = {n: getattr(attention, n, None) for n in known}
        sized = (count, width // size, width)
        counters = tuple(n for n, v in multiples.items() if isinstance(v, int) and v in sized)
        module, owner_name = attention, join(name, inner)

    def part(path: str, times: int = 1) -> Part:
        return Part(join(outer, path), layers[path], sizes[path], times)

    return Group(unit, count, tuple(part(p, repeats) for p in makers), (part(taker),), module, owner_name, counters)


def group_problem(group: Group) -> str | None:
    """Return why units cannot be taken out of a group, None where they can.

    Where the module around the layers can be called with what such modules take, two copies of it are compared: every
    other unit ignored, and every other unit cut out.
    """
    reason = f"{type(group.owner).__name__} does not follow when units are cut out of its layers"
    return _other_parameters(group) or _probe(group, reason)


def _other_parameters(group: Group) -> str | None:
    """Why parameters of an attention beside those that are cut count heads; None if there are none."""
    if group.unit is not Unit.HEAD:
        return None
    cut_too = {id(p) for part in group.parts for p in part.layer.parameters()}
    width = group.taker.shape[1]
    heads = width // group.makers[-1].size
    counted = {group.count, heads, width, group.count * group.makers[-1].size} - {1}
    for name, parameter in group.owner.named_parameters():
        if id(parameter) not in cut_too and counted & set(parameter.shape):
            return f"its {name!r} has a part for every head, which would not be cut"
    return None


def _probe(group: Group, reason: str) -> str | None:
    weight = group.makers[0].layer.get_parameter("weight")
    keep = torch.arange(0, group.count, 2, device=weight.device)
    probe = torch.randn(2, 3, weight.shape[1]).to(weight)
    rotation = torch.ones(2, 3, group.makers[-1].size).to(probe)
    rotary = {"position_embeddings": (rotation, 0 * rotation), "attention_mask": None}
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]]
    calls = [((probe,), {}), ((probe,), rotary), ((probe,) * 2, {}), ((probe,) * 3, {})]
    inside = any(module is group.taker.layer for module in group.owner.modules())
    with random_state_kept(probe.device), torch.no_grad():
        whole = masked(group, keep) if inside else copy.deepcopy(group)
        smaller = copy.deepcopy(group)
        cut(smaller, keep)
        recount(smaller, len(keep))
        for each in (whole, smaller):
            each.owner.eval()
        for arguments, keywords in calls:
            try:
                expected = first_tensor(whole.owner(*arguments, **keywords))
            except Exception:
                # It takes something else.
                continue
            if not inside:
                # What it returns goes on to the layer that takes the heads up.
                expected = expected[..., group.taker.features(keep)]
            try:
                got = first_tensor(smaller.owner(*arguments, **keywords))
            except Exception as error:
                return f"{reason} ({' '.join(str(error).split()):.100})"
            same = expected.shape == got.shape
            return None if same and difference_beyond_rounding([expected], [got], _TOLERANCE) is None else reason
    # It cannot be tried. One that knows its own width may shape what it computes by it.
    width = group.taker.shape[1]
    told = [
        name
        for name, value in vars(group.owner).items()
        if type(value) is int and value == width and name not in group.counters
    ]
    return f"its {told[0]!r} would not follow" if told and group.unit is Unit.HEAD else None


def first_tensor(outputs: Any) -> Tensor:
    """Return the first tensor of a nested output."""
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def masked(group: Group, keep: Tensor) -> Group:
    """Return a copy of a group, with its owner, in which the units that are not kept count nothing."""
    result = copy.deepcopy(group)
    mask(result, keep)
    return result


@torch.no_grad()
def mask(group: Group, keep: Tensor) -> None:
    """Let the units of a group that are not kept count nothing."""
    for part in group.takers:
        weight = part.layer.get_parameter("weight")
        kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        kept[part.features(keep)] = True
        weight.mul_(kept.reshape(-1, *[1] * (weight.dim() - 2)))


def recount(group: Group, kept: int) -> dict[str, int]:
    """Tell the module around the layers how many units there are; return its attributes."""
    counts = {name: getattr(group.owner, name) * kept // group.count for name in group.counters}
    for name, count in counts.items():
        setattr(group.owner, name, count)
    return counts


def recounted(module: nn.Module, counts: Mapping[str, int]) -> nn.Module:
    """Return a copy of a module that is told of fewer units; parameters and children are shared.

    Raises:
        ValueError: an attribute is none that counts units, or would grow.
    """
    result = copy.copy(module)
    for name, count in counts.items():
        before = getattr(module, name, None)
        if name not in (*_HEAD_COUNTS, *_OTHER_COUNTS) or not isinstance(before, int) or not 0 < count <= before:
            raise ValueError(f"its {name} cannot be {count}.")
        setattr(result, name, count)
    return result


def cut(group: Group, keep: Tensor) -> Exchanged:
    """Take the units that are not kept out of the layers; return every parameter that was cut, and what is left of it.

    Args:
        group: the layers, none of which is parametrized.
        keep: (count,), numbers of the units that stay, in rising order.
    """
    makers = [cut_outputs(part.layer, part.features(keep)) for part in group.makers]
    takers = [cut_inputs(part.layer, part.features(keep)) for part in group.takers]
    return [pair for exchanged in (*makers, *takers) for pair in exchanged]
