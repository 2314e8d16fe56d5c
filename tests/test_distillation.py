"""Distillation: the losses are those of the textbook, the teacher is the original, and a run resumes with its bits."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import reference
import vanishing
from cases import LAYERS, PAIRS, TECHNIQUES, Attention, Reader, Single, Twice
from loops import batch, copied, mlp, states_equal, train
from vanishing import (
    Binary,
    HeadPruning,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Quantization,
    Recipe,
    RecipeError,
    Replace,
    Rule,
    Staggered,
    StepSchedule,
    Teacher,
    Transition,
    TransitionError,
)
from vanishing.distillation import Distillation
from vanishing.errors import ConfigError
from vanishing.receipt import read_receipt

FADE = LinearSchedule(steps=4)


def prepared(
    model: nn.Module, rules: dict[Any, Any], *losses: Distillation, step: int = 0, **options: Any
) -> Transition:
    transition = vanishing.prepare(
        model.train(), Recipe(rules, schedule=options.pop("schedule", FADE), distillation=losses, **options)
    )
    transition.seek(step)
    return transition


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def inputs(step: int = 0) -> Tensor:
    return batch(step).double()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def halved(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 16))


# The local loss


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(
    "technique", [LowRank(rank=2), MagnitudePruning(0.5), Binary(), LowRank(rank=2) | Quantization(bits=4)], ids=repr
)
def test_the_local_loss_of_layers_is_the_textbooks_with_its_gradients(
    technique: vanishing.WeightCompressor, step: int
) -> None:
    model = network()
    transition = prepared(model, {"*": technique}, LocalLoss(weight=0.7), step=step)
    x = inputs()
    model(x)
    got = transition.auxiliary_loss()

    # By the plain formula: every layer's input is a constant, what the blend before it has put out.
    hidden: Any = x
    total = torch.zeros((), dtype=torch.float64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            latent, blend = layer.parametrizations.weight.original, layer.parametrizations.weight[0]  # type: ignore[index,union-attr]
            compressed = linear(hidden, blend.form.compress(latent), layer.bias)  # type: ignore[union-attr]
            total = total + reference.local_loss(linear(hidden, latent, layer.bias), compressed)  # type: ignore[arg-type]
        hidden = layer(hidden).detach()
    expected = 0.7 * total / 2
    torch.testing.assert_close(got, expected)
    assert got > 0
    # Both forms have the bias, so that it makes no difference between them.
    bias = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert_same(gradients(got, model), gradients(expected, model) | bias)


@pytest.mark.parametrize("step", [0, 2])
def test_the_local_loss_of_a_block_is_the_textbooks_with_its_gradients(step: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 4)).double()
    transition = prepared(model, {"1": Replace(halved, name="halved, to learn")}, LocalLoss(), step=step)
    model(inputs())
    got = transition.auxiliary_loss()
    block: Any = model[1]
    hidden = model[0](inputs())
    expected = reference.local_loss(block.original(hidden), block.replacement(hidden))
    torch.testing.assert_close(got, expected)
    found = gradients(got, model)
    assert_same(found, gradients(expected, model))
    assert not [name for name in found if "original" in name]
    assert [name for name in found if "replacement" in name]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8)], ids=["batch", "one image"])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_local_loss_is_of_the_outputs_of_a_convolution(step: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2)).double()
    transition = prepared(model, {"0": LowRank(rank=2)}, LocalLoss(), step=step)
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    layer: Any = model[0]
    latent = layer.parametrizations.weight.original
    weights = (latent, layer.parametrizations.weight[0].form.compress(latent))
    f, g = (conv2d(x, weight, layer.bias, stride=2, padding=1) for weight in weights)
    torch.testing.assert_close(transition.auxiliary_loss(), reference.local_loss(f, g))


def test_the_original_gets_no_gradient_of_it() -> None:
    model = network()
    transition = prepared(model, {"*": LowRank(rank=2)}, LocalLoss(), step=1)
    model(inputs())
    found = gradients(transition.auxiliary_loss(), model)
    learned = {name for name, gradient in found.items() if gradient.any()}
    assert learned == {f"{i}.parametrizations.weight.0.form.factors.{j}.weight" for i in (0, 2) for j in (0, 1)}
    assert not [name for name in found if "original" in name]


@pytest.mark.parametrize("technique", [Binary(), MagnitudePruning(0.5)], ids=repr)
def test_a_local_loss_costs_one_more_product_forward_and_one_backward(technique: vanishing.WeightCompressor) -> None:
    layer = nn.Linear(32, 32)
    transition = prepared(nn.Sequential(layer), {"0": technique}, LocalLoss(), step=2)
    x = torch.randn(64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (transition.model(x).sum() + transition.auxiliary_loss()).backward()
    # Without it, a product for the output, one for the input's gradient and one for the weight's.
    assert counter.get_total_flops() == 5 * 2 * 64 * 32 * 32


def test_what_a_hook_makes_of_an_output_is_not_compared() -> None:
    losses = []
    for is_doubled in (False, True):
        model = nn.Sequential(network()[0])
        if is_doubled:
            model[0].register_forward_hook(lambda _, __, output: 2 * output)
        transition = prepared(model, {"0": LowRank(rank=2)}, LocalLoss(), step=2)
        model(inputs())
        losses.append(transition.auxiliary_loss())
    assert torch.equal(*losses)


def test_a_layer_with_a_computation_of_its_own_has_the_loss_of_its_outputs() -> None:
    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    torch.manual_seed(0)
    model = nn.Sequential(Squared(8, 4))
    transition = prepared(model, {Squared: MagnitudePruning(0.5)}, LocalLoss(), step=2)
    model(batch())
    layer: Any = model[0]
    latent = layer.parametrizations.weight.original
    weights = (latent, layer.parametrizations.weight[0].form.compress(latent))
    f, g = (linear(batch(), weight, layer.bias).square() for weight in weights)
    torch.testing.assert_close(transition.auxiliary_loss(), reference.local_loss(f, g))


def test_cached_weights_are_refused() -> None:
    model = network()
    prepared(model, {"*": LowRank(rank=2)}, LocalLoss(), step=2)
    with torch.nn.utils.parametrize.cached(), pytest.raises(TransitionError, match="keeps one weight for both forms"):
        model(inputs())


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "linear_read"])
def test_every_kind_of_layer_has_a_local_loss(layer: str) -> None:
    run = PAIRS[layer, "pruned"].prepare()
    recipe = run.transition.recipe
    run.transition.cancel()
    transition = prepared(run.model, dict(recipe.rules), LocalLoss(), step=2)
    run.model(*run.layer.batch())
    loss = transition.auxiliary_loss()
    assert loss.isfinite()
    # PyTorch's attention reads its output layer's weight, and does not call it.
    assert (loss > 0) == (layer != "attention_output")


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    torch.manual_seed(0)
    model = Twice()
    transition = prepared(model, {"layer": MagnitudePruning(0.5)}, LocalLoss(), step=2)
    x = torch.randn(5, 8)
    model(x)
    layer: Any = model.layer
    latent = layer.parametrizations.weight.original
    total = torch.zeros(())
    for given in (x, torch.tanh(model.layer(x))):
        compressed = linear(given, layer.parametrizations.weight[0].form.compress(latent), layer.bias)
        total = total + reference.local_loss(linear(given, latent, layer.bias), compressed)
    torch.testing.assert_close(transition.auxiliary_loss(), total)


def test_a_weight_that_is_only_read_has_none() -> None:
    model = Reader()
    transition = prepared(model, {"up": Binary()}, LocalLoss(), step=2)
    model(torch.randn(3, 8))
    assert transition.auxiliary_loss() == 0


def test_dropout_of_an_attention_makes_no_difference_between_the_forms() -> None:
    torch.manual_seed(0)
    model = Attention()
    model.layer.dropout = 0.5
    transition = prepared(model, {"layer": MagnitudePruning(0.0)}, LocalLoss(), step=2)
    model(torch.randn(3, 5, 8))
    assert transition.auxiliary_loss() < 1e-12


def test_a_local_loss_is_there_every_so_many_steps_and_as_long_as_the_original() -> None:
    model = network()
    transition = prepared(model, {"*": LowRank(rank=2)}, LocalLoss(every=2))
    there = []
    for _ in range(8):
        model(inputs())
        there.append(bool(transition.auxiliary_loss() > 0))
        transition.step()
    assert there == [True, False, True, False, False, False, False, False]


def test_scores_that_are_masked_with_infinity_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).masked_fill(torch.eye(8, dtype=torch.bool)[:5], -torch.inf)

    model = nn.Sequential(Masked())
    transition = prepared(model, {"0": Replace(lambda _: Masked(), name="masked")}, LocalLoss(), step=2)
    model(batch())
    loss = transition.auxiliary_loss()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# The teacher


def test_the_teachers_loss_is_hintons_with_its_gradients() -> None:
    model, original = network(), network()
    transition = prepared(model, {"*": LowRank(rank=2)}, Teacher(logits=0.3, temperature=3.0), step=2)
    x = inputs()
    student = model(x)
    got = transition.auxiliary_loss()
    expected = 0.3 * reference.teacher_loss(student, original(x), 3.0)
    torch.testing.assert_close(got, expected)
    assert_same(gradients(got, model), gradients(expected, model))


def test_features_are_compared_relative_to_the_teachers() -> None:
    model, original = network(), network()
    settings = Teacher(logits=0, features=("1", "[2]"), feature_weight=0.5)
    transition = prepared(model, {"*": LowRank(rank=2)}, settings, step=4)
    x = inputs()
    model(x)
    expected = torch.zeros((), dtype=torch.float64)
    for depth in (2, 3):
        expected = expected + 0.5 / 2 * reference.local_loss(original[:depth](x), model[:depth](x))
    torch.testing.assert_close(transition.auxiliary_loss(), expected)
    assert_same(gradients(transition.auxiliary_loss(), model), gradients(expected, model))


def test_both_losses_add_up() -> None:
    losses = [LocalLoss(weight=0.5), Teacher()]
    values = []
    for chosen in (losses, losses[:1], losses[1:]):
        model = network()
        transition = prepared(model, {"*": LowRank(rank=2)}, *chosen, step=2)
        model(inputs())
        values.append(float(transition.auxiliary_loss().detach()))
    assert values[0] == pytest.approx(values[1] + values[2])


def test_the_teacher_is_the_original_however_the_model_is_trained_and_stays_to_the_end() -> None:
    model, original = mlp(), mlp()
    original.load_state_dict(model.state_dict())
    transition = prepared(model, {"*": MagnitudePruning(0.5)}, Teacher())
    train(model, transition, 6)
    assert transition.done
    student = model(batch(9))
    expected = reference.teacher_loss(student, original(batch(9)), 2.0)
    torch.testing.assert_close(transition.auxiliary_loss(), expected)
    transition.finish()
    model(batch(9))
    assert transition.auxiliary_loss() == 0


def test_the_teacher_runs_in_evaluation_mode_and_the_statistics_of_it_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    original = copy.deepcopy(model).eval()
    transition = prepared(model, {"*": Binary()}, Teacher())
    train(model, transition, 3)
    student = model(batch())
    torch.testing.assert_close(
        transition.auxiliary_loss(), reference.teacher_loss(student, original(batch()), 2.0), rtol=1e-5, atol=1e-6
    )


def test_the_teacher_is_no_part_of_the_model() -> None:
    rules = {"*": LowRank(rank=2)}
    with_teacher, without = network(), network()
    transition = prepared(with_teacher, rules, Teacher(features=("*",)), LocalLoss())
    prepared(without, rules)
    assert states_equal(copied(with_teacher.state_dict()), copied(without.state_dict()))
    assert [n for n, _ in with_teacher.named_parameters()] == [n for n, _ in without.named_parameters()]
    assert [n for n, _ in with_teacher.named_modules()] == [n for n, _ in without.named_modules()]
    copied_model = copy.deepcopy(with_teacher)
    copied_model(inputs())
    with pytest.raises(TransitionError, match="has not been called in training mode"):
        transition.auxiliary_loss()


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_nothing_is_left_at_the_end(end: str) -> None:
    model = network()
    transition = prepared(model, {"0": LowRank(rank=2), "2": Binary()}, Teacher(features=("0", "1")), LocalLoss())
    teacher = weakref.ref(transition._teacher)
    model(inputs())
    transition.auxiliary_loss()
    transition.finish(force=True) if end == "finish" else transition.cancel()
    gc.collect()
    assert teacher() is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_weights_that_are_not_trained_are_shared_and_others_are_copied() -> None:
    model = network()
    model[0].requires_grad_(False)
    transition = prepared(model, {"2": LowRank(rank=2)}, Teacher(), freeze_original=True)
    assert transition._teacher is not None
    held = {id(t) for t in transition._teacher.tensors}
    assert len(held) == 1
    assert transition._teacher.tensors[0].shape == model[2].bias.shape
    trained = network()
    other = prepared(trained, {"2": LowRank(rank=2)}, Teacher())
    assert other._teacher is not None
    assert len(other._teacher.tensors) == 4


def test_a_weight_of_the_teacher_that_is_trained_later_is_refused() -> None:
    model = network()
    model[0].requires_grad_(False)
    transition = prepared(model, {"2": LowRank(rank=2)}, Teacher())
    model[0].requires_grad_(True)
    model(inputs())
    with pytest.raises(TransitionError, match="a weight is trained that was frozen"):
        transition.auxiliary_loss()


def test_tied_weights_stay_tied_in_the_teacher() -> None:
    model = LAYERS["linear_tied"].build()
    transition = prepared(model, {"head": Binary(), "embedding": Binary()}, Teacher())
    assert transition._teacher is not None
    assert len(transition._teacher.tensors) == 1


def test_a_teacher_in_bfloat16_takes_half_the_memory_and_teaches_nearly_the_same() -> None:
    values, sizes = [], []
    for half in (False, True):
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
                num_labels=5,
            )
        )
        transition = prepared(model, {"vit.layers.*": LowRank(rank=2)}, Teacher(bfloat16=half, temperature=1.0), step=4)
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        values.append(float(transition.auxiliary_loss().detach()))
        assert transition._teacher is not None
        sizes.append(sum(t.numel() * t.element_size() for t in transition._teacher.tensors))
    assert sizes[1] == sizes[0] // 2
    assert values[1] == pytest.approx(values[0], rel=0.2)


# Tokens


def bert(head: Any) -> Any:
    torch.manual_seed(0)
    return head(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
            num_labels=3,
        )
    )


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.3,
        )
    )


TOKENS = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(0))
ATTENDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
LABELS = torch.where(torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool(), TOKENS, -100)


@pytest.mark.parametrize(
    ("build", "given", "counted"),
    [
        (lambda: bert(BertForMaskedLM), {}, torch.ones(3, 6)),
        (lambda: bert(BertForMaskedLM), {"attention_mask": ATTENDED}, ATTENDED),
        (lambda: bert(BertForMaskedLM), {"attention_mask": ATTENDED, "labels": LABELS}, LABELS != -100),
        # Each token's logits are for the token after it.
        (llama, {"labels": LABELS}, torch.cat([LABELS[:, 1:] != -100, torch.zeros(3, 1)], dim=1)),
        (llama, {"attention_mask": ATTENDED}, ATTENDED),
    ],
    ids=["all", "masked", "labels", "causal labels", "causal masked"],
)
def test_tokens_that_do_not_count_are_left_out(
    build: Callable[[], Any], given: dict[str, Tensor], counted: Tensor
) -> None:
    model, original = build(), build().eval()
    transition = prepared(model, {"*.layer*": Binary()}, Teacher(), step=2)
    student = model(input_ids=TOKENS, **given).logits
    teacher = original(input_ids=TOKENS, **given).logits
    expected = reference.teacher_loss(student[counted.bool()], teacher[counted.bool()], 2.0)
    torch.testing.assert_close(transition.auxiliary_loss(), expected)


def test_features_of_padding_do_not_count() -> None:
    model, original = bert(BertForMaskedLM), bert(BertForMaskedLM).eval()
    transition = prepared(model, {"*.layer*": Binary()}, Teacher(logits=0, features=("bert.encoder.layer.?",)), step=2)
    found, wanted = (
        each(input_ids=TOKENS, attention_mask=ATTENDED, output_hidden_states=True).hidden_states
        for each in (model, original)
    )
    expected = torch.zeros(())
    for f, g in zip(wanted[1:], found[1:], strict=True):
        expected = expected + reference.local_loss(f[ATTENDED.bool()], g[ATTENDED.bool()]) / 2
    torch.testing.assert_close(transition.auxiliary_loss(), expected)


def test_labels_of_whole_examples_leave_nothing_out() -> None:
    model, original = bert(BertForSequenceClassification), bert(BertForSequenceClassification).eval()
    transition = prepared(model, {"*.layer*": HeadPruning(0.5)}, Teacher(), step=2)
    student = model(input_ids=TOKENS, labels=torch.tensor([0, 1, 2])).logits
    expected = reference.teacher_loss(student, original(input_ids=TOKENS).logits, 2.0)
    torch.testing.assert_close(transition.auxiliary_loss(), expected)


def test_maps_of_classes_have_their_classes_in_the_second_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    original = copy.deepcopy(model)
    transition = prepared(model, {"0": Binary()}, Teacher(), step=2)
    x = torch.randn(2, 3, 6, 6)
    rows = [each(x).permute(0, 2, 3, 1).reshape(-1, 5) for each in (model, original)]
    torch.testing.assert_close(transition.auxiliary_loss(), reference.teacher_loss(rows[0], rows[1], 2.0))


# When there is nothing


def test_without_distillation_the_loss_is_zero() -> None:
    model = network()
    transition = prepared(model, {"*": Binary()})
    assert transition.auxiliary_loss() == 0
    model(inputs())
    assert transition.auxiliary_loss() == 0


class Counted(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_evaluation_does_no_work(step: int) -> None:
    model = nn.Sequential(Counted(8, 8))
    transition = prepared(model, {"0": Binary()}, LocalLoss(), Teacher(), step=step)
    model.eval()
    Counted.calls = 0
    model(batch())
    assert transition.auxiliary_loss() == 0
    assert Counted.calls == 1
    model.train()
    with torch.no_grad():
        model(batch())
        assert transition.auxiliary_loss() == 0
    assert Counted.calls == 2


def test_at_beta_1_no_output_and_no_gradient_changes_a_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    rules = {"0": LowRank(rank=2), "1": Replace(halved, name="halved, to learn"), "2": Binary()}
    transition = prepared(model, rules, LocalLoss(), Teacher(features=("1",)))
    outputs = [each(batch()) for each in (model, plain)]
    assert transition.auxiliary_loss() > 0
    assert torch.equal(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    before = [p.grad for p in plain.parameters()]
    after = [p.grad for n, p in model.named_parameters() if "form" not in n and "replacement" not in n]
    assert len(after) == len(before)
    assert all(any(torch.equal(a, b) for b in after) for a in before)  # type: ignore[arg-type]


def test_a_loss_that_is_not_added_changes_no_bit_of_the_training() -> None:
    states = []
    for losses in ((), (LocalLoss(), Teacher(features=("2",)))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        transition = prepared(model, {"0": LowRank(rank=2), "2": MagnitudePruning(0.5)}, *losses)
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            loss = model(batch(step)).square().mean()
            transition.auxiliary_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        states.append(copied(model.state_dict()))
    assert states_equal(*states)


# Resuming


def distilled(seed: int = 0) -> tuple[nn.Module, Transition]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Dropout(0.1), nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 4)
    )
    model[3].bias.requires_grad_(False)
    torch.manual_seed(5)
    rules = {"0": LowRank(rank=2), "2": Replace(halved, name="halved, to learn"), "3": MagnitudePruning(0.5)}
    return model, prepared(model, rules, LocalLoss(every=2), Teacher(features=("2",)))


def learn(model: nn.Module, transition: Transition, optimizer: torch.optim.Optimizer, until: int) -> None:
    for step in range(transition.steps_done, until):
        torch.manual_seed(step)
        loss = (model(batch(step)) - 1).square().mean()
        (loss + transition.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()


@pytest.mark.parametrize("split", range(6))
def test_a_run_that_is_split_at_any_step_ends_with_the_same_bits(split: int) -> None:
    model, transition = distilled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learn(model, transition, optimizer, split)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), transition.state_dict()))
    learn(model, transition, optimizer, 6)

    resumed, again = distilled()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    learn(resumed, again, optimizer, 6)
    assert states_equal(copied(model.state_dict()), copied(resumed.state_dict()))
    assert states_equal(copied(transition.finish().state_dict()), copied(again.finish().state_dict()))


def test_another_teacher_is_refused() -> None:
    _, transition = distilled()
    transition.step()
    state = transition.state_dict()
    _, other = distilled(seed=1)
    with pytest.raises(TransitionError, match=r"saved with another teacher.*build it with the original weights"):
        other.load_state_dict(state)
    assert other.steps_done == 0


def test_a_finished_model_is_saved_and_loaded_with_its_recipe(tmp_path: Path) -> None:
    model = mlp()
    transition = prepared(model, {"*": LowRank(rank=2)}, LocalLoss(), Teacher(features=("0",)))
    transition.seek(4)
    transition.finish()
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", mlp())
    assert torch.equal(loaded(batch()), model(batch()))
    assert not [name for name in loaded.state_dict() if "teacher" in name]
    receipt = read_receipt(loaded)
    assert receipt is not None
    assert receipt.recipe == transition.recipe


# Recomputed activations


@pytest.mark.parametrize("losses", [(LocalLoss(),), (Teacher(features=("*",)),)], ids=["local", "teacher"])
@pytest.mark.parametrize("whole", [True, False])
def test_recomputed_activations_give_the_same_gradients(losses: tuple[Distillation, ...], whole: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.blocks, self.recompute = nn.ModuleList([network(), nn.Sequential(nn.Linear(4, 4)).double()]), recompute

        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            return x

    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Blocks(recompute and not whole)
        transition = prepared(model, {"*": LowRank(rank=2)}, *losses, step=2)
        output = checkpoint(model, inputs(), use_reentrant=False) if recompute and whole else model(inputs())
        loss = output.square().sum() + transition.auxiliary_loss()
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("losses", [(LocalLoss(),), (Teacher(features=("0",)),)], ids=["local", "teacher"])
def test_reentrant_checkpointing_is_refused(losses: tuple[Distillation, ...]) -> None:
    class Reentrant(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(super().forward, x, use_reentrant=True)

    model = Reentrant(nn.Linear(8, 8))
    transition = prepared(model, {"0": LowRank(rank=2)}, *losses, step=2)
    with pytest.raises(TransitionError, match="'0' runs without gradients"):
        model(batch().requires_grad_())
    transition.cancel()


# Mistakes


def test_a_model_that_cannot_be_copied_is_left_as_it_was() -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    model[0].requires_grad_(False)
    before = list(model.named_modules())
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        prepared(model, {"2": LowRank(rank=2)}, Teacher(), freeze_original=True)
    assert "copied to be its own Teacher" in caught.value.__notes__[0]
    assert list(model.named_modules()) == before
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("distillation", "words"),
    [
        (LocalLoss, "is a LocalLoss, a Teacher or both"),
        ("local_loss", "is a LocalLoss, a Teacher or both"),
        ([Teacher(), Teacher(temperature=1.0)], "two losses of one kind"),
    ],
)
def test_a_recipe_says_what_distillation_is(distillation: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe({"*": Binary()}, schedule=FADE, distillation=distillation)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LocalLoss(weight=0), "a factor above 0"),
        (lambda: LocalLoss(every=0), "at least 1"),
        (lambda: Teacher(temperature=0), "a temperature above 0"),
        (lambda: Teacher(logits=-1), "at least 0"),
        (lambda: Teacher(logits=0), "nothing is left to learn"),
        (lambda: Teacher(features="0"), "a list of globs"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_features_that_are_not_there_are_reported_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh()))
    before = list(model.named_modules())
    with pytest.raises(RecipeError) as caught:
        prepared(
            model,
            {"1": Replace(halved, name="halved, to learn")},
            Teacher(features=("1.0", "encoder", "0")),
        )
    assert "'1.0' matches is inside of blocks that are replaced" in str(caught.value)
    assert "nothing matched 'encoder'" in str(caught.value)
    assert list(model.named_modules()) == before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(8, 1)), "one number each"),
        (nn.Sequential(nn.Linear(8, 4), nn.Flatten(0)), "no logits in what the model returns, a Tensor"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(model: nn.Module, words: str) -> None:
    transition = prepared(model, {"0": Binary()}, Teacher())
    model(batch())
    with pytest.raises(TransitionError, match=words):
        transition.auxiliary_loss()


def test_a_part_that_is_called_in_the_place_of_the_model_is_refused() -> None:
    model = network()
    transition = prepared(model, {"*": LowRank(rank=2)}, LocalLoss())
    model[0](inputs())
    with pytest.raises(TransitionError, match="Call that model itself"):
        transition.auxiliary_loss()


def test_inputs_that_were_written_to_are_refused() -> None:
    model = network()
    transition = prepared(model, {"*": LowRank(rank=2)}, Teacher())
    x = inputs()
    model(x)
    x.zero_()
    with pytest.raises(TransitionError, match="have been written to"):
        transition.auxiliary_loss()


def test_a_schedule_that_jumps_has_a_local_loss_before_it() -> None:
    model = network()
    transition = prepared(model, {"*": LowRank(rank=2)}, LocalLoss(), schedule=StepSchedule(at=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        model(inputs())
        losses.append(transition.auxiliary_loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    assert losses[2] < losses[0]


def test_the_estimate_of_memory_knows_the_teacher() -> None:
    sizes = []
    for losses in ((), (Teacher(),)):
        model = mlp()
        transition = prepared(model, {"*": Binary()}, *losses)

        def loss(size: int, model: Any = model, transition: Transition = transition) -> Tensor:
            return model(torch.zeros(size, 8)).sum() + transition.auxiliary_loss()

        sizes.append(vanishing.estimate_memory(transition, loss, 8).parameters)
    assert sizes[1] - sizes[0] == sum(p.numel() * p.element_size() for p in mlp().parameters())


def test_every_technique_learns_from_both() -> None:
    for name, technique in TECHNIQUES.items():
        model, x = Single(nn.Linear(12, 8)), torch.randn(3, 12)
        recipe = Recipe({"layer": technique.compressor}, schedule=FADE, distillation=(LocalLoss(), Teacher()))
        calibration = [x] if recipe.match(model).observed() else None
        transition = vanishing.prepare(model, recipe, calibration=calibration)
        transition.seek(2)
        model(x)
        loss = transition.auxiliary_loss()
        loss.backward()
        assert loss > 0, name


def test_a_cache_of_the_caller_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    transition = prepared(model, {"*mlp*": MagnitudePruning(0.5)}, Teacher())
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.randint(0, 32, (2, 6)), cache=cache)
    with pytest.raises(TransitionError, match="a cache of its caller"):
        transition.auxiliary_loss()
    assert cache.get_seq_length() == 6


def test_after_a_pass_that_failed_the_model_can_be_evaluated() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    transition = prepared(model, {"*": MagnitudePruning(0.5)}, LocalLoss(), step=1)
    hook = model[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 8))
    hook.remove()
    with torch.no_grad():
        model.eval()(torch.randn(2, 8))
    model.train()(torch.randn(2, 8))
    assert transition.auxiliary_loss() > 0


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_compiled_model_compares_what_has_an_original_left(step: int) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    schedule = Staggered(LinearSchedule(steps=6))
    transition = prepared(model, {"*": Quantization(3)}, LocalLoss(), step=step, schedule=schedule)
    x = torch.randn(8, 16)
    model(x)
    expected = transition.auxiliary_loss().detach()
    torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(transition.auxiliary_loss().detach(), expected)


def test_factors_that_a_resumed_run_loads_are_compared() -> None:
    windows = (LinearSchedule(steps=2), LinearSchedule(steps=4, start=2))
    rule = Rule(LowRank(energy=0.9) | Quantization(bits=4), schedules=windows)
    losses, state = [], None
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        # Of another rank each, where 0.9 of the energy is.
        torch.manual_seed(seed)
        model[0].weight.data = torch.randn(16, 16) * torch.arange(1, 17).float() ** (-0.5 - seed)
        transition = prepared(model, {"0": rule}, LocalLoss(), step=4)
        if state is not None:
            model.load_state_dict(state[0])
            transition.load_state_dict(state[1])
        state = model.state_dict(), transition.state_dict()
        model(torch.ones(3, 16))
        losses.append(transition.auxiliary_loss())
    assert losses[0] > 0
    assert torch.equal(*losses)
