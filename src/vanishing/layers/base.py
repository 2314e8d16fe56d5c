"""What the library knows about a kind of layer: where its weights are and how each one is a matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How a weight of a given shape becomes a matrix of output channels by fan-in, and back.

    Law: `from_matrix(to_matrix(w))` equals `w`.

    Args:
        shape: shape of the weight as the layer holds it.
        view: shape that splits the groups and transposed dimensions off.
        order: permutation of `view` that brings the output channels to the front.
        rows: number of output channels.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    _is_rows: ClassVar[bool]

    def __post_init__(self) -> None:
        # Asked for in every forward pass: whether the matrix is the weight with its last dimensions flattened.
        in_order = self.order == tuple(range(len(self.order))) and self.view == self.shape
        is_rows = in_order and (len(self.shape) != 2 or self.rows == self.shape[0])
        object.__setattr__(self, "_is_rows", is_rows)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as (rows, columns), a view of it where the memory allows one."""
        if self._is_rows:
            return weight if len(self.shape) == 2 else weight.reshape(self.rows, -1)
        return weight.reshape(self.view).permute(self.order).reshape(self.rows, -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return a (rows, columns) matrix in the layer's own shape."""
        if self._is_rows:
            return matrix if len(self.shape) == 2 else matrix.reshape(self.shape)
        permuted = matrix.reshape([self.view[i] for i in self.order])
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return permuted.permute(inverse).reshape(self.shape).contiguous()


def row_layout(shape: tuple[int, ...], *, row_dimensions: int = 1) -> Layout:
    """Return the layout of a weight whose first dimensions are output channels and whose rest is fan-in."""
    rows = math.prod(shape[:row_dimensions])
    return Layout(shape=shape, view=shape, order=tuple(range(len(shape))), rows=rows)


class Split(StrEnum):
    """Between which of its dimensions a convolution's weight is split into factors."""

    CHANNELS = "channels"
    """The kernel to fewer channels, then 1 x 1."""
    SPATIAL = "spatial"
    """A column of the kernel to fewer channels, then a row (Jaderberg et al., arXiv 1405.3866)."""
    TUCKER = "tucker"
    """1 x 1 to fewer channels, the kernel between fewer channels, then 1 x 1 (Kim et al., arXiv 1511.06530)."""


class Factored(nn.Sequential):
    """Two plain layers in the place of one: the second one's weight times the first one's is the weight.

    It answers to `.weight` (the product, computed anew at each access), `.bias` and the sizes of the layer that it
    replaces, for code that looks at them.

    Args:
        first: layer that maps the input to `rank` channels a group, without bias; itself factored in a Tucker split.
        second: layer that maps those to the output.
        layout: how the original weight is the matrix that the two multiply to.
        groups: number of blocks on the diagonal of the original weight.
        first_has_rows: True where the first layer holds the output channels (an embedding's rows).
        second_order: permutation of the second layer's weight that brings `rank` to the end; None if that is where a
            matrix of its rows has it.
        split: what the two layers are.
        sizes: attributes of the original layer (`in_features` and the like) to answer to.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        *,
        layout: Layout,
        groups: int = 1,
        first_has_rows: bool = False,
        second_order: tuple[int, ...] | None = None,
        split: Split = Split.CHANNELS,
        sizes: Mapping[str, Any],
    ) -> None:
        super().__init__(first, second)
        self._layout = layout
        self._groups = groups
        self._first_has_rows = first_has_rows
        self._second_order = second_order
        self.split = split
        for name, value in sizes.items():
            setattr(self, name, value)

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the second layer's output for the first one's, which gets the arguments."""
        output: Tensor = self[1](self[0](*arguments, **keywords))
        return output

    @property
    def rank(self) -> int:
        """The number of channels a group between the two layers."""
        return self.left.shape[-1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, and that of the first layer if that is factored as well."""
        return (self.rank, *self[0].ranks) if isinstance(self[0], Factored) else (self.rank,)

    @property
    def rows(self) -> int:
        """The number of rows of the matrix: output channels, times the columns of the kernel in a spatial split."""
        return self._layout.rows

    @property
    def original_shape(self) -> tuple[int, ...]:
        """The shape of the weight that was factored."""
        return self._layout.shape

    def thin_layers(self) -> dict[str, nn.Module]:
        """Return the plain layers in the order in which they run, by their names below this one."""
        layers: dict[str, nn.Module] = {}
        for name, layer in self.named_children():
            inner = layer.thin_layers() if isinstance(layer, Factored) else {"": layer}
            layers |= {f"{name}.{path}".rstrip("."): each for path, each in inner.items()}
        return layers

    @property
    def left(self) -> Tensor:
        """The factor with the output channels, (groups, rows / groups, rank)."""
        weight = self._weight_of(0) if self._first_has_rows else self._weight_of(1)
        if self._second_order is not None:
            weight = weight.permute(self._second_order)
        return weight.reshape(self._groups, self._layout.rows // self._groups, -1)

    @property
    def right(self) -> Tensor:
        """The factor with the fan-in, (groups, rank, columns)."""
        if self._first_has_rows:
            return self._weight_of(1).t().unsqueeze(0)
        columns = math.prod(self._layout.shape) // self._layout.rows
        return self._first_layout.to_matrix(self._weight_of(0)).reshape(self._groups, -1, columns)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return `left` and `right` of the one group of a layer without groups, as matrices."""
        first, second = self._modules["0"], self._modules["1"]
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
            return second.weight, first.weight
        return self.left[0], self.right[0]

    def borrow_bias(self, bias: Tensor | None) -> None:
        """Use the bias of another layer, without holding it: it is not among the parameters, nor in the state."""
        second: Any = self._modules["1"]
        if bias is not None and second.__dict__.get("bias") is not bias:
            second._parameters.pop("bias", None)
            second.__dict__["bias"] = bias

    def keep_bias(self, bias: nn.Parameter | None) -> None:
        """Hold the bias as a parameter."""
        if bias is not None:
            self[1].__dict__.pop("bias", None)
            self[1].register_parameter("bias", bias)

    @torch.no_grad()
    def assign(self, left: Tensor, right: Tensor) -> None:
        """Set the values of the factors, of the shapes of `left` and `right`; the first layer is a plain one."""
        if self._first_has_rows:
            self._weight_of(0).copy_(left[0])
            self._weight_of(1).copy_(right[0].t())
            return
        self._weight_of(0).copy_(self._first_layout.from_matrix(right.flatten(0, 1)))
        self.assign_left(left)

    @torch.no_grad()
    def assign_left(self, left: Tensor) -> None:
        """Set the values of the second layer."""
        weight = self._weight_of(1)
        permuted = weight if self._second_order is None else weight.permute(self._second_order)
        permuted.copy_(left.reshape(permuted.shape))

    def _weight_of(self, position: int) -> Tensor:
        weight: Any = self[position].weight
        return weight

    @property
    def _first_layout(self) -> Layout:
        shape = tuple(self._weight_of(0).shape)
        is_transposed = isinstance(self[0], nn.modules.conv._ConvTransposeNd)
        return transposed_layout(shape, self._groups) if is_transposed else row_layout(shape)

    @property
    def weight(self) -> Tensor:
        """The product in the original layer's shape."""
        return self._layout.from_matrix((self.left @ self.right).reshape(self._layout.rows, -1))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second layer."""
        bias: Any = self[1].bias
        return bias


def transposed_layout(shape: tuple[int, ...], groups: int) -> Layout:
    """Return the layout of a transposed convolution's weight, (in, out / groups, *kernel)."""
    inputs, outputs, *kernel = shape
    view = (groups, inputs // groups, outputs, *kernel)
    order = (0, 2, 1, *range(3, len(view)))
    return Layout(shape=shape, view=view, order=order, rows=groups * outputs)


class LayerKind(ABC):
    """A kind of layer that can be compressed through its weights.

    Laws: `layout(...)` is a bijection (see `Layout`), and for a kind that can be factored, `factor(layer, r)` with the
    product of its factors equal to the weight computes what the layer computes.
    """

    name: str
    """What messages and tables call it."""
    explicit_only = False
    """Whether a rule must name the layer or its type, and a glob alone does not take it."""
    why_not_factored: str | None = None
    """The reason why two smaller layers cannot take its place; None where they can."""
    multiplies_rows = False
    """Whether `input_rows` tells what the weight is multiplied with."""
    takes_activations = False
    """Whether all it does is to multiply the one tensor that it takes with its one weight."""

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether a module is of this kind or of a subclass."""

    @abstractmethod
    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters that are compressed."""

    @abstractmethod
    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        """Return how a weight of the given shape is a matrix."""

    def groups(self, module: nn.Module) -> int:
        """Return the number of blocks on the diagonal of the weight."""
        return 1

    def problem(self, module: nn.Module) -> str | None:
        """Return why this layer's settings keep it from being compressed, None where nothing does."""
        return None

    def base_forward(self, module: nn.Module) -> Callable[..., Any] | None:
        """Return the plain layer's own forward, to compare a subclass with; None where there is none to compare."""
        return None

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> int | None:
        """Return how many times a forward pass multiplies with the weight (tokens, pixels); None if not known."""
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return output.numel() // self.layout(module, shape).rows

    def input_rows(self, module: nn.Module, input: Tensor) -> Tensor:
        """Return what the rows of the weight's matrix are multiplied with, for an input of the layer.

        (groups, positions, columns): without its bias, the output of group i is `rows[i] @ matrix[i].T`.
        """
        raise NotImplementedError(f"{self.name} multiplies with what only its module knows.")

    def probe_input(self, module: nn.Module) -> Tensor | None:
        """Return a small random input for the layer, None where any would be a guess."""
        return None

    def split(self, module: nn.Module, wanted: Split) -> Split:
        """Return how a layer's weight is split if a convolution's is to be split in some way."""
        return Split.CHANNELS

    def split_layout(self, module: nn.Module, split: Split) -> Layout:
        """Return how the weight is the matrix that is factored in a split."""
        return self.layout(module, tuple(module.weight.shape))  # type: ignore[arg-type]

    def factor(self, module: nn.Module, rank: int) -> Factored:
        """Return two plain layers of a rank, with memory that is not initialized, where and as the layer is."""
        raise NotImplementedError(self.why_not_factored)

    def factor_split(self, module: nn.Module, ranks: Sequence[int], split: Split) -> Factored:
        """Return plain layers as `factor` does, in a split that `split` has given.

        Args:
            module: the layer.
            ranks: those of the factored layer, see `Factored.ranks`.
            split: how its weight is split.
        """
        (rank,) = ranks
        return self.factor(module, rank)


_KINDS: list[LayerKind] = []


def register_kind(kind: type[LayerKind]) -> type[LayerKind]:
    """Class decorator: make a kind of layer known to recipes."""
    _KINDS.append(kind())
    return kind


def find_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, None where the library knows none."""
    return next((kind for kind in _KINDS if kind.owns(module)), None)


def factor(module: nn.Module, *ranks: int, split: Split = Split.CHANNELS) -> Factored:
    """Return two plain layers of the given rank that fit in a layer's place, with memory that is not initialized.

    Args:
        module: a linear, convolution or embedding layer.
        ranks: channels a group between the two layers; in a Tucker split those before and after it, last ones first.
        split: how a convolution's weight is split.

    Raises:
        TypeError: the layer cannot be replaced by two, or not in this split.
    """
    kind = find_kind(module)
    if kind is None or kind.why_not_factored:
        reason = kind.why_not_factored if kind else "it is not a layer with a known weight"
        raise TypeError(f"{type(module).__name__} cannot be factored: {reason}.")
    if kind.split(module, split) is not split or len(ranks) != (2 if split is Split.TUCKER else 1):
        raise TypeError(f"{type(module).__name__} cannot be factored into {split} with {len(ranks)} ranks.")
    return kind.factor_split(module, ranks, split)
