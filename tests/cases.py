"""The table technique x layer kind over which the laws are tested. A new technique, or a new kind, is one row here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import vanishing
from codebook import Codebook
from vanishing import (
    NM,
    Binary,
    Compressor,
    Global,
    Gradient,
    LowRank,
    MagnitudePruning,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantization,
    Replace,
    Split,
    Ternary,
)
from vanishing.schedules import Schedule

BATCH, TOKENS, SIDE = 3, 5, 6


@dataclass(frozen=True)
class Technique:
    """A row of the table of techniques.

    Args:
        compressor: the technique, for layers of about ten channels.
        needs: what a layer must allow, of "factors" (two layers in its place), "rank 2" and "groups of 4" (fan-in);
            `LayerCase.refuses` says which layers do not.
        quick: whether the fast tests have it with every layer that is quick.
    """

    compressor: Compressor
    needs: tuple[str, ...] = ()
    quick: bool = False


def _other_weights(block: nn.Module) -> nn.Module:
    """The same module with other weights: a compressed form that fits every block."""
    new = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.5)
    return new


CODES = {
    f"{bits}_bits{'' if symmetric else '_asymmetric'}": Technique(Quantization(bits=bits, symmetric=symmetric))
    for bits in (1, 2, 3, 4, 8)
    for symmetric in (True, False)
    if symmetric or bits > 1
}

TECHNIQUES: dict[str, Technique] = {
    "pruned": Technique(MagnitudePruning(sparsity=0.6), quick=True),
    "pruned_per_channel": Technique(MagnitudePruning(sparsity=0.6, granularity=PerChannel())),
    "pruned_globally": Technique(MagnitudePruning(sparsity=0.6, granularity=Global()), quick=True),
    "pruned_2_of_4": Technique(MagnitudePruning(granularity=NM(n=2, m=4)), ("groups of 4",)),
    "pruned_exact_gradient": Technique(MagnitudePruning(sparsity=0.6, gradient=Gradient.EXACT), quick=True),
    "pruned_frozen": Technique(MagnitudePruning(sparsity=0.6, freeze=True, update_every=3), quick=True),
    "pruned_decaying": Technique(
        MagnitudePruning(sparsity=0.6, gradient=Gradient.DECAYING, decay=0.1, update_every=1), quick=True
    ),
    **CODES,
    "4_bits_per_tensor": Technique(Quantization(bits=4, granularity=PerTensor())),
    "4_bits_ragged_groups": Technique(Quantization(bits=4, granularity=PerGroup(size=5)), quick=True),
    "3_bits_asymmetric_ragged_groups": Technique(Quantization(bits=3, granularity=PerGroup(size=5), symmetric=False)),
    "2_bits_clipped": Technique(Quantization(bits=2, gradient=Gradient.CLIPPED)),
    "1_bit_clipped": Technique(Quantization(bits=1, gradient=Gradient.CLIPPED)),
    "2_bits_asymmetric_clipped": Technique(
        Quantization(bits=2, granularity=PerTensor(), symmetric=False, gradient=Gradient.CLIPPED), quick=True
    ),
    "3_bits_damped": Technique(Quantization(bits=3, damping=0.1), quick=True),
    "3_bits_searched": Technique(Quantization(bits=3, clip=0.4), quick=True),
    "2_bits_asymmetric_searched_ragged_groups": Technique(
        Quantization(bits=2, symmetric=False, granularity=PerGroup(size=5), gradient=Gradient.CLIPPED, clip=0.3)
    ),
    "pruned_3_bits_searched": Technique(
        MagnitudePruning(0.6) | Quantization(3, granularity=PerTensor(), clip=0.4, damping=0.1)
    ),
    "low_rank_3_bits_searched": Technique(LowRank(ratio=0.5) | Quantization(3, clip=0.4), ("factors",)),
    "binary": Technique(Binary(), quick=True),
    "binary_per_tensor": Technique(Binary(granularity=PerTensor())),
    "binary_ragged_groups": Technique(Binary(granularity=PerGroup(size=5))),
    "ternary": Technique(Ternary()),
    "ternary_ragged_groups": Technique(Ternary(granularity=PerGroup(size=5), gradient=Gradient.CLIPPED)),
    "rank_2": Technique(LowRank(rank=2), ("factors", "rank 2"), quick=True),
    "rank_by_ratio": Technique(LowRank(ratio=0.4), ("factors",)),
    "rank_by_energy": Technique(LowRank(energy=0.7), ("factors",), quick=True),
    "rank_spatial": Technique(LowRank(ratio=0.6, split=Split.SPATIAL), ("factors",), quick=True),
    "rank_tucker": Technique(LowRank(ratio=0.6, split=Split.TUCKER), ("factors",), quick=True),
    "rank_tucker_by_energy_8_bits": Technique(
        LowRank(energy=0.8, split=Split.TUCKER) | Quantization(bits=8), ("factors",), quick=True
    ),
    "rank_spatial_by_energy_pruned": Technique(
        LowRank(energy=0.8, split=Split.SPATIAL) | MagnitudePruning(0.5), ("factors",)
    ),
    "pruned_4_bits": Technique(MagnitudePruning(0.6) | Quantization(bits=4, symmetric=False)),
    "pruned_binary": Technique(MagnitudePruning(0.6) | Binary(), quick=True),
    "pruned_1_bit_ragged_groups": Technique(MagnitudePruning(0.6) | Quantization(bits=1, granularity=PerGroup(size=5))),
    "pruned_ternary": Technique(MagnitudePruning(0.6, gradient=Gradient.EXACT) | Ternary(gradient=Gradient.CLIPPED)),
    "pruned_decaying_1_bit_damped": Technique(
        MagnitudePruning(0.6, gradient=Gradient.DECAYING, decay=0.1)
        | Quantization(bits=1, gradient=Gradient.CLIPPED, damping=0.1)
    ),
    "low_rank_decaying_3_bits_damped": Technique(
        LowRank(ratio=0.5)
        | MagnitudePruning(0.5, gradient=Gradient.DECAYING, decay=0.1)
        | Quantization(3, damping=0.1),
        ("factors",),
    ),
    "pruned_codebook": Technique(MagnitudePruning(0.6) | Codebook(bits=2)),
    "low_rank_8_bits": Technique(LowRank(ratio=0.5) | Quantization(bits=8), ("factors",)),
    "low_rank_pruned": Technique(LowRank(ratio=0.5) | MagnitudePruning(0.5), ("factors",)),
    "low_rank_pruned_4_bits": Technique(
        LowRank(ratio=0.5) | MagnitudePruning(0.5) | Quantization(bits=4), ("factors",), quick=True
    ),
    "replaced": Technique(Replace(_other_weights), quick=True),
    "codebook": Technique(Codebook(bits=2), quick=True),
}


@dataclass(frozen=True)
class LayerCase:
    """A row of the table of layer kinds.

    Args:
        make: returns a module with one or more layers of the kind, with random weights.
        inputs: returns random inputs of it.
        names: full names of the layers that are compressed, by which a recipe selects them.
        linear: whether the output is linear in all those weights and biases together.
        refuses: what of `Technique.needs` the layers do not allow -> a part of the reason.
        quick: whether the fast tests have it with every technique that is quick.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...] = ("layer",)
    linear: bool = True
    refuses: dict[str, str] = field(default_factory=dict)
    quick: bool = False

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module with the random weights of a seed, in training mode."""
        torch.manual_seed(seed)
        return self.make().to(dtype)

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Return the inputs of a seed; those that are floating ask for their gradient."""
        torch.manual_seed(1_000 + seed)
        made = self.inputs()
        return tuple(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in made)

    def refusal(self, technique: Technique) -> str | None:
        """Return the reason for which a technique must be refused on these layers, None where it is accepted."""
        return next((reason for need, reason in self.refuses.items() if need in technique.needs), None)

    def recipe(self, compressor: Compressor, **options: Any) -> vanishing.Recipe:
        """Return a recipe for the layers by their exact names; without a schedule, linear over four steps."""
        schedule: Schedule = options.pop("schedule", vanishing.LinearSchedule(steps=4))
        names = self.names
        if isinstance(compressor, vanishing.BlockCompressor):
            names = tuple(n for n in names if not any(n.startswith(f"{other}.") for other in names))
        return vanishing.Recipe(dict.fromkeys(names, compressor), schedule=schedule, **options)


