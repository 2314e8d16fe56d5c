"""Heads and hidden units that vanish: what the blend computes, what is cut out, and what comes back from a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vanishing
from vanishing import ConfigError, HeadPruning, LinearSchedule, Quantization, Recipe, RecipeError, WidthPruning

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
IDS = torch.arange(20).reshape(2, 10) % 17 + 3
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = {"*.attention.*": HeadPruning(0.5), "*": WidthPruning(0.5)}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=24, **SIZES))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, num_key_value_heads=2, **SIZES))


def timm_vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=4)
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


Case = tuple[Callable[[], nn.Module], Any, dict[Any, Any]]
ALL_HALF = {"*attn*": HeadPruning(0.5), "*mlp*": WidthPruning(0.5)}
CASES: dict[str, Case] = {
    "BERT": (bert, {"input_ids": IDS}, HALF),
    "ViT": (vit, {"pixel_values": PIXELS}, HALF),
    "Llama, grouped queries": (llama, {"input_ids": IDS}, ALL_HALF),
    "timm": (timm_vit, torch.cat([PIXELS, PIXELS], -1).repeat(1, 1, 2, 1), ALL_HALF),
    "PyTorch's encoder": (encoder, torch.randn(2, 5, 32), {"*": WidthPruning(0.5)}),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def output(case: str, model: nn.Module) -> Tensor:
    inputs = CASES[case][1]
    result: Tensor = next(iter(tree_leaves(model(**inputs) if isinstance(inputs, dict) else model(inputs))))
    return result


def prepare(case: str, model: nn.Module, steps: int = 4) -> vanishing.Transition:
    return vanishing.prepare(model, Recipe(CASES[case][2], schedule=LinearSchedule(steps=steps)))


@pytest.mark.parametrize("case", CASES)
def test_at_beta_1_no_output_and_no_gradient_changes(case: str) -> None:
    plain, model = build(case), build(case)
    transition = prepare(case, model)
    expected, got = output(case, plain), output(case, model)
    assert torch.equal(expected, got)
    expected.square().sum().backward()
    got.square().sum().backward()
    transition.cancel()
    for (name, one), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad), name


def test_the_blend_is_that_of_the_outputs_of_both_forms() -> None:
    """Against two feed-forwards that are run and added, as the paper writes it."""
    torch.manual_seed(0)
    block: Any = vit().get_submodule("vit.layers.0.mlp").double()
    model = nn.ModuleDict({"mlp": block})
    whole = copy.deepcopy(block)
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    transition = vanishing.prepare(model, Recipe({"*": WidthPruning(0.75)}, schedule=LinearSchedule(steps=4)))
    kept = model.state_dict()["mlp.fc2.parametrizations.weight.0.form.mask"]
    assert int(kept.sum()) == 16
    transition.seek(1)
    got = block(x)
    got.square().sum().backward()

    hidden = nn.functional.gelu(whole.fc1(x))
    small = nn.functional.linear(hidden[..., kept], whole.fc2.weight[:, kept], whole.fc2.bias)
    blended = 0.75 * whole.fc2(hidden) + 0.25 * small
    blended.square().sum().backward()
    torch.testing.assert_close(got, blended)
    torch.testing.assert_close(block.fc1.weight.grad, whole.fc1.weight.grad)
    torch.testing.assert_close(block.fc2.parametrizations.weight.original.grad, whole.fc2.weight.grad)


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_computes_what_the_transition_computed_and_comes_back_from_a_file(
    case: str, tmp_path: Path
) -> None:
    model = build(case)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    transition = prepare(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        output(case, model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    with torch.no_grad():
        expected = output(case, model)
        finished = transition.finish()
        torch.testing.assert_close(output(case, finished), expected, rtol=1e-5, atol=1e-6)
    after = {name: tuple(p.shape) for name, p in finished.named_parameters()}
    assert list(after) == list(before)
    assert all(type(module).__name__ != "ParametrizedLinear" for module in finished.modules())
    narrower = {name for name in after if after[name] != before[name]}
    assert narrower
    for name in narrower:
        assert sorted(zip(before[name], after[name], strict=True))[-1][1] <= 64
        assert 2 * torch.Size(after[name]).numel() == torch.Size(before[name]).numel()

    # The optimizer goes on with what is left.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in finished.parameters()}
    output(case, finished).square().mean().backward()
    optimizer.step()

    vanishing.save(finished, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build(case))
    with torch.no_grad():
        assert torch.equal(output(case, loaded), output(case, finished))
    assert vanishing.summary(loaded).after.parameters == vanishing.summary(finished).after.parameters
    if isinstance(finished, transformers.PreTrainedModel):
        assert torch.equal(output(case, vanishing.load(tmp_path / "small")), output(case, finished))


def test_those_units_stay_whose_weights_are_largest() -> None:
    torch.manual_seed(0)
    model = vit()
    mlp: Any = model.get_submodule("vit.layers.0.mlp")
    scores = mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0)
    largest = scores.topk(32).indices.sort().values
    expected = mlp.fc1.weight[largest].clone()
    vanishing.prepare(model, WidthPruning(0.5), steps=1).finish(force=True)
    assert torch.equal(mlp.fc1.weight, expected)

    attention: Any = llama().get_submodule("model.layers.0.self_attn")
    with torch.no_grad():
        # Two heads of keys and values with two of queries each; the second pair says nothing.
        attention.o_proj.weight[:, 16:] *= 1e-3
    queries, values = attention.q_proj.weight[:16].clone(), attention.v_proj.weight[:8].clone()
    vanishing.prepare(nn.ModuleList([attention]), HeadPruning(0.5), steps=1).finish(force=True)
    assert torch.equal(attention.q_proj.weight, queries)
    assert torch.equal(attention.v_proj.weight, values)
    assert attention.num_key_value_groups == 2


def test_heads_of_timm_are_counted_anew(tmp_path: Path) -> None:
    model = build("timm")
    vanishing.prepare(model, HeadPruning(0.5), steps=1).finish(force=True)
    attention: Any = model.get_submodule("blocks.0.attn")
    assert (attention.num_heads, attention.attn_dim, attention.head_dim) == (2, 16, 8)
    vanishing.save(model, tmp_path / "small")
    fresh = build("timm")
    loaded: Any = vanishing.load(tmp_path / "small", fresh).get_submodule("blocks.0.attn")
    assert (loaded.num_heads, loaded.attn_dim) == (2, 16)


def test_generation_with_a_cache_is_that_without_one_at_every_beta() -> None:
    model: Any = build("Llama, grouped queries")
    transition = prepare("Llama, grouped queries", model)
    model.generation_config.pad_token_id = 0

    def texts() -> list[Tensor]:
        return [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]

    for step in (0, 2, 4):
        transition.seek(step)
        assert torch.equal(*texts())
    at_the_end = texts()[0]
    transition.finish()
    assert torch.equal(texts()[0], at_the_end)
    assert torch.equal(*texts())


@pytest.mark.parametrize("second", [Quantization(bits=4), vanishing.LowRank(rank=4)])
def test_a_narrow_model_is_compressed_again(second: vanishing.Compressor, tmp_path: Path) -> None:
    model = build("BERT")
    prepare("BERT", model, 1).finish(force=True)
    vanishing.prepare(model, Recipe({"*.layer.*": second}, schedule=LinearSchedule(steps=1))).finish(force=True)
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build("BERT"))
    with torch.no_grad():
        assert torch.equal(output("BERT", loaded), output("BERT", model))
    products = vanishing.summary(loaded).before.multiply_accumulates
    assert products == vanishing.summary(build("BERT")).after.multiply_accumulates


@pytest.mark.parametrize("case", ["BERT", "ViT"])
def test_products_and_bytes_fall_by_half_where_half_is_cut(case: str) -> None:
    model = build(case)
    dense = vanishing.summary(model)
    prepare(case, model, 1).finish(force=True)
    rows = vanishing.summary(model).rows
    cut = [row for row in rows if row.technique]
    assert len(cut) == 2 * (4 + 2)
    assert vanishing.summary(model).before == dense.after or dense.after.nonzeros is not None
    for row in cut:
        assert row.before.multiply_accumulates == 2 * row.after.multiply_accumulates  # type: ignore[operator]
    kept = dense.after.multiply_accumulates - sum(r.after.multiply_accumulates for r in cut)  # type: ignore[operator,misc]
    assert vanishing.summary(model).after.multiply_accumulates == kept


def test_no_share_leaves_the_model_as_it_is() -> None:
    model = build("ViT")
    expected = output("ViT", model)
    recipe = Recipe({"*.attention.*": HeadPruning(0.0), "*": WidthPruning(0.0)}, schedule=LinearSchedule(steps=1))
    vanishing.prepare(model, recipe).finish(force=True)
    assert torch.equal(output("ViT", model), expected)


class Mixed(nn.Module):
    """A feed-forward whose hidden units are normalized together."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.norm(torch.relu(self.fc1(x))))
        return result


