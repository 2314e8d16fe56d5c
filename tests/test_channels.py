"""Channels that vanish inside of blocks: which are found, what is cut with them, and what comes back from a file."""

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

import vanishing
from vanishing import ChannelPruning, LinearSchedule, Quantization, Recipe, RecipeError, StepSchedule

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HALF = Recipe({"*": ChannelPruning(0.5)}, schedule=LinearSchedule(steps=4))

# Each with the number of places where channels go from one convolution of a block to the next.
MODELS = {
    "resnet18": 8,
    "resnet50": 32,
    "seresnet50": 32,
    "resnetv2_50": 32,
    "mobilenetv2_100": 16,
    "mobilenetv3_small_100": 10,
    "efficientnet_lite0": 15,
}
SMALL: dict[str, Any] = {
    "resnet18": {"channels": (8, 16, 24, 32), "stem_width": 8},
    "resnet50": {"channels": (8, 16, 24, 32), "stem_width": 8},
    "mobilenetv3_small_100": {},
}


def build(name: str, **options: Any) -> nn.Module:
    """A model of timm whose scales and statistics are not those of a fresh one: some of these are zero."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
                assert module.running_mean is not None
                module.running_mean.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_of_a_real_network_computes_what_it_computed_without_the_channels(name: str) -> None:
    model = build(name)
    transition = vanishing.prepare(model, HALF)
    blended = [name for name, module in model.named_modules() if type(module).__name__.startswith("Parametrized")]
    with_gates = [name for name in blended if "conv_reduce" in name]
    assert len(blended) - len(with_gates) == MODELS[name]
    with transition.compressed(), torch.no_grad():
        expected = model(IMAGES)
    finished = transition.finish(force=True)
    with torch.no_grad():
        got = finished(IMAGES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_a_trained_and_finished_model_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    model = build(name, **SMALL[name])
    transition = vanishing.prepare(model, HALF)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(5):
        model(IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    model.eval()
    with torch.no_grad():
        expected = model(IMAGES)
        transition.finish()
        finished = model(IMAGES)
    torch.testing.assert_close(finished, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    # The optimizer goes on with what is left, also of layers that were cut on both sides.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model.train()(IMAGES).square().mean().backward()
    optimizer.step()
    model.eval()

    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build(name, **SMALL[name]))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert str(loaded) == str(model)
    assert vanishing.summary(loaded, IMAGES) == vanishing.summary(model, IMAGES)


@pytest.mark.parametrize("name", SMALL)
def test_at_beta_1_no_output_and_no_gradient_changes(name: str) -> None:
    plain, model = (build(name, **SMALL[name]).train() for _ in range(2))
    transition = vanishing.prepare(model, HALF)
    torch.manual_seed(1)
    expected = plain(IMAGES)
    torch.manual_seed(1)
    got = model(IMAGES)
    assert torch.equal(expected, got)
    expected.square().sum().backward()
    got.square().sum().backward()
    transition.cancel()
    for (path, one), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), path


@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_a_network_of_transformers_comes_back_from_its_folder_alone(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer)
    model = transformers.ResNetForImageClassification(config).eval()
    whole = sum(p.numel() for p in model.parameters())
    transition = vanishing.prepare(model, HALF)
    with transition.compressed(), torch.no_grad():
        expected = model(IMAGES).logits
    transition.finish(force=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).logits, expected, rtol=1e-4, atol=1e-6)
        assert sum(p.numel() for p in model.parameters()) < 0.7 * whole
        vanishing.save(model, tmp_path / "small")
        assert torch.equal(vanishing.load(tmp_path / "small")(IMAGES).logits, model(IMAGES).logits)


def basic_block() -> Any:
    model: Any = build("resnet18", **SMALL["resnet18"])
    return model.layer2[0]


def test_the_blend_is_that_of_the_convolution_that_takes_the_channels_up() -> None:
    block = basic_block().double()
    model = nn.Sequential(block)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    scores = block.bn1.weight.abs() * block.conv2.weight.flatten(2).norm(dim=(0, 2))
    kept = scores.topk(8).indices.sort().values
    hidden = torch.relu(block.bn1(block.conv1(x)))
    original = nn.functional.conv2d(hidden, block.conv2.weight, padding=1)
    small = nn.functional.conv2d(hidden[:, kept], block.conv2.weight[:, kept], padding=1)
    expected = torch.relu(block.bn2(0.25 * original + 0.75 * small) + block.downsample(x))
    transition = vanishing.prepare(model, HALF)
    transition.seek(3)
    torch.testing.assert_close(block(x), expected)
    transition.finish(force=True)
    torch.testing.assert_close(block(x), torch.relu(block.bn2(small) + block.downsample(x)))


def test_statistics_are_cut_along_with_the_channels() -> None:
    block = basic_block()
    norm = block.bn1
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    kept = (norm.weight.abs() * block.conv2.weight.flatten(2).norm(dim=(0, 2))).topk(8).indices.sort().values
    vanishing.prepare(nn.Sequential(block), HALF).finish(force=True)
    assert norm.num_features == 8
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name][kept]), name
    assert (block.conv1.out_channels, block.conv2.in_channels, block.conv2.out_channels) == (8, 8, 16)


def test_a_depthwise_block_with_squeeze_and_excitation_is_cut_through() -> None:
    model: Any = build("mobilenetv3_small_100")
    block = model.blocks[3][0]
    wide, squeezed = block.conv_pw.out_channels, block.se.conv_reduce.out_channels
    vanishing.prepare(model, HALF).finish(force=True)
    half = wide // 2
    assert (block.conv_pw.out_channels, block.bn1.num_features, block.bn2.num_features) == (half, half, half)
    assert (block.conv_dw.in_channels, block.conv_dw.out_channels, block.conv_dw.groups) == (half, half, half)
    assert (block.se.conv_reduce.in_channels, block.se.conv_reduce.out_channels) == (half, squeezed)
    assert (block.se.conv_expand.in_channels, block.se.conv_expand.out_channels) == (squeezed, half)
    assert block.conv_pwl.in_channels == half


def test_products_are_those_counted_by_hand() -> None:
    """Of a whole ResNet-18 at 32 x 32: stages of 8, 4, 2 and 1 positions a side behind the stem."""
    model = build("resnet18")
    sizes, sides = (64, 128, 256, 512), (8, 4, 2, 1)

    def by_hand(share: float) -> int:
        total = 3 * 64 * 49 * 16**2 + 512 * 5
        before = 64
        for size, side in zip(sizes, sides, strict=True):
            inner = int(size * share)
            total += (before + 3 * size) * inner * 9 * side**2
            total += before * size * side**2 if before != size else 0
            before = size
        return total

    assert vanishing.summary(model, IMAGES[:1]).after.multiply_accumulates == by_hand(1)
    vanishing.prepare(model, HALF).finish(force=True)
    sums = vanishing.summary(model, IMAGES[:1])
    assert sums.before.multiply_accumulates == by_hand(1)
    assert sums.after.multiply_accumulates == by_hand(0.5)


def plain_network(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))


class Doubled(nn.Module):
    """A block whose channels between the convolutions also go around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x)
        result: Tensor = between + self.second(between)
        return result