class Single(nn.Module):
    """A module around one layer, with keyword arguments for it."""

    def __init__(self, layer: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.layer = layer
        self.keywords = keywords

    def forward(self, *inputs: Tensor) -> Any:
        return self.layer(*inputs, **self.keywords)


class Twice(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """An embedding and an output layer that share their weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Reader(nn.Module):
    """A module that reads its layers' weights itself: T5 the type, fused attention the whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(functional.linear(x, self.up.weight, self.up.bias))
        return self.down(hidden.to(self.down.weight.dtype))


class Experts(nn.Module):
    """A mixture of experts with the weights of all experts in two parameters, gated by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bi,eoi->beo", x, self.up))
        return torch.einsum("beo,eio->bi", hidden, self.down)


class SameLinear(nn.Linear):
    """A subclass that computes what its base does, as timm and others have."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype), self.bias)


class OtherLinear(nn.Linear):
    """A subclass that computes something else with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(torch.relu(input), self.weight, self.bias) / 2


class Attention(nn.Module):
    """Self-attention, without the attention weights of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    """Attention with projections of their own for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, kdim=12, vdim=16, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layer(query, key, value)[0]


def _encoder() -> nn.Module:
    # Without dropout, so that the same input gives the same output in training, too.
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2)


ENCODER_LAYERS = tuple(
    f"layers.{i}.{name}" for i in range(2) for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
)


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs of one random tensor."""
    return lambda: (torch.randn(shape),)


def token_ids() -> tuple[Tensor, ...]:
    """Inputs of one batch of tokens, a padding among them."""
    tokens = torch.randint(10, (BATCH, TOKENS))
    tokens[0, -1] = 0
    return (tokens,)


SEQUENCE = floats(BATCH, TOKENS, 8)
WIDE_SEQUENCE = floats(BATCH, TOKENS, 12)
SIGNAL, IMAGE, VOLUME = (floats(BATCH, 4, *[SIDE] * dimensions) for dimensions in (1, 2, 3))
NO_FACTORS = "two layers cannot take its place"

LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: Single(nn.Linear(12, 8)), WIDE_SEQUENCE),
    "linear_no_bias": LayerCase(lambda: Single(nn.Linear(8, 12, bias=False)), SEQUENCE),
    "linear_same": LayerCase(lambda: Single(SameLinear(12, 8)), WIDE_SEQUENCE),
    "linear_other": LayerCase(
        lambda: Single(OtherLinear(12, 8)), WIDE_SEQUENCE, refuses={"factors": "does not compute what the plain layer"}
    ),
    "linear_twice": LayerCase(Twice, SEQUENCE, linear=False),
    "linear_tied": LayerCase(
        Tied,
        token_ids,
        ("embedding", "head"),
        linear=False,
        refuses={"factors": "factors cannot be shared"},
        quick=True,
    ),
    "linear_read": LayerCase(Reader, SEQUENCE, ("up", "down"), linear=False),
    "transformers_conv1d": LayerCase(lambda: Single(Conv1D(8, 12)), WIDE_SEQUENCE, quick=True),
    "conv1d": LayerCase(lambda: Single(nn.Conv1d(4, 8, 3, padding=1)), SIGNAL),
    "conv1d_dilated": LayerCase(
        lambda: Single(nn.Conv1d(4, 8, 2, stride=2, dilation=2, padding=2, padding_mode="circular")), SIGNAL
    ),
    "conv2d": LayerCase(lambda: Single(nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect")), IMAGE),
    "conv2d_groups": LayerCase(lambda: Single(nn.Conv2d(4, 8, 2, groups=2, stride=2, bias=False)), IMAGE, quick=True),
    "conv2d_depthwise": LayerCase(
        lambda: Single(nn.Conv2d(4, 4, 3, groups=4)),
        IMAGE,
        refuses={"rank 2": "rank is at most 1", "groups of 4": "fan-in of 9 is not a multiple of m = 4"},
    ),
    "conv3d": LayerCase(lambda: Single(nn.Conv3d(4, 6, 2, padding_mode="replicate", padding=1)), VOLUME),
    "transposed1d": LayerCase(lambda: Single(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)), SIGNAL),
    "transposed2d": LayerCase(lambda: Single(nn.ConvTranspose2d(4, 8, (2, 3), stride=2, groups=2)), IMAGE, quick=True),
    "transposed2d_output_size": LayerCase(
        lambda: Single(nn.ConvTranspose2d(4, 8, 2, stride=3, bias=False), output_size=[18, 19]), IMAGE
    ),
    "transposed3d": LayerCase(lambda: Single(nn.ConvTranspose3d(4, 6, 2, dilation=2, padding=1)), VOLUME),
    "embedding": LayerCase(lambda: Single(nn.Embedding(10, 8, padding_idx=0)), token_ids, quick=True),
    "attention": LayerCase(Attention, SEQUENCE, linear=False, refuses={"factors": NO_FACTORS}, quick=True),
    "attention_separate": LayerCase(
        CrossAttention,
        lambda: (torch.randn(BATCH, 4, 8), torch.randn(BATCH, TOKENS, 12), torch.randn(BATCH, TOKENS, 16)),
        linear=False,
        refuses={"factors": NO_FACTORS},
    ),
    "attention_output": LayerCase(Attention, SEQUENCE, ("layer.out_proj",)),
    "encoder": LayerCase(_encoder, SEQUENCE, ENCODER_LAYERS, linear=False, refuses={"factors": NO_FACTORS}),
    "lstm": LayerCase(
        lambda: Single(nn.LSTM(12, 8, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)),
        WIDE_SEQUENCE,
        linear=False,
        refuses={"factors": NO_FACTORS},
        quick=True,
    ),
    "gru": LayerCase(
        lambda: Single(nn.GRU(12, 8, num_layers=2, bidirectional=True, bias=False)),
        WIDE_SEQUENCE,
        linear=False,
        refuses={"factors": NO_FACTORS},
    ),
    "lstm_cell": LayerCase(
        lambda: Single(nn.LSTMCell(12, 8)), floats(BATCH, 12), linear=False, refuses={"factors": NO_FACTORS}
    ),
    "experts": LayerCase(
        lambda: Single(Experts()), floats(BATCH, 8), linear=False, refuses={"factors": NO_FACTORS}, quick=True
    ),
}


@dataclass(frozen=True)
class Pair:
    """One cell of the table."""

    layer: LayerCase
    technique: Technique

    def prepare(self, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
        """Return the layers of a seed in transition, with an optimizer."""
        return Run(self, self.layer.build(seed, dtype), dtype, self.layer.recipe(self.technique.compressor, **options))


class Run:
    """A model in transition and its optimizer; everything random in it is a function of the step."""

    def __init__(self, pair: Pair, model: nn.Module, dtype: torch.dtype, recipe: vanishing.Recipe) -> None:
        self.layer, self.model, self.dtype = pair.layer, model, dtype
        self.transition = vanishing.prepare(model, recipe)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(self, until: int) -> Run:
        """Train to an optimizer step."""
        for step in range(self.transition.steps_done, until):
            loss(self.model(*self.layer.batch(step, self.dtype))).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.transition.step()
        return self

    def outputs(self) -> list[Tensor]:
        """Return the outputs in training and in evaluation for a batch that is not trained on."""
        return outputs(self.model, self.layer.batch(99, self.dtype))

    def state(self) -> dict[str, Any]:
        """Return a copy of what a user saves to continue later."""
        parts = {"model": self.model, "optimizer": self.optimizer, "transition": self.transition}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})  # type: ignore[attr-defined]

    def load(self, state: dict[str, Any]) -> Run:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.transition.load_state_dict(state["transition"])
        return self


def tensors(nested: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def loss(nested: Any) -> Tensor:
    """Return a number that every output has a part in."""
    return torch.stack([tensor.square().mean() for tensor in tensors(nested)]).sum()


def outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs of a model in training and in evaluation, where it may take another path."""
    was_training = model.training
    with torch.no_grad():
        found = [tensor for mode in (True, False) for tensor in tensors(model.train(mode)(*batch))]
    model.train(was_training)
    return found


PAIRS = {(layer, technique): Pair(LAYERS[layer], TECHNIQUES[technique]) for layer in LAYERS for technique in TECHNIQUES}
