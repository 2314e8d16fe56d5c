"""A prepared model is traced once while beta moves, and once more when the original is gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vanishing
from vanishing import (
    ActivationQuantization,
    Adaptive,
    Binary,
    Gradient,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Order,
    PerGroup,
    Quantization,
    Range,
    Recipe,
    Replace,
    Rule,
    Staggered,
    Teacher,
    Ternary,
)
from vanishing.distillation import Distillation

QUICK = {"pruned", "pruned_decaying", "binary", "low_rank", "8_bits_inputs_8_bits"}
COMPRESSORS: dict[str, vanishing.Compressor] = {
    "pruned": MagnitudePruning(0.5),
    "pruned_exact_gradient": MagnitudePruning(0.5, gradient=Gradient.EXACT),
    "pruned_decaying": MagnitudePruning(0.5, gradient=Gradient.DECAYING, decay=0.1),
    "3_bits_asymmetric_damped": Quantization(bits=3, symmetric=False, damping=0.1),
    "binary": Binary(),
    "ternary": Ternary(),
    "4_bits": Quantization(bits=4, granularity=PerGroup(size=5)),
    "2_bits_asymmetric_clipped": Quantization(bits=2, symmetric=False, gradient=Gradient.CLIPPED),
    "low_rank": LowRank(rank=2),
    "pruned_binary": MagnitudePruning(0.5) | Binary(),
    "low_rank_8_bits": LowRank(rank=2) | Quantization(bits=8),
    "8_bits_inputs_8_bits": Quantization(bits=8) | ActivationQuantization(bits=8),
    "inputs_8_bits_calibrated": ActivationQuantization(bits=8, range=Range.EXTREMES, symmetric=False),
    "8_bits_inputs_8_bits_learned": Quantization(bits=8) | ActivationQuantization(bits=8, range=Range.LEARNED),
}
FADE = LinearSchedule(steps=5)
SCHEDULES: dict[str, Recipe] = {
    "staggered": Recipe({"*": MagnitudePruning(0.5)}, schedule=Staggered(FADE)),
    "staggered_factors": Recipe({"*": LowRank(rank=2)}, schedule=Staggered(FADE, order=Order.LAST_TO_FIRST)),
    "adaptive": Recipe({"*": Binary()}, schedule=Adaptive(Staggered(FADE), limit=0.01, deadline=8, every=2)),
    "chain": Recipe(
        {"*": Rule(MagnitudePruning(0.5) | Binary(), schedules=(FADE, LinearSchedule(start=2, steps=5)))}, schedule=FADE
    ),
    "chain_on_factors": Recipe(
        {"*": Rule(LowRank(rank=2) | MagnitudePruning(0.5), schedules=(FADE, LinearSchedule(start=2, steps=5)))},
        schedule=FADE,
    ),
}


class Model(nn.Module):
    """A convolution and a block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 2)
        self.block = nn.Sequential(nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.convolution(x).flatten(1))


def run(
    compressor: vanishing.Compressor | Recipe, key: str, dtype: torch.dtype, compiled: bool, *losses: Distillation
) -> tuple[list[torch.Tensor], int]:
    """Outputs and losses over a whole transition, and how many graphs were traced."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model().to(dtype)
    if isinstance(compressor, Recipe):
        recipe = compressor
    else:
        recipe = Recipe({key: compressor}, schedule=LinearSchedule(steps=5), distillation=losses)
    looks = bool(recipe.match(model).observed())
    calibration = [torch.randn(4, 3, 3, 3, dtype=dtype)] if looks else None
    transition = vanishing.prepare(model, recipe, calibration=calibration)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch._dynamo.utils.counters.clear()
    outputs = []
    for _ in range(9):
        output = step(torch.randn(4, 3, 3, 3, dtype=dtype))
        auxiliary = transition.auxiliary_loss()
        (output.square().mean() + auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
        outputs += [output.detach(), auxiliary.detach()]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    transition.finish()
    return [*outputs, *(p.detach() for p in model.parameters())], graphs


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in COMPRESSORS])
def test_a_transition_is_two_graphs_and_computes_the_same(name: str) -> None:
    expected, _ = run(COMPRESSORS[name], "*", torch.float64, compiled=False)
    got, graphs = run(COMPRESSORS[name], "*", torch.float64, compiled=True)
    assert graphs == 2
    # beta is in single precision in a graph, and a symmetric quantizer has a row's largest weight between two codes.
    tolerance = 1e-2 if "bits" in name and "asymmetric" not in name else 1e-6
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_that_move_at_other_times_in_every_layer_are_two_graphs(name: str) -> None:
    expected, _ = run(SCHEDULES[name], "*", torch.float64, compiled=False)
    got, graphs = run(SCHEDULES[name], "*", torch.float64, compiled=True)
    assert graphs == 2
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """Scores of which some are masked with minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)


def test_a_compiled_block_with_infinite_outputs_is_blended_at_both_ends() -> None:
    model = nn.Sequential(Masked(), nn.Softmax(1), nn.Linear(3, 2))
    rules = {"0": Replace(lambda _: Masked(), name="masked anew"), "2": Binary()}
    transition = vanishing.prepare(model, Recipe(rules, schedule=Staggered(FADE)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for step in range(6):
        transition.seek(step)
        x = torch.randn(4, 4)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def narrow(block: nn.Module) -> nn.Module:
    """A smaller form of the model's block."""
    return nn.Sequential(nn.Linear(32, 2), nn.Tanh(), nn.Linear(2, 4))


def test_a_replaced_block_is_two_graphs() -> None:
    expected, _ = run(Replace(narrow), "block", torch.float64, compiled=False)
    got, graphs = run(Replace(narrow), "block", torch.float64, compiled=True)
    assert graphs == 2
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("losses", "expected_graphs"),
    [
        ((LocalLoss(),), 2),
        ((Teacher(features=("convolution", "block")),), 2),
        # One with the comparison and one without, while the original is there.
        ((LocalLoss(every=2), Teacher()), 3),
    ],
    ids=["local", "teacher", "both"],
)
@pytest.mark.parametrize(
    ("compressor", "key"),
    [(LowRank(rank=2), "*"), (MagnitudePruning(0.5), "*"), (Replace(narrow), "block")],
    ids=["low rank", "pruned", "replaced"],
)
def test_distillation_leaves_the_graphs_whole(
    compressor: vanishing.Compressor, key: str, losses: tuple[Distillation, ...], expected_graphs: int
) -> None:
    expected, _ = run(compressor, key, torch.float64, False, *losses)
    got, graphs = run(compressor, key, torch.float64, True, *losses)
    assert graphs == expected_graphs
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "binary", "low_rank", "pruned_exact_gradient"])
def test_a_model_in_bfloat16_is_traced_too(name: str) -> None:
    got, graphs = run(COMPRESSORS[name], "*", torch.bfloat16, compiled=True)
    assert graphs == 2
    # The zero of a recipe without distillation, a scalar, is in single precision.
    assert all(tensor.dtype is torch.bfloat16 for tensor in got if tensor.dim())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "binary", "low_rank"])
def test_contexts_are_obeyed_by_a_compiled_model(name: str) -> None:
    model = Model()
    transition = vanishing.prepare(model, COMPRESSORS[name], steps=10)
    transition.seek(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, 3, 3, 3)
    for context in (transition.original, transition.compressed):
        with context(), torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