class Unused(Doubled):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x)
        return result


class Sized(Doubled):
    """A block that takes more than an image."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self.second(self.first(x)) * scale
        return result


def shared() -> nn.Module:
    first = nn.Conv2d(4, 4, 1)
    return nn.Sequential(*(nn.Sequential(first, nn.Conv2d(4, 4, 1)) for _ in range(2)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(Doubled()), "Doubled does not follow when channels are cut out"),
        (lambda: nn.Sequential(Unused()), "the outputs of Unused do not depend on them"),
        (lambda: nn.Sequential(Sized()), "Sized cannot be tried: it takes something else than images of 4 channels"),
        (lambda: plain_network(nn.GroupNorm(2, 8)), "Sequential does not follow when channels are cut out"),
        (lambda: plain_network(nn.PReLU(8)), "Sequential does not follow when channels are cut out"),
        (shared, "other blocks use it too"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "takes up no inner channels"),
        (lambda: nn.Sequential(nn.Conv2d(4, 1, 3), nn.Conv2d(1, 4, 3)), "none would vanish"),
    ],
)
def test_where_channels_cannot_be_taken_out_nothing_is_changed(model: Callable[[], nn.Module], message: str) -> None:
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        vanishing.prepare(built, HALF)
    after = built.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_plan_says_what_is_cut_along_and_why_the_rest_is_left() -> None:
    model = nn.ModuleDict({"good": plain_network(nn.BatchNorm2d(8)), "bad": Doubled()})
    rows = {row.name: (row.outcome, row.detail) for row in HALF.match(model).rows}
    assert rows["good.3"] == ("compress", "ChannelPruning(sparsity=0.5)")
    assert rows["good.0"] == rows["good.1"] == ("compress", "units are cut out of it along with 'good.3'")
    assert rows["bad.second"][0] == "left" and "Doubled does not follow" in rows["bad.second"][1]


def test_a_chain_of_convolutions_is_cut_on_both_sides(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.Conv1d(6, 2, 3)
        )

    model, x = make().eval(), torch.randn(2, 2, 12)
    transition = vanishing.prepare(model, HALF)
    with transition.compressed():
        expected = model(x)
    transition.finish(force=True)
    torch.testing.assert_close(model(x), expected)
    assert tuple(model.get_submodule("3").weight.shape) == (3, 4, 3)  # type: ignore[arg-type]
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", make().eval())
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "second",
    [
        Quantization(bits=4),
        vanishing.LowRank(ratio=0.5),
        vanishing.LowRank(ratio=0.5, split=vanishing.Split.SPATIAL),
        vanishing.LowRank(ratio=0.5, split=vanishing.Split.TUCKER),
        ChannelPruning(0.25),
    ],
)
def test_a_narrow_model_is_compressed_again(second: vanishing.Compressor, tmp_path: Path) -> None:
    options = SMALL["resnet50"]
    model = build("resnet50", **options)
    vanishing.prepare(model, HALF).finish(force=True)
    once = vanishing.Recipe({"*layer*": second}, schedule=StepSchedule(at=0))
    vanishing.prepare(model, once).finish(force=True)
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build("resnet50", **options))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    whole = vanishing.summary(build("resnet50", **options), IMAGES).after.multiply_accumulates
    assert vanishing.summary(loaded, IMAGES).before.multiply_accumulates == whole


def test_a_resumed_run_changes_no_bit() -> None:
    def start(seed: int) -> tuple[nn.Module, vanishing.Transition, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = timm.create_model("resnet18", num_classes=5, **SMALL["resnet18"])
        return model, vanishing.prepare(model, HALF), torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(run: tuple[nn.Module, vanishing.Transition, torch.optim.Optimizer], steps: int) -> None:
        model, transition, optimizer = run
        for _ in range(steps):
            model(IMAGES).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()

    whole, split = start(0), start(1)
    train(whole, 2)
    mine: Any
    theirs: Any
    for mine, theirs in zip(split, whole, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(whole, 3)
    train(split, 3)
    for run in (whole, split):
        run[1].finish()
    for one, other in zip(whole[0].state_dict().values(), split[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_network_is_traced_once_while_beta_moves() -> None:
    model = build("mobilenetv3_small_050")
    transition = vanishing.prepare(model, HALF)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
            transition.step()
    torch._dynamo.reset()


def test_local_losses_see_every_layer_that_takes_channels_up() -> None:
    model = build("mobilenetv3_small_050")
    recipe = Recipe({"*": ChannelPruning(0.5)}, schedule=LinearSchedule(steps=4), distillation=[vanishing.LocalLoss()])
    transition = vanishing.prepare(model, recipe)
    transition.seek(2)
    model.train()(IMAGES)
    loss = transition.auxiliary_loss()
    assert float(loss.detach()) > 0
    loss.backward()
    transition.finish(force=True)


def test_a_damaged_shape_of_a_convolution_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build("resnet18", **SMALL["resnet18"])
    vanishing.prepare(model, HALF).finish(force=True)
    vanishing.save(model, tmp_path / "small")
    other = build("resnet18", channels=(2, 4, 6, 8), stem_width=8)
    text = str(other)
    with pytest.raises(vanishing.FileError, match="cannot have the shape"):
        vanishing.load(tmp_path / "small", other)
    assert str(other) == text
