"""Every mistake of a user: what the message says, and that nothing was changed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

import vanishing
from loops import batch, copied, mlp, states_equal, train
from vanishing import (
    NM,
    Binary,
    Compressor,
    ConfigError,
    Global,
    Gradient,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    PerTensor,
    Quantization,
    Recipe,
    RecipeError,
    Replace,
    Rule,
    StepSchedule,
    Ternary,
    Transition,
    TransitionError,
    VanishingError,
)
from vanishing.optimizers import _watches

FADE = LinearSchedule(steps=4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(256, 128)
        self.norm = nn.LayerNorm(128)
        self.fc2 = nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.norm(self.fc1(x)).relu())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 256)
        self.encoder = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.encoder:
            x = block(x)
        return self.classifier(x)


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a process and a model that a refused `prepare` must leave as it was, but for the values."""
    modules = list(model.named_modules(remove_duplicate=False))
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return {
        "classes": [(name, type(module)) for name, module in modules],
        "modes": [module.training for _, module in modules],
        "attributes": [sorted(vars(module)) for _, module in modules],
        "identities": [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        "hooks": [len(vars(module)[name]) for _, module in modules for name in hooks],
        "gradients": [p.grad is None for p in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state())),
    }


def wrong(value: Any) -> Any:
    """A value of a wrong type, on purpose."""
    return value


def technique(compressor: object) -> str:
    return type(compressor).__name__


