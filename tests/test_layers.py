"""What each layer kind promises: its weight as a matrix, two layers in its place, and its own ways of running."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import vanishing
from cases import LAYERS, PAIRS, Experts, LayerCase, OtherLinear, Tied, Twice, loss, outputs
from vanishing import Binary, LinearSchedule, LowRank, MagnitudePruning, PerTensor, Quantization, Recipe
from vanishing.blended_weight import BlendedWeight
from vanishing.layers import Factored, factor, find_kind
from vanishing.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

FADE = LinearSchedule(steps=4)
FACTORABLE = [
    name for name, case in LAYERS.items() if case.linear and "factors" not in case.refuses and case.names == ("layer",)
]


def the_layer(case: LayerCase, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The one layer of a case."""
    return case.build(dtype=dtype).get_submodule("layer")


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """The compressible weights of a layer by name."""
    kind = find_kind(layer)
    assert kind is not None
    return {name: layer.get_parameter(name) for name in kind.weight_names(layer)}


def match(model: nn.Module, rules: dict[Any, vanishing.Compressor], **options: Any) -> Plan:
    """The plan of some rules for a model."""
    return Recipe(rules, schedule=FADE, **options).match(model)


def outcomes(plan: Plan) -> dict[str, str]:
    """Module name -> what happens to it."""
    return {row.name: row.outcome for row in plan.rows}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_weight_comes_back_from_its_matrix(layer: str) -> None:
    for module in LAYERS[layer].build().modules():
        kind = find_kind(module)
        for weight in weights_of(module).values() if kind else ():
            assert kind is not None
            layout = kind.layout(module, tuple(weight.shape))
            matrix = layout.to_matrix(weight)
            assert matrix.shape == (layout.rows, weight.numel() // layout.rows)
            assert torch.equal(layout.from_matrix(matrix), weight)
            assert torch.equal(layout.from_matrix(matrix.contiguous()), weight)


@pytest.mark.parametrize("layer", [name for name in FACTORABLE if name != "embedding"])
def test_a_row_of_the_matrix_is_an_output_channel(layer: str) -> None:
    case = LAYERS[layer]
    model = case.build()
    module = model.get_submodule("layer")
    kind, weight = find_kind(module), module.get_parameter("weight")
    assert kind is not None
    layout = kind.layout(module, tuple(weight.shape))
    with torch.no_grad():
        before = model(*case.batch())
        matrix = layout.to_matrix(weight).clone()
        matrix[2] += 1.0
        weight.copy_(layout.from_matrix(matrix))
        changed = model(*case.batch()) - before
    channels = 1 if weight.dim() > 2 else -1
    assert changed.select(channels, 2).abs().max() > 1e-3
    others = [i for i in range(layout.rows) if i != 2]
    assert not changed.index_select(channels, torch.tensor(others)).any()


def assert_factored_computes(layer: nn.Module, rank: int, *inputs: Tensor, **keywords: Any) -> Factored:
    """Compare two thin layers with random weights with the layer that has their product as its weight."""
    factored = factor(layer, rank)
    assert factored.rank == rank
    factored.assign(torch.randn_like(factored.left), torch.randn_like(factored.right))
    bias = getattr(layer, "bias", None)
    if bias is not None:
        factored[1].bias = bias
    with torch.no_grad():
        layer.get_parameter("weight").copy_(factored.weight)
        expected, got = layer(*inputs, **keywords), factored(*inputs, **keywords)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    return factored


@pytest.mark.parametrize("layer", FACTORABLE)
def test_two_thin_layers_compute_what_the_layer_with_their_product_does(layer: str) -> None:
    case = LAYERS[layer]
    model = case.build(dtype=torch.float64)
    module = model.get_submodule("layer")
    rank = 1 if "rank 2" in case.refuses else 2
    factored = assert_factored_computes(module, rank, *case.batch(dtype=torch.float64), **model.keywords)  # type: ignore[arg-type]
    sizes = {
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
    }
    sizes |= {"groups", "padding_mode", "num_embeddings", "embedding_dim", "padding_idx", "nx", "nf"}
    for name in sizes & vars(module).keys():
        assert getattr(factored, name) == getattr(module, name), name
    if not isinstance(module, nn.Embedding):
        assert (factored.bias is None) == (module.bias is None)
    assert [type(thin).__module__.split(".")[0] for thin in factored] == ["torch", "torch"]


@given(
    transposed=st.booleans(),
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 3),
    multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    extra=st.integers(0, 2),
    bias=st.booleans(),
    rank=st.integers(1, 3),
)
def test_two_thin_convolutions_compute_what_one_does(
    transposed: bool,
    dimensions: int,
    groups: int,
    multiples: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    extra: int,
    bias: bool,
    rank: int,
) -> None:
    kinds = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    extras = {"output_padding": min(extra, max(stride, dilation) - 1)} if transposed else {}
    settings: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "groups": groups,
        "bias": bias,
    }
    inputs, channels = (groups * multiple for multiple in multiples)
    layer = kinds[transposed][dimensions - 1](inputs, channels, kernel, dtype=torch.float64, **settings, **extras)
    assert_factored_computes(layer, rank, torch.randn(2, inputs, *[5] * dimensions, dtype=torch.float64))


