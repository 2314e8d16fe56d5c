"""Ready-made forms of whole blocks: skipped, narrowed and separated ones, on real architectures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision  # type: ignore[import-untyped]
import transformers
from torch import Tensor, nn
from torch.nn import functional

import vanishing
from architectures import ARCHITECTURES, Architecture, images, loss_of
from loops import mlp, states_equal
from test_block_caches import MODELS as LANGUAGE_MODELS
from test_block_caches import prompt, scores
from vanishing import (
    BlockCompressor,
    DepthwiseSeparable,
    LinearSchedule,
    NarrowFeedForward,
    Recipe,
    RecipeError,
    Replace,
    SkipBlock,
    StepSchedule,
)

RESNET = Architecture(lambda: torchvision.models.resnet18(num_classes=10), images)
TIMM_RESNET = Architecture(lambda: timm.create_model("resnet18", num_classes=10), images)


@dataclass(frozen=True)
class Case:
    """An architecture with a rule, and the names of the blocks that it takes."""

    architecture: Architecture
    key: str
    compressor: BlockCompressor
    names: tuple[str, ...]


BERT_LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")
ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
RESNET_BLOCKS = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
RESNET_CONVS = ("layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
LLAMA_MLPS = ("model.layers.0.mlp", "model.layers.1.mlp")


def case(name: str | Architecture, key: str, compressor: BlockCompressor, *names: str) -> Case:
    return Case(ARCHITECTURES[name] if isinstance(name, str) else name, key, compressor, names or (key,))


CASES = {
    "skip_bert": case("bert", "*.layer.?", SkipBlock(), *BERT_LAYERS),
    "skip_bert_attention": case("bert", "bert.encoder.layer.1.attention", SkipBlock()),
    "skip_vit": case("vit", "vit.layers.1", SkipBlock()),
    "skip_llama": case("llama", "model.layers.0", SkipBlock()),
    "skip_mixtral": case("mixtral", "model.layers.1", SkipBlock()),
    "skip_albert": case("albert", "*albert_layers.0", SkipBlock(), ALBERT_LAYER),
    "skip_encoder": case("encoder", "encoder.layers.1", SkipBlock()),
    "skip_timm_vit": case("timm_vit", "*blocks*", SkipBlock(), "blocks.0", "blocks.1"),
    "skip_resnet": case(RESNET, "layer*", SkipBlock(), *RESNET_BLOCKS),
    "skip_timm_resnet": case(TIMM_RESNET, "layer2.?", SkipBlock(), "layer2.1"),
    "skip_convnext": case("timm_convnext", "stages.2.*", SkipBlock(), "stages.2.blocks.0", "stages.2.blocks.1"),
    "narrow_bert": case("bert", "*.layer.?", NarrowFeedForward(ratio=0.25), *BERT_LAYERS),
    "narrow_vit": case("vit", "*.mlp", NarrowFeedForward(ratio=0.5), "vit.layers.0.mlp", "vit.layers.1.mlp"),
    "narrow_llama": case("llama", "*.mlp", NarrowFeedForward(ratio=0.5, calibrated=True), *LLAMA_MLPS),
    "narrow_timm_vit": case("timm_vit", "*", NarrowFeedForward(ratio=0.3), "blocks.0.mlp", "blocks.1.mlp"),
    "separable_resnet": case(RESNET, "layer4.*", DepthwiseSeparable(), *RESNET_CONVS),
    "separable_timm_resnet": case("timm_resnet", "layer1.*", DepthwiseSeparable(), "layer1.0.conv1", "layer1.0.conv2"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def prepared(case: Case) -> tuple[Any, vanishing.Transition]:
    model = case.architecture.build()
    calibrated = case.compressor.observer(model.get_submodule(case.names[0])) is not None
    calibration = [case.architecture.batch(seed) for seed in range(2)] if calibrated else None
    recipe = Recipe({case.key: case.compressor}, schedule=LinearSchedule(steps=4))
    return model, vanishing.prepare(model, recipe, calibration=calibration)


def outputs(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        output: Any = model(**case.architecture.batch(99))
    return output if isinstance(output, Tensor) else output.logits


@each_case
def test_a_rule_takes_the_blocks_that_fit(case: Case) -> None:
    plan = Recipe({case.key: case.compressor}, schedule=LinearSchedule(steps=4)).match(case.architecture.build())
    assert tuple(block.name for block in plan.blocks) == case.names
    assert not plan.problems


@each_case
def test_at_beta_1_nothing_changes_and_at_the_end_the_model_is_small_and_survives_the_file(
    case: Case, tmp_path: Path
) -> None:
    plain = case.architecture.build().eval()
    model, transition = prepared(case)
    model.eval()
    assert torch.equal(outputs(model, case), outputs(plain, case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(5):
        loss_of(model(**case.architecture.batch(step)), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    model.eval()
    expected = outputs(model, case)
    transition.finish()
    assert torch.equal(outputs(model, case), expected)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in plain.parameters())
    vanishing.save(model, tmp_path / "small")
    fresh = None if case.architecture.huggingface else case.architecture.build(1)
    loaded = vanishing.load(tmp_path / "small", fresh).eval()
    assert torch.equal(outputs(loaded, case), expected)
    assert str(vanishing.summary(loaded)) == str(vanishing.summary(model))


@each_case
@pytest.mark.parametrize("split", [1, 3])
def test_a_split_run_changes_no_bit(case: Case, split: int) -> None:
    def run(until: int, state: Any = None) -> Any:
        model, transition = prepared(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        parts = {"model": model, "optimizer": optimizer, "transition": transition}
        for name, part in parts.items() if state else ():
            part.load_state_dict(state[name])
        for step in range(transition.steps_done, until):
            loss_of(model(**case.architecture.batch(step)), step).backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    whole, resumed = run(5), run(5, run(split))
    assert whole["transition"] == resumed["transition"]
    assert states_equal(whole["model"], resumed["model"])


# Skipped blocks


@pytest.mark.parametrize(
    "name, names",
    [
        ("bert", ("bert.encoder.layer.1",)),
        ("vit", ("vit.layers.0", "vit.layers.1")),
        ("llama", ("model.layers.1",)),
        ("gpt2", ("transformer.h.0",)),
        ("timm_vit", ("blocks.1",)),
    ],
)
def test_a_model_with_skipped_blocks_is_the_model_without_them(name: str, names: tuple[str, ...]) -> None:
    architecture = ARCHITECTURES[name]
    model, shorter = architecture.build().eval(), architecture.build().eval()
    for block in reversed(names):
        parent, _, number = block.rpartition(".")
        layers: Any = shorter.get_submodule(parent)
        del layers[int(number)]
    if architecture.huggingface:
        shorter.config.num_hidden_layers -= len(names)  # type: ignore[union-attr,operator]
    vanishing.prepare(model, Recipe(dict.fromkeys(names, SkipBlock()), schedule=StepSchedule(at=0))).finish()
    case = Case(architecture, "", SkipBlock(), ())
    assert torch.equal(outputs(model, case), outputs(shorter, case))


def test_a_skipped_block_of_a_resnet_passes_on_what_it_gets() -> None:
    model = RESNET.build().eval()
    x = torch.relu(torch.randn(2, 64, 8, 8))
    vanishing.prepare(model, Recipe({"layer1.1": SkipBlock()}, schedule=StepSchedule(at=0))).finish()
    assert model.get_submodule("layer1.1")(x) is x


@pytest.mark.parametrize(
    "build, key, reason",
    [
        (RESNET.build, "layer2.0", "so it is not known as a residual block that keeps shapes"),
        (RESNET.build, "layer1", "it is a chain of residual blocks"),
        (ARCHITECTURES["bert"].build, "bert.encoder", "it is a chain of residual blocks"),
        (ARCHITECTURES["llama"].build, "model.layers.0.mlp", "so it is not known as a residual block"),
        (ARCHITECTURES["llama"].build, "model.norm", "so it is not known as a residual block"),
        (ARCHITECTURES["t5"].build, "encoder.block.0", "so it is not known as a residual block"),
        (mlp, "0", "so it is not known as a residual block"),
        (mlp, "1", "so it is not known as a residual block"),
        (ARCHITECTURES["bert"].build, "*", "would take out every residual block, 2 modules"),
    ],
)  # fmt: skip
def test_what_is_no_residual_block_is_not_skipped(build: Callable[[], nn.Module], key: str, reason: str) -> None:
    model = build()
    with pytest.raises(RecipeError, match=re.escape(reason)):
        vanishing.prepare(model, Recipe({key: SkipBlock()}, schedule=StepSchedule(at=0)))


SKIPPED = {
    "llama_layers": (["model.layers.0"], ["model.layers.1"], ["model.layers.0", "model.layers.2"]),
    "gemma2_layers": (["model.layers.0"], ["model.layers.1"]),
    "gpt2_layers": (["transformer.h.0"],),
    "qwen3_next_layers": (["model.layers.0"], ["model.layers.2"]),
    "bart_layers": (["model.decoder.layers.0"],),
}


@pytest.mark.parametrize("steps_done", [2, 4])
@pytest.mark.parametrize(
    "name, skipped", [pytest.param(n, each, id=f"{n}-{'-'.join(each)}") for n in SKIPPED for each in SKIPPED[n]]
)
def test_a_language_model_with_skipped_layers_generates_with_a_cache(
    name: str, skipped: list[str], steps_done: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[name][0]().eval()
    recipe = Recipe(dict.fromkeys(skipped, SkipBlock()), schedule=LinearSchedule(steps=4))
    transition = vanishing.prepare(model, recipe)
    transition.seek(steps_done)
    expected = scores(model, use_cache=False)
    torch.testing.assert_close(scores(model), expected, rtol=1e-3, atol=1e-4)
    if steps_done < 4:
        return
    transition.finish()
    vanishing.save(model, tmp_path / "small")
    for each in (model, vanishing.load(tmp_path / "small")):
        torch.testing.assert_close(scores(each), expected, rtol=1e-3, atol=1e-4)
    if name != "qwen3_next_layers":
        beams = [
            model.generate(**prompt(), num_beams=3, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*beams)
    if name == "llama_layers":
        static = scores(model, cache_implementation="static", disable_compile=True)
        torch.testing.assert_close(static, expected, rtol=1e-3, atol=1e-4)


def test_a_skipped_layer_keeps_the_settings_that_the_model_reads() -> None:
    model = LANGUAGE_MODELS["llama_layers"][0]()
    vanishing.prepare(model, Recipe({"model.layers.1": SkipBlock()}, schedule=StepSchedule(at=0))).finish()
    assert model.model.layers[1].hidden_size == model.config.hidden_size
    assert not list(model.model.layers[1].parameters())
    copied = copy.deepcopy(model.eval())
    ids = prompt()["input_ids"]
    assert torch.equal(copied(ids).logits, model(ids).logits)


# Narrow feed-forwards


def _feed_forward() -> Any:
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=4)
    torch.manual_seed(0)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)


def test_a_narrow_feed_forward_starts_from_the_largest_units() -> None:
    block = _feed_forward()
    with torch.no_grad():
        block.up_proj.weight[10:] *= 1e-6
    narrow = NarrowFeedForward(ratio=0.25).build(block)
    x = torch.randn(3, 16)
    torch.testing.assert_close(narrow(x), block(x), rtol=1e-4, atol=1e-5)
    assert narrow.up_proj.weight.shape == (10, 16) and narrow.down_proj.in_features == 10  # type: ignore[union-attr]
    assert block.up_proj.weight.shape == (40, 16)
    assert narrow.config is block.config and not {id(p) for p in narrow.parameters()} & {
        id(p) for p in block.parameters()
    }


def test_what_is_around_the_feed_forward_of_a_bert_layer_is_shared() -> None:
    model = ARCHITECTURES["bert"].build()
    before = {id(p) for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = Recipe({"*.layer.0": NarrowFeedForward(ratio=0.5)}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer)
    block: Any = model.get_submodule("bert.encoder.layer.0")
    assert block.replacement.attention is block.original.attention
    assert block.replacement.output.LayerNorm is block.original.output.LayerNorm
    assert len({id(p) for p in model.parameters()} - before) == 4
    transition.seek(2)
    transition.finish()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_calibrated_feed_forward_is_the_least_squares_fit_to_the_original() -> None:
    block = _feed_forward()
    model = nn.Sequential(block)
    mixed = torch.randn(6, 16)
    batches = [torch.randn(64, 6) @ mixed for _ in range(3)]
    recipe = Recipe({"0": NarrowFeedForward(ratio=0.3, calibrated=True)}, schedule=StepSchedule(at=0))
    vanishing.prepare(model, recipe, calibration=batches)
    x = torch.cat(batches)
    with torch.no_grad():
        units = functional.silu(block.gate_proj(x)) * block.up_proj(x)
        expected, got = block(x), model(x)
        scores = units.square().mean(0) * block.down_proj.weight.square().sum(0)
        kept = units[:, scores.topk(12).indices.sort().values]
        fitted = kept @ torch.linalg.lstsq(kept, expected).solution
        plain = NarrowFeedForward(ratio=0.3).build(block)(x)
    best, error = (fitted - expected).square().mean(), (got - expected).square().mean()
    assert best <= error <= 1.05 * best
    assert error < 0.7 * (plain - expected).square().mean()


@pytest.mark.parametrize("key", ["model.layers.0", "model.layers.0.self_attn", "lm_head"])
def test_what_is_no_feed_forward_is_not_narrowed(key: str) -> None:
    recipe = Recipe({key: NarrowFeedForward(ratio=0.5)}, schedule=StepSchedule(at=0))
    with pytest.raises(RecipeError, match="it is no feed-forward block of a kind that is known"):
        vanishing.prepare(ARCHITECTURES["llama"].build(), recipe)


def test_hooks_of_a_narrowed_block_run_once() -> None:
    model, calls = nn.Sequential(_feed_forward()), list[int]()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    recipe = Recipe({"0": NarrowFeedForward(ratio=0.5)}, schedule=StepSchedule(at=0))
    transition = vanishing.prepare(model, recipe)
    model(torch.randn(2, 16))
    transition.finish()
    model(torch.randn(2, 16))
    assert calls == [1, 1]


# Separable convolutions


def test_a_separable_convolution_that_was_one_comes_back() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"}
    conv = nn.Conv2d(6, 10, 3, **options)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(10, 6, 1, 1) * torch.randn(1, 6, 3, 3))
    x = torch.randn(2, 6, 12, 12)
    torch.testing.assert_close(DepthwiseSeparable().build(conv)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_separable_convolution_starts_from_the_best_of_its_kind() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, (3, 2), bias=False)
    separable: Any = DepthwiseSeparable().build(conv)
    weight = separable.pointwise.weight * separable.depthwise.weight.transpose(0, 1)
    error = (weight - conv.weight).square().sum((0, 2, 3))
    sizes = torch.linalg.svdvals(conv.weight.flatten(2).transpose(0, 1))
    torch.testing.assert_close(error, sizes[:, 1:].square().sum(1))


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(4, 8, 1), "would not be smaller"),
        (nn.Conv2d(4, 8, 3, groups=2), "it has 2 groups already"),
        (nn.Conv2d(4, 1, 3), "would not be smaller"),
        (nn.Linear(4, 8), "it is no plain Conv2d"),
        (nn.Conv1d(4, 8, 3), "it is no plain Conv2d"),
    ],
)
def test_what_cannot_be_separated_is_left(layer: nn.Module, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        vanishing.prepare(nn.Sequential(layer), Recipe({"0": DepthwiseSeparable()}, schedule=StepSchedule(at=0)))


# Plans


def test_blocks_that_do_not_fit_are_in_the_plan_with_the_reason() -> None:
    plan = Recipe({"layer*.?": SkipBlock()}, schedule=LinearSchedule(steps=2)).match(RESNET.build())
    assert [row.name for row in plan.rows if row.outcome == "compress"] == list(RESNET_BLOCKS)
    assert not plan.problems


@pytest.mark.parametrize("compressor", [SkipBlock(), NarrowFeedForward(ratio=0.5), DepthwiseSeparable()])
def test_a_block_that_changed_its_kind_cannot_be_rebuilt(compressor: BlockCompressor) -> None:
    with pytest.raises(vanishing.ConfigError, match="Linear"):
        compressor.build(nn.Linear(2, 2))


def test_short_form() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    transition = vanishing.prepare(model, DepthwiseSeparable(), steps=2)
    transition.seek(2)
    transition.finish()
    assert [type(layer) for layer in model] == [nn.Sequential, nn.ReLU, nn.Sequential]


# What a block multiplies


def test_the_products_of_a_block_are_those_of_its_layers() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 2)
    )
    replacement = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    recipe = Recipe({"1": Replace(lambda _: replacement, name="of products")}, schedule=StepSchedule(at=1))
    transition = vanishing.prepare(model, recipe)
    x = torch.randn(5, 6)
    for inputs, positions in ((None, 1), (x, 5)):
        row = vanishing.summary(model, inputs).rows[1]
        assert (row.before.multiply_accumulates, row.after.multiply_accumulates) == (256 * positions, 64 * positions)
    assert transition.beta == 1 and model[1].beta == 1
    transition.step()
    transition.finish()
    for inputs, positions in ((None, 1), (x, 5)):
        report = vanishing.summary(model, inputs)
        assert report.rows[1].after.multiply_accumulates == 64 * positions
        assert report.after.multiply_accumulates == (48 + 64 + 16) * positions
        assert report.rows[1].before.multiply_accumulates is None


def test_a_skipped_block_multiplies_nothing() -> None:
    model = RESNET.build()
    transition = vanishing.prepare(model, Recipe({"layer1.0": SkipBlock()}, schedule=StepSchedule(at=0)))
    x = images()["x"]
    (row,) = [row for row in vanishing.summary(model, x).rows if row.name == "layer1.0"]
    assert row.before.multiply_accumulates == 2 * 64 * 64 * 9 * 4 * 8 * 8 and row.after.multiply_accumulates == 0
    transition.finish()
    (row,) = [row for row in vanishing.summary(model, x).rows if row.name == "layer1.0"]
    assert row.after.multiply_accumulates == 0 == row.after.parameters < row.before.parameters