def values(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return copied({name: t for name, t in tensors if not is_lazy(t) and not t.is_meta})


def refused(model: nn.Module, recipe: Any, *facts: str, error: type[Exception] = RecipeError, **keywords: Any) -> str:
    """Return the message with which `prepare` refuses; it holds all facts, and the model is what it was."""
    before, bits, watching = everything(model), values(model), len(_watches)
    with pytest.raises(error) as caught:
        vanishing.prepare(model, recipe, **keywords)
    assert everything(model) == before
    # Fewer if an earlier transition was collected meanwhile.
    assert len(_watches) <= watching
    assert states_equal(values(model), bits)
    message = str(caught.value)
    for fact in facts:
        assert fact in message
    return message


def rules(rules: dict[Any, Any], **options: Any) -> Recipe:
    return Recipe(rules, schedule=FADE, **options)


# Patterns and rules


def test_nothing_matched_shows_the_nearest_names() -> None:
    message = refused(Encoder(), rules({"encodr.*.fc1": Binary()}), "nothing matched 'encodr.*.fc1'", "'encoder.0.fc1'")
    assert "ignore" not in message
    refused(Encoder(), rules({"*.clasifier": Binary()}), "nothing matched '*.clasifier'", "'classifier'")
    refused(
        Encoder(), rules({re.compile(r"\.fc3$"): Binary()}), r"nothing matched re.compile('\\.fc3$')", "'encoder.0.fc2'"
    )
    refused(
        Encoder(), rules({nn.Conv2d: Binary()}), "nothing matched torch.nn.modules.conv.Conv2d", "Recipe.match(model)"
    )
    refused(Encoder(), rules({nn.Bilinear: Binary()}), "The nearest types are torch.nn.modules.linear.Linear")
    refused(Encoder(), rules({"zzzz": Binary()}), "nothing matched 'zzzz'. Recipe.match(model) lists all layers.")


def nothing_at_all(name: str, module: nn.Module) -> bool:
    return False


def test_a_predicate_that_matches_nothing_is_named() -> None:
    refused(Encoder(), rules({nothing_at_all: Binary()}), "nothing matched the predicate 'nothing_at_all'")


def test_everything_ignored_reads_differently() -> None:
    message = refused(
        Encoder(),
        rules({"encoder.*": Binary()}, ignore=["encoder"]),
        "everything that 'encoder.*' matched was ignored (4 modules). Narrow `ignore`, or drop the rule.",
    )
    assert "nothing matched" not in message


def test_mixed_says_why_each_module_was_not_taken() -> None:
    message = refused(
        Encoder(),
        rules({"*e[mn]*": Binary()}, ignore=["*fc?"]),
        "of what '*e[mn]*' matched, the recipe ignores 4 modules, and Binary can take none of the others",
        "embedding (Embedding): an embedding is compressed only if a rule gives its type or exact name",
    )
    assert "nothing matched" not in message
    assert "everything" not in message


def test_a_container_named_for_a_weight_technique_points_at_the_layers_below() -> None:
    refused(
        Encoder(),
        rules({"encoder": Binary()}),
        "'encoder' matched 1 module, none of which Binary can take",
        "it is not a layer with a weight that can be compressed, or write 'encoder.*' for the layers below",
    )


def test_a_rule_shadowed_by_an_earlier_one() -> None:
    refused(
        Encoder(),
        rules({"*": Binary(), "*.fc1": LowRank(rank=4)}),
        "'*.fc1' matched only modules that an earlier rule takes, so LowRank(rank=4) has nothing left to do",
        "Put this rule first, or drop it.",
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_rule_for_what_is_inside_of_a_replaced_block(order: int) -> None:
    both = {"encoder.0": Replace(lambda block: nn.Linear(256, 256), name="factory 1"), "encoder.0.fc1": Binary()}
    refused(
        Encoder(),
        rules(dict(list(both.items())[::order])),
        "'encoder.0.fc1' matched 1 module, none of which Binary can take",
        "encoder.0.fc1 (Linear): it is inside a block that is replaced as a whole",
    )


def test_all_problems_come_in_one_error() -> None:
    model = Encoder()
    with torch.no_grad():
        model.get_parameter("encoder.0.fc2.weight")[0, 0] = torch.nan
    model.get_submodule("encoder.1.fc2").requires_grad_(False)
    message = refused(
        model,
        rules({"*.fc1": LowRank(rank=512), "*.fc2": Binary(), "decoder.*": Ternary(), "encoder": Replace(nn.Identity)}),
        "the recipe does not fit the model, for 7 reasons:\n  - ",
        "LowRank(rank=512) cannot compress 'encoder.0.fc1' (Linear 256 -> 128): rank is at most 128",
        "LowRank(rank=512) cannot compress 'encoder.1.fc1' (Linear 256 -> 128): rank is at most 128",
        "Binary() cannot compress 'encoder.0.fc2' (Linear): its weights contain NaN or infinite values",
        "Binary() cannot compress 'encoder.1.fc2' (Linear): all its weights are frozen",
        "nothing matched 'decoder.*'. The nearest names are 'encoder",
        "encoder (ModuleList): it only holds other modules and is never called",
        "calibration batches were given, but no technique of the recipe looks at activations",
        calibration=[batch()],
    )
    assert message.count("\n  - ") == 7


# What a technique cannot do with a layer


def test_rank_too_high_reads_as_the_style_guide_says() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList([Block()])

    message = refused(Model(), rules({"*.fc1": LowRank(rank=512)}))
    assert message == (
        "LowRank(rank=512) cannot compress 'encoder.0.fc1' (Linear 256 -> 128): rank is at most 128. "
        "Lower it, or add the layer to ignore."
    )


def test_groups_of_weights_that_do_not_divide_the_fan_in() -> None:
    refused(
        nn.Sequential(nn.Linear(10, 4)),
        rules({"*": MagnitudePruning(granularity=NM(n=2, m=4))}),
        "MagnitudePruning(granularity=NM()) cannot compress '0' (Linear 10 -> 4): its fan-in of 10 is not a multiple",
        "Add the layer to ignore",
    )


@pytest.mark.parametrize("option, fact", [("max_norm", "max_norm"), ("sparse", "sparse gradients")])
def test_embeddings_that_change_their_own_weight(option: str, fact: str) -> None:
    options: dict[str, Any] = {option: True if option == "sparse" else 1.0}
    model = nn.Sequential(nn.Embedding(10, 8, **options), nn.Linear(8, 2))
    refused(model, rules({nn.Embedding: Binary()}), "Binary() cannot compress '0' (Embedding 8 -> 10)", fact, "Set ")


@pytest.mark.parametrize(
    "model, compressor",
    [
        (nn.Linear(4, 4), LowRank(rank=1)),
        (nn.Linear(4, 4), Replace(nn.Identity)),
        (nn.Sequential(nn.Linear(4, 4)), Replace(nn.Identity)),
    ],
    ids=["a layer into factors", "a layer", "a container"],
)
def test_the_whole_model_cannot_be_replaced(model: nn.Module, compressor: Compressor) -> None:
    recipe = rules({lambda name, module: name == "": compressor})
    refused(
        model, recipe, "cannot compress the model itself (", "the whole model has no place to be replaced in. Wrap it"
    )


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class CountingDoubled(Doubled):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(4).eval()

    def forward(self, input: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return self.norm(super().forward(input))


class NotANumber(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.nan


class Talkative(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


@pytest.mark.parametrize("kind", [Doubled, CountingDoubled, NotANumber, Talkative])
def test_a_subclass_with_a_function_of_its_own_is_not_factored(kind: type[nn.Linear]) -> None:
    refused(
        nn.Sequential(nn.Linear(4, 4), kind(4, 4)),
        rules({"*": LowRank(rank=2)}),
        f"LowRank(rank=2) cannot compress '1' ({kind.__name__} 4 -> 4): {kind.__name__} does not compute what the "
        "plain layer with its weight computes",
        "Add it to ignore",
    )


def test_a_forward_patched_on_the_object() -> None:
    model = mlp()
    model[0].forward = lambda x: x
    refused(model, rules({"0": LowRank(rank=2)}), "its forward was patched on the object", "Remove the patch first")


def test_a_weight_tied_to_a_layer_that_no_rule_takes() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10))
    model[1].weight = model[0].weight
    refused(model, rules({"*": Binary()}), "its weight is tied to '0', which no rule takes: name both")
    refused(model, rules({"1": Binary(), "0": Ternary()}), "which another rule compresses. Use one rule for all")
    refused(model, rules({"?": Binary(), "0": LowRank(rank=2)}), "Use one rule for all")
    refused(model, rules({nn.Module: LowRank(rank=2)}), "its weight is tied to '1', and factors cannot be shared so")


def test_a_tied_embedding_is_checked_wherever_it_stands() -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.Embedding(10, 8, sparse=True))
    model[1].weight = model[0].weight
    refused(model, rules({nn.Module: Binary()}), "sparse gradients")


# The state of the weights


def test_lazy_and_meta_modules() -> None:
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    refused(lazy, rules({"*": Binary()}), "'1' (LazyLinear): it is lazy and has no weights yet", "Run one batch")
    block = nn.Sequential(nn.Sequential(nn.LazyLinear(4)))
    refused(block, rules({"0": Replace(nn.Identity)}), "cannot compress '0' (Sequential): it is lazy")
    with torch.device("meta"):
        meta = mlp()
    refused(
        meta,
        rules({"0": Binary()}),
        "Binary() cannot compress '0' (Linear): its weights are on the meta device",
        "Load",
    )
    refused(meta, rules({"0": LowRank(rank=2)}), "its weights are on the meta device")
    refused(meta, rules({"0": Replace(nn.Identity)}), "its weights are on the meta device")


def test_a_frozen_model_and_a_frozen_layer() -> None:
    model = mlp().requires_grad_(False)
    message = refused(
        model, rules({"*": LowRank(rank=2)}), "all its weights are frozen. Call requires_grad_(True) on it"
    )
    assert "'0'" in message and "'2'" in message
    model[0].requires_grad_(True)
    message = refused(model, rules({"*": Binary()}), "'2' (Linear): all its weights are frozen", "or add it to ignore")
    assert "'0'" not in message
    refused(model, rules({"2": Replace(nn.Identity)}), "'2' (Linear): all its weights are frozen")
    vanishing.prepare(model, rules({"*": Binary()}, ignore=["2"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("compressor", [Binary(), LowRank(rank=2), Replace(nn.Identity)], ids=technique)
def test_weights_that_are_no_numbers(value: float, compressor: Compressor) -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 3] = value
    refused(
        model, rules({"2": compressor}), "'2' (Linear): its weights contain NaN or infinite values", "sound checkpoint"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_numbers(dtype: torch.dtype) -> None:
    model = mlp()
    weight = model.get_parameter("0.weight").detach()
    model[0].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    refused(model, rules({"*": Binary()}), f"'0' (Linear): its weights are {dtype}, not floating", "Add it to ignore")


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "wrap, fact",
    [
        (
            parametrizations.spectral_norm,
            "its weight is parametrized by _SpectralNorm. Remove that first",
        ),
        (parametrizations.weight_norm, "its weight is parametrized by _WeightNorm. Remove that first"),
        (old_weight_norm, "it has no parameter 'weight' of its own"),
    ],
)
def test_weights_that_something_else_computes(wrap: Callable[[nn.Module], nn.Module], fact: str) -> None:
    model = mlp()
    wrap(model[0])
    for compressor in (Binary(), LowRank(rank=2)):
        refused(model, rules({"*": compressor}), f"cannot compress '0' (Linear): {fact}")


def test_a_block_whose_weight_a_hook_computes() -> None:
    model = mlp()
    old_weight_norm(model[0])
    refused(
        model, rules({"0": Replace(nn.Identity)}), "a hook of WeightNorm on it computes its weight. Remove that first"
    )


# Prepared twice


@pytest.mark.parametrize(
    "first, where",
    [
        (Binary(), "'0', '2'"),
        (LowRank(rank=2), "'0', '2'"),
        (Rule(Replace(lambda b: nn.Linear(8, 16), name="factory 2")), "'0'"),
    ],
    ids=["weights", "factors", "block"],
)
@pytest.mark.parametrize("second", [Binary(), LowRank(rank=2), Replace(nn.Identity)], ids=technique)
def test_prepared_twice(first: Any, where: str, second: Compressor) -> None:
    model = mlp()
    transition = vanishing.prepare(model, rules({"0" if isinstance(first, Rule) else "*": first}))
    message = refused(model, rules({"*": second}))
    assert message == f"the model is in a transition already, at {where}. Finish or cancel that one first."
    train(model, transition, 4)
    transition.finish()


def test_prepared_twice_names_three_places_and_counts_the_rest() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    vanishing.prepare(model, Binary(), steps=2)
    refused(model, rules({"*": Binary()}), "at '0', '1', '2' and 2 more.")


# Arguments


@pytest.mark.parametrize(
    "arguments, keywords, fact",
    [
        ((mlp(), "prune"), {}, "prepare: expected a Recipe or a compressor such as LowRank(rank=16), got 'prune'"),
        ((mlp(), {"*": Binary()}), {}, "prepare: expected a Recipe or a compressor"),
        ((mlp(), Binary), {"steps": 3}, "prepare: expected a Recipe or a compressor"),
        ((mlp(), Binary()), {}, "prepare: Binary() needs steps=, the length of its fade in optimizer steps"),
        ((mlp(), rules({"*": Binary()})), {"steps": 3}, "prepare: a Recipe holds its own schedule and ignore"),
        ((mlp(), rules({"*": Binary()})), {"ignore": ["0"]}, "prepare: a Recipe holds its own schedule and ignore"),
        (([mlp()], Binary()), {"steps": 3}, "expected the model as an nn.Module, got list"),
        ((mlp(), Binary()), {"steps": 3, "optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer, got 'adam'"),
    ],
)
def test_arguments_of_the_wrong_type(arguments: tuple[Any, ...], keywords: dict[str, Any], fact: str) -> None:
    with pytest.raises(TypeError, match=re.escape(fact)):
        vanishing.prepare(*arguments, **keywords)


@pytest.mark.parametrize("steps", [0, -1, "10", 1.5, True])
def test_steps_that_are_no_number_of_steps(steps: Any) -> None:
    message = refused(mlp(), Binary(), error=ConfigError, steps=steps)
    assert message.startswith(
        f"LinearSchedule(steps={steps!r}): steps is the length of the fall in optimizer steps, at least 1"
    )


@pytest.mark.parametrize(
    "make, facts",
    [
        (lambda: MagnitudePruning(1.5), ["MagnitudePruning(sparsity=1.5): sparsity is the share of weights"]),
        (lambda: MagnitudePruning(-0.1), ["MagnitudePruning(sparsity=-0.1)", "in [0, 1]"]),
        (lambda: MagnitudePruning(float("nan")), ["MagnitudePruning(sparsity=nan)"]),
        (lambda: MagnitudePruning(wrong("0.5")), ["MagnitudePruning(sparsity='0.5')"]),
        (lambda: MagnitudePruning(), ["sparsity is missing. Give the share of zeros"]),
        (lambda: MagnitudePruning(0.9, granularity=NM(n=2, m=4)), ["means a sparsity of 0.5. Leave sparsity out."]),
        (lambda: MagnitudePruning(0.5, gradient=Gradient.CLIPPED), ["only a quantizer has a range. Use EXACT"]),
        (lambda: MagnitudePruning(0.5, decay=-1.0), ["MagnitudePruning(decay=-1.0): decay is a factor of the pruned"]),
        (lambda: Quantization(bits=4, damping=-1.0), ["Quantization(damping=-1.0): damping is a factor of rounding"]),
        (lambda: Quantization(bits=4, clip=0.0), ["Quantization(clip=0.0): clip is a share of the range"]),
        (lambda: Quantization(bits=1, clip=0.5), ["Quantization(bits=1, clip=0.5)", "Leave clip out"]),
        (lambda: Quantization(bits=4, weighted=True), ["Give the least share of the range, as in clip=0.5, too"]),
        (
            lambda: MagnitudePruning(0.5) | Quantization(bits=4, clip=0.5, weighted=True),
            ["looks at the inputs of a layer as it is", "use weighted=False"],
        ),
        (lambda: Quantization(4, gradient=Gradient.DECAYING), ["only the gradient of pruned weights can decay"]),
        (lambda: MagnitudePruning(0.5, granularity=wrong("row")), ["MagnitudePruning(granularity='row')"]),
        (lambda: NM(n=4, m=4), ["NM(n=4, m=4): n is smaller than m. Lower n or raise m."]),
        (lambda: Quantization(bits=9), ["Quantization(bits=9): bits is the width of a code in bits, 1 to 8"]),
        (lambda: Quantization(bits=0), ["Quantization(bits=0)"]),
        (lambda: Quantization(bits=1, symmetric=False), ["one bit has no zero point. Use bits=2 or symmetric"]),
        (lambda: Quantization(bits=4, granularity=wrong(Global())), ["Quantization(granularity=Global())"]),
        (lambda: Binary(gradient=Gradient.EXACT), ["rounding has no derivative. Use STRAIGHT_THROUGH"]),
        (lambda: LowRank(), ["LowRank takes exactly one of rank, ratio and energy, got none"]),
        (lambda: LowRank(rank=4, ratio=0.5), ["takes exactly one of rank, ratio and energy, got rank and ratio"]),
        (lambda: LowRank(rank=0), ["LowRank(rank=0): rank is the channels between the layers, at least 1"]),
        (lambda: LowRank(ratio=1.5), ["LowRank(ratio=1.5)", "in (0, 1]"]),
        (lambda: Binary() | MagnitudePruning(0.5), ["Binary | MagnitudePruning", "low rank, pruning, quantization"]),
        (lambda: Quantization(4) | LowRank(rank=2), ["Quantization | LowRank", "Change the order or drop one"]),
        (lambda: Binary() | Binary(), ["Binary | Binary"]),
        (lambda: Replace(wrong("mlp")), ["factory", "'mlp'"]),
        (lambda: Rule(wrong("binary")), ["Rule(compressor='binary')"]),
        (lambda: Rule(Binary(), schedule=wrong(3)), ["Rule(schedule=3)"]),
        (lambda: Rule(Replace(nn.Identity), ramp=FADE), ["Replace has no strength between none and full"]),
        (lambda: StepSchedule(at=-1), ["StepSchedule(at=-1)"]),
        (lambda: rules({}), ["a recipe takes a mapping from keys to compressors with at least one rule, got {}"]),
        (lambda: Recipe(wrong([("*", Binary())]), schedule=FADE), ["a recipe takes a mapping"]),
        (lambda: rules({"*": "binary"}), ["the rule for '*' must be a compressor", "or a Rule, got 'binary'"]),
        (lambda: rules({"*": Binary}), ["the rule for '*' must be a compressor"]),
        (lambda: rules({3: Binary()}), ["3 cannot be the key of a rule", "got int"]),
        (lambda: rules({int: Binary()}), ["cannot be the key of a rule", "a module type"]),
        (lambda: rules({re.compile(b"x"): Binary()}), ["cannot be the key of a rule"]),
        (lambda: rules({"*": Binary()}, ignore=[None]), ["None cannot be the key of a rule"]),
        (lambda: Recipe({"*": Binary()}, schedule=wrong("linear")), ["schedule must be a schedule", "'linear'"]),
        (lambda: Recipe({"*": Binary()}, schedule=FADE, ramp=wrong(3)), ["ramp must be a schedule", "got 3"]),
        (lambda: rules({"*": Replace(nn.Identity)}, ramp=FADE), ["Replace has no strength between none and full"]),
    ],
)  # fmt: skip
def test_settings_out_of_range_or_of_the_wrong_type(make: Callable[[], Any], facts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    for fact in facts:
        assert fact in str(caught.value)


def test_a_predicate_has_no_place_in_a_file() -> None:
    for recipe in (rules({nothing_at_all: Binary()}), rules({"*": Binary()}, ignore=[nothing_at_all])):
        for write in (recipe.to_yaml, recipe.to_json):
            with pytest.raises(ConfigError, match="the predicate 'nothing_at_all' cannot be written to a file"):
                write()


def test_every_error_of_a_user_is_one_of_ours_and_a_value_error() -> None:
    for error in (ConfigError, RecipeError, TransitionError, vanishing.FileError):
        assert issubclass(error, VanishingError)
        assert issubclass(error, ValueError)


# Optimizers


@pytest.mark.parametrize(
    "recipe, count, where",
    [
        (rules({"*": LowRank(rank=2)}), 2, "'0'"),
        (rules({"2": Replace(lambda block: nn.Linear(16, 4), name="factory 3")}), 2, "'2'"),
        (rules({"1": Replace(lambda block: nn.PReLU(), name="factory 4")}), 1, "'1'"),
    ],
    ids=["factors", "block", "block without parameters"],
)
def test_an_optimizer_made_too_early_is_seen_at_the_first_step(recipe: Recipe, count: int, where: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transition = vanishing.prepare(model, recipe)
    model(batch()).sum().backward()
    optimizer.step()
    before, bits = everything(model), values(model)
    for _ in range(2):
        with pytest.raises(TransitionError) as caught:
            transition.step()
        assert str(caught.value) == (
            f"the optimizer was made before prepare: it does not hold the {count} new parameters of the compressed "
            f"form of {where}, which would never be trained. Pass optimizer= to prepare, or make the optimizer "
            f"afterwards."
        )
    assert everything(model) == before and states_equal(values(model), bits)
    assert (transition.steps_done, transition.beta) == (0, 1.0)
    # The transition is as good as new: with an optimizer made now it goes on to its end.
    train(model, transition, 4)
    transition.finish()


def test_after_an_optimizer_made_too_early_the_transition_can_be_cancelled() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transition = vanishing.prepare(model, LowRank(rank=2), steps=4)
    with pytest.raises(TransitionError, match="made before prepare"):
        train(model, transition, 1, optimizer)
    assert transition.cancel() is model
    train(model, None, 1, optimizer)


def test_a_second_optimizer_made_too_early_is_seen_as_well() -> None:
    model = mlp()
    early = torch.optim.SGD(model.parameters(), lr=1e-2)
    transition = vanishing.prepare(model, LowRank(rank=2), steps=8)
    optimizer = train(model, transition, 1)
    del optimizer
    with pytest.raises(TransitionError, match="made before prepare"):
        train(model, transition, 1, early)


def test_techniques_without_new_parameters_take_an_optimizer_made_before() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transition = vanishing.prepare(model, MagnitudePruning(0.5) | Quantization(4), steps=2)
    train(model, transition, 2, optimizer)
    transition.finish()


def test_optimizers_of_other_models_are_no_concern() -> None:
    model, other = mlp(), mlp()
    transition = vanishing.prepare(model, LowRank(rank=2), steps=2)
    train(other, None, 1)
    transition.step()


@pytest.mark.parametrize(
    "recipe, where",
    [
        (rules({"*": LowRank(rank=2)}), "'0'"),
        (rules({"0": Replace(lambda b: nn.Linear(8, 16), name="factory 5"), "2": Binary()}), "'0'"),
    ],
    ids=["factors", "block"],
)
def test_an_optimizer_that_does_not_hold_the_weights(recipe: Recipe, where: str) -> None:
    model = mlp()
    message = refused(
        model,
        recipe,
        f"the optimizer does not hold the weights of {where}. Make it from model.parameters(), or leave `optimizer`",
        optimizer=torch.optim.AdamW(model[2].parameters()),
    )
    assert "'2'" not in message


def test_an_optimizer_of_another_model_is_one_problem_among_all() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    optimizer = torch.optim.AdamW(mlp().parameters())
    groups = [dict(group) for group in optimizer.param_groups]
    refused(
        model,
        rules({"*": LowRank(rank=2), "head": Binary()}),
        "for 2 reasons",
        "nothing matched 'head'",
        "the optimizer does not hold the weights of '0', '1', '2' and 3 more.",
        optimizer=optimizer,
    )
    assert [dict(group) for group in optimizer.param_groups] == groups


# Replacements


def identity_of(block: nn.Module) -> nn.Module:
    return block


def nothing_of(block: nn.Module) -> None:
    return None


def a_type_of(block: nn.Module) -> type[nn.Module]:
    return nn.Linear


def test_a_factory_that_makes_no_module_is_one_problem_among_all() -> None:
    model = nn.Sequential(mlp(), mlp(), mlp(), nn.Linear(4, 4))
    message = refused(
        model,
        rules({"0": Replace(identity_of), "1": Replace(nothing_of), "2": Replace(a_type_of), "3": LowRank(rank=9)}),
        "for 4 reasons",
        "'0' cannot be replaced: the factory",
        "must return a new nn.Module for a block, got the block itself.",
        "'1' cannot be replaced:",
        "got NoneType.",
        "'2' cannot be replaced:",
        "got type.",
        "rank is at most 4",
    )
    assert "test_errors:nothing_of'" in message


def test_random_numbers_that_a_factory_drew_are_given_back_on_refusal() -> None:
    model = nn.Sequential(mlp(), mlp())
    refused(
        model,
        rules({"0": Replace(lambda block: mlp(), name="factory 6"), "1": Replace(nothing_of)}),
        "'1' cannot be replaced",
    )


def test_a_factory_that_fails_says_so_itself_and_nothing_changes() -> None:
    def broken(block: nn.Module) -> nn.Module:
        torch.rand(1)
        raise KeyError("num_heads")

    refused(nn.Sequential(mlp()), rules({"0": Replace(broken, name="broken")}), "num_heads", error=KeyError)


@pytest.mark.parametrize(
    "replacement, fact",
    [
        (nn.Linear(8, 5), "0(...) is shape (5, 16) from the original and shape (5, 5) from the replacement"),
        (nn.GRUCell(8, 16), None),
        (nn.GRU(8, 16), "0(...) is Tensor from the original and tuple from the replacement"),
    ],
    ids=["shape", "another signature that fits", "structure"],
)
def test_outputs_that_differ_are_seen_with_example_inputs(replacement: nn.Module, fact: str | None) -> None:
    model = mlp()
    recipe = rules({"0": Replace(lambda block: replacement, name="replacement")})
    if fact is None:
        vanishing.prepare(model, recipe, example_inputs=batch()).cancel()
    else:
        refused(
            model, recipe, fact, "Change the factory of the replacement", error=TransitionError, example_inputs=batch()
        )


def test_outputs_that_differ_are_seen_at_the_first_step_otherwise() -> None:
    model = mlp()
    transition = vanishing.prepare(model, rules({"0": Replace(lambda block: nn.Linear(8, 5), name="factory 7")}))
    with pytest.raises(TransitionError, match=re.escape("0(...) is shape (5, 16) from the original")):
        train(model, transition, 2)
    transition.cancel()


class HasWidth(nn.Linear):
    width = 16


class ReadsWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = HasWidth(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) / self.block.width


def test_an_attribute_that_the_replacement_lacks_is_seen_with_example_inputs() -> None:
    refused(
        ReadsWidth(),
        rules({"block": Replace(lambda block: nn.Linear(8, 16), name="factory 8")}),
        "'Linear', the replacement of 'HasWidth', has no attribute 'width'. If the model reads it, set it in the",
        error=AttributeError,
        example_inputs=batch(),
    )


def test_example_inputs_that_the_model_does_not_take() -> None:
    refused(mlp(), rules({"*": LowRank(rank=2)}), "8x16", error=RuntimeError, example_inputs=batch(features=3))


# The clock and the end


def prepared(steps: int = 4, **options: Any) -> tuple[nn.Module, Transition]:
    model = mlp()
    return model, vanishing.prepare(model, LowRank(rank=2), steps=steps, **options)


def test_finish_too_early_says_how_many_steps_remain() -> None:
    model, transition = prepared(steps=10)
    train(model, transition, 3)
    before, bits = everything(model), values(model)
    with pytest.raises(TransitionError) as caught:
        transition.finish()
    assert str(caught.value) == (
        "finish: 7 of 10 optimizer steps remain until the compressed form stands alone. Train on, or call "
        "finish(force=True) to cut them off."
    )
    assert everything(model) == before and states_equal(values(model), bits)
    assert transition.steps_done == 3


def test_finish_counts_the_longest_of_all_schedules_and_ramps() -> None:
    rule = Rule(Binary(), schedule=LinearSchedule(steps=3, start=9))
    transition = vanishing.prepare(mlp(), rules({"0": rule, "2": LowRank(rank=2)}))
    with pytest.raises(TransitionError, match=r"the clock stands at 0: transition.step\(\) was never called"):
        transition.finish()
    transition.seek(1)
    with pytest.raises(TransitionError, match="11 of 12 optimizer steps remain"):
        transition.finish()
    recipe = Recipe({"*": Binary()}, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=20))
    transition = vanishing.prepare(mlp(), recipe)
    transition.seek(1)
    with pytest.raises(TransitionError, match="19 of 20 optimizer steps remain"):
        transition.finish()


@pytest.mark.parametrize("batches", [[], iter(()), (each for each in wrong(()))])
@pytest.mark.parametrize("force", [True, False])
def test_recalibrate_without_batches_changes_nothing(batches: Any, force: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    transition = vanishing.prepare(model, Binary(), steps=4)
    train(model, transition, 2 if force else 4)
    before, bits = everything(model), values(model)
    with pytest.raises(TransitionError, match="recalibrate: at least one batch is needed"):
        transition.finish(recalibrate=batches, force=force)
    assert everything(model) == before and states_equal(values(model), bits)
    assert transition.steps_done == (2 if force else 4)
    transition.finish(recalibrate=[batch()], force=force)


@pytest.mark.parametrize("end, how", [("finish", "finished"), ("cancel", "cancelled")])
def test_an_ended_transition_does_nothing_more(end: str, how: str) -> None:
    model, transition = prepared()
    train(model, transition, 4)
    state = transition.state_dict()
    getattr(transition, end)()
    uses: list[Callable[[], Any]] = [
        transition.step,
        lambda: transition.seek(3),
        transition.finish,
        lambda: transition.finish(force=True),
        transition.cancel,
        lambda: transition.compressed().__enter__(),
        lambda: transition.original().__enter__(),
        lambda: transition.load_state_dict(state),
    ]
    for use in uses:
        with pytest.raises(TransitionError) as caught:
            use()
        assert str(caught.value) == f"this transition was {how}. Call prepare again for another one."


@pytest.mark.parametrize("step", [-1, 1.0, "3", None, True])
def test_seek_takes_a_number_of_steps(step: Any) -> None:
    _, transition = prepared()
    with pytest.raises(
        ValueError, match=re.escape(f"seek(step={step!r}): step is a number of optimizer steps, at least 0.")
    ):
        transition.seek(step)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"steps_done": 3},
        {"steps_done": "3", "recipe": "{}"},
        {"steps_done": -1, "recipe": "{}"},
        None,
        [3],
        {"model": 1},
    ],
)
def test_a_state_of_something_else(state: Any) -> None:
    _, transition = prepared()
    with pytest.raises(TransitionError, match="expected a transition's state with steps_done and recipe, got "):
        transition.load_state_dict(state)
    assert transition.steps_done == 0


def test_a_state_of_another_recipe() -> None:
    _, transition = prepared(steps=4)
    _, other = prepared(steps=5)
    with pytest.raises(TransitionError, match="saved with another recipe") as caught:
        transition.load_state_dict(other.state_dict())
    assert '"steps": 5' in str(caught.value)


def refusals() -> Iterator[tuple[nn.Sequential, Recipe]]:
    for compressor in (MagnitudePruning(0.5), Binary(), LowRank(rank=2)):
        model = mlp()
        model[2].requires_grad_(False)
        yield model, rules({"*": compressor})


def test_after_a_refusal_the_corrected_recipe_works() -> None:
    for model, recipe in refusals():
        refused(model, recipe, "frozen")
        model[2].requires_grad_(True)
        transition = vanishing.prepare(model, recipe, example_inputs=batch())
        train(model, transition, 4)
        transition.finish()


def test_a_layer_that_cannot_be_installed_takes_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vanishing import blended_weight, sites

    install = blended_weight.install_blended_weight
    model = mlp()

    def fail_at_the_second(module: nn.Module, *arguments: Any) -> None:
        if module is model[2]:
            raise RuntimeError("no more")
        install(module, *arguments)

    monkeypatch.setattr(sites, "install_blended_weight", fail_at_the_second)
    refused(model, rules({"*": LowRank(rank=2)}), "no more", error=RuntimeError)


def test_per_tensor_is_the_default_and_is_not_shown() -> None:
    assert repr(MagnitudePruning(0.5, granularity=PerTensor())) == "MagnitudePruning(sparsity=0.5)"