class Shaped(nn.Module):
    """An attention that shapes its output by a width of its own, and takes what cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = 16, 4, 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, *, memory: Tensor) -> Tensor:
        q, k, v = (
            layer(each).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, each in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        result: Tensor = self.out_proj(heads.reshape(*x.shape[:2], self.embed_dim))
        return result


@pytest.mark.parametrize(
    ("model", "technique", "message"),
    [
        (lambda: nn.Sequential(Mixed()), WidthPruning(0.5), "Mixed does not follow when units are cut out"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), WidthPruning(0.5), "takes up no hidden units"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), HeadPruning(0.5), "takes up no attention heads"),
        (lambda: nn.Sequential(Shaped()), HeadPruning(0.5), "its 'embed_dim' would not follow"),
        (llama, HeadPruning(0.1), "of its 2 attention heads none would vanish"),
    ],
)
def test_where_units_cannot_be_taken_out_nothing_is_changed(
    model: Callable[[], nn.Module], technique: vanishing.Compressor, message: str
) -> None:
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        vanishing.prepare(built, technique, steps=4)
    after = built.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_layer_that_is_cut_is_compressed_by_no_other_rule() -> None:
    model = build("ViT")
    recipe = Recipe({"*o_proj": HeadPruning(0.5), "*": Quantization(bits=4)}, schedule=LinearSchedule(steps=4))
    rows = {row.name: row.detail for row in recipe.match(model).rows}
    assert rows["vit.layers.0.attention.q_proj"] == (
        "units are cut out of it along with 'vit.layers.0.attention.o_proj'"
    )
    assert rows["vit.layers.0.mlp.fc1"] == "Quantization(bits=4)"
    expected = output("ViT", model)
    vanishing.prepare(model, recipe)
    assert torch.equal(output("ViT", model), expected)


@pytest.mark.parametrize("make", [lambda: HeadPruning(1.0), lambda: WidthPruning(-0.1)])
def test_a_share_that_leaves_nothing_is_refused(make: Callable[[], vanishing.Compressor]) -> None:
    with pytest.raises(ConfigError, match=r"share of units that vanish, in \[0, 1\)"):
        make()


def test_units_are_no_part_of_a_chain() -> None:
    with pytest.raises(ConfigError, match="then prepare another one"):
        HeadPruning(0.5) | Quantization(bits=4)


def test_a_damaged_shape_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build("ViT")
    prepare("ViT", model, 1).finish(force=True)
    vanishing.save(model, tmp_path / "small")
    other = vit()
    wider = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, **(SIZES | {"intermediate_size": 24}))
    )
    shapes = [tuple(p.shape) for p in wider.parameters()]
    with pytest.raises(vanishing.FileError, match="cannot have the shape"):
        vanishing.load(tmp_path / "small", wider)
    assert [tuple(p.shape) for p in wider.parameters()] == shapes
    vanishing.load(tmp_path / "small", other)


def test_a_block_that_was_cut_is_not_replaced_as_well() -> None:
    model = bert()
    prepare("BERT", model).finish(force=True)
    recipe = vanishing.Recipe({"*.layer.0": vanishing.SkipBlock()}, schedule=vanishing.StepSchedule(at=0))
    with pytest.raises(vanishing.RecipeError, match=r"an earlier transition built .* in it"):
        vanishing.prepare(model, recipe)