def test_what_cannot_be_factored_says_why() -> None:
    with pytest.raises(
        TypeError, match=r"LSTM cannot be factored: a recurrent layer .* two layers cannot take its place"
    ):
        factor(nn.LSTM(4, 4), 2)
    with pytest.raises(TypeError, match=r"LayerNorm cannot be factored: it is not a layer with a known weight"):
        factor(nn.LayerNorm(4), 2)


# Embeddings


def test_an_embedding_is_taken_by_its_type_or_exact_name_and_never_by_a_glob() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 8), "head": nn.Linear(8, 10)})
    plan = match(model, {"*": Binary()})
    assert outcomes(plan) == {"tokens": "left", "head": "compress"}
    assert "exact name" in plan.rows[0].detail
    assert outcomes(match(model, {nn.Embedding: Binary()})) == {"tokens": "compress", "head": "left"}
    assert outcomes(match(model, {"tokens": Binary()}))["tokens"] == "compress"


def test_the_padding_token_gets_no_gradient_and_stays_zero() -> None:
    for compressor in (MagnitudePruning(0.5), Quantization(bits=3, granularity=PerTensor()), LowRank(rank=2)):
        model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0))
        transition = vanishing.prepare(model, Recipe({"0": compressor}, schedule=FADE))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(5):
            model(torch.tensor([0, 1, 2, 0])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        transition.finish()
        assert not model(torch.tensor([0])).abs().gt(1e-6).any()


@pytest.mark.parametrize(
    ("setting", "reason"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse gradients")]
)
def test_an_embedding_that_cannot_be_blended_is_refused(setting: dict[str, Any], reason: str) -> None:
    plan = match(nn.ModuleDict({"tokens": nn.Embedding(10, 8, **setting)}), {"tokens": Binary()})
    assert len(plan.problems) == 1
    assert reason in plan.problems[0]


# Weights that are shared


def test_a_layer_that_is_used_twice_is_compressed_once_and_stays_one() -> None:
    model = Twice()
    plan = match(model, {"*": LowRank(rank=2)})
    assert [row.name for row in plan.rows] == ["layer"]
    transition = vanishing.prepare(model, LowRank(rank=2), steps=1)
    transition.finish(force=True)
    assert isinstance(model.layer, Factored)
    assert model.again is model.layer


@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5), Binary()], ids=repr)
def test_a_tied_weight_stays_tied(compressor: vanishing.Compressor) -> None:
    model = Tied()
    weight = model.head.weight
    recipe = Recipe({"embedding": compressor, "head": compressor}, schedule=FADE)
    transition = vanishing.prepare(model, recipe)
    assert sum(p is weight for p in model.parameters()) == 1
    assert torch.equal(model.head.weight, model.embedding.weight)
    transition.finish(force=True)
    assert model.head.weight is model.embedding.weight is weight


def test_a_tied_weight_is_left_unless_every_layer_that_holds_it_is_named() -> None:
    plan = match(Tied(), {"head": Binary()})
    assert len(plan.problems) == 1
    assert "its weight is tied to 'embedding', which no rule takes" in plan.problems[0]
    plan = match(Tied(), {"head": Binary(), "embedding": MagnitudePruning(0.5)})
    assert "which another rule compresses" in plan.problems[0]


# Subclasses


def test_a_subclass_is_pruned_with_its_own_forward() -> None:
    model = nn.Sequential(OtherLinear(12, 8))
    x = torch.randn(3, 12)
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=1)
    transition.finish(force=True)
    assert type(model[0]) is OtherLinear
    expected = nn.functional.linear(torch.relu(x), model[0].weight, model[0].bias) / 2
    assert torch.equal(model(x), expected)


def test_a_forward_that_was_patched_on_the_object_is_not_replaced() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    model[0].forward = lambda x: x[..., :8]
    (problem,) = match(model, {"0": LowRank(rank=2)}).problems
    assert "its forward was patched on the object" in problem


def test_looking_at_subclasses_leaves_the_random_numbers_alone() -> None:
    model = nn.Sequential(LAYERS["linear_same"].build())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    vanishing.prepare(model, LowRank(rank=2), steps=1).finish(force=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_weight_that_something_else_computes_is_refused() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    (problem,) = match(model, {"*": Binary()}).problems
    assert "its weight is parametrized by _WeightNorm. Remove that first" in problem


# Attention


@pytest.mark.parametrize("technique", ["pruned", "4_bits_ragged_groups", "binary", "low_rank_8_bits", "pruned_binary"])
@pytest.mark.parametrize("layer", ["attention", "attention_output", "encoder"])
def test_the_fused_path_of_attention_computes_what_the_plain_one_does(layer: str, technique: str) -> None:
    pair = PAIRS[layer, technique]
    if pair.layer.refusal(pair.technique):
        recipe = Recipe({"*": pair.technique.compressor}, schedule=FADE)
        model = pair.layer.build()
        transition = vanishing.prepare(model, recipe)
    else:
        run = pair.prepare()
        model, transition = run.model, run.transition
    model.eval()

    def assert_paths_agree() -> None:
        enabled = torch.backends.mha.get_fastpath_enabled()
        (x,) = pair.layer.batch()
        found = []
        for fused in (True, False):
            torch.backends.mha.set_fastpath_enabled(fused)
            try:
                with torch.no_grad():
                    found.append(model(x))
            finally:
                torch.backends.mha.set_fastpath_enabled(enabled)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

    for step in range(5):
        transition.seek(step)
        assert_paths_agree()
    transition.finish()
    assert_paths_agree()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padding_mask_runs_through_the_nested_tensors_of_an_encoder() -> None:
    model = LAYERS["encoder"].build().eval()
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=2)
    transition.step()
    (x,) = LAYERS["encoder"].batch()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[0, -2:] = True
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=padding)
    plain = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fused[~padding], plain[~padding], rtol=1e-5, atol=1e-5)


# Recurrent layers


@pytest.mark.parametrize(("layer", "weights"), [("lstm", 12), ("gru", 8)])
def test_a_recurrent_layer_computes_each_blended_weight_once(
    layer: str, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PAIRS[layer, "pruned"].prepare()
    run.transition.seek(2)
    calls: list[nn.Module] = []
    compute = BlendedWeight.forward

    def count(self: BlendedWeight, weight: Tensor) -> Tensor:
        calls.append(self)
        return compute(self, weight)

    monkeypatch.setattr(BlendedWeight, "forward", count)
    run.model(*LAYERS[layer].batch())
    assert len(calls) == len(set(calls)) == weights


@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_a_recurrent_layer_takes_packed_sequences(layer: str) -> None:
    run = PAIRS[layer, "binary"].prepare()
    run.transition.seek(2)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 12), torch.tensor([4, 3, 1]))
    loss(run.model(packed)[0].data).backward()
    assert all(p.grad is not None for p in run.model.parameters())


@pytest.mark.parametrize("technique", ["pruned", "low_rank_8_bits"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_is_independent_of_what_becomes_of_the_model(layer: str, technique: str) -> None:
    pair = PAIRS[layer, technique]
    if pair.layer.refusal(pair.technique):
        return
    run = pair.prepare().train(2)
    average = copy.deepcopy(run.model)
    expected = run.outputs()
    run.train(5).transition.finish()
    got = outputs(average, pair.layer.batch(99))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    loss(average(*pair.layer.batch())).backward()
    copied = outputs(copy.deepcopy(run.model), pair.layer.batch(99))
    assert all(torch.equal(one, other) for one, other in zip(copied, run.outputs(), strict=True))


# Experts


def test_experts_are_compressed_each_on_its_own_channels() -> None:
    model = nn.Sequential(Experts())
    transition = vanishing.prepare(model, Binary(), steps=1)
    transition.finish(force=True)
    for weight in (model[0].up, model[0].down):
        magnitudes = weight.detach().abs()  # type: ignore[operator]
        assert torch.equal(magnitudes, magnitudes[..., :1].expand_as(magnitudes))
        assert len(magnitudes[..., 0].unique()) == magnitudes[..., 0].numel()


def test_learned_positions_are_not_experts() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 9, 8))
            self.token = nn.Parameter(torch.randn(1, 1, 8))

    assert find_kind(Positions()) is None
