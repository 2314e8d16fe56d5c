"""Each technique of a chain fades in its own window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
import vanishing
from cases import LAYERS, Pair, Run, Technique, loss, outputs
from codebook import Codebook
from vanishing import (
    Binary,
    Compressor,
    Gradient,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    Quantization,
    Recipe,
    Rule,
    Split,
    Staggered,
    StepSchedule,
    WidthPruning,
)
from vanishing.compressors import Chain

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

WINDOWS = (LinearSchedule(steps=3, start=1), LinearSchedule(steps=3, start=3), LinearSchedule(steps=2, start=6))
"""They overlap, and end one after another."""
END = 8

CHAINS: dict[str, Chain] = {
    "pruned_4_bits": MagnitudePruning(0.6) | Quantization(bits=4, symmetric=False),
    "pruned_binary": MagnitudePruning(0.6) | Binary(),
    "pruned_exact_2_bits_clipped": MagnitudePruning(0.6, gradient=Gradient.EXACT, freeze=True)
    | Quantization(bits=2, gradient=Gradient.CLIPPED),
    "pruned_codebook": MagnitudePruning(0.6) | Codebook(bits=2),
    "pruned_decaying_3_bits_searched": MagnitudePruning(0.6, gradient=Gradient.DECAYING, decay=0.1)
    | Quantization(3, clip=0.4, damping=0.1),
    "low_rank_pruned_decaying_3_bits_searched": LowRank(ratio=0.5)
    | MagnitudePruning(0.5, gradient=Gradient.DECAYING, decay=0.1)
    | Quantization(3, clip=0.4, damping=0.1),
    "low_rank_8_bits": LowRank(ratio=0.5) | Quantization(bits=8),
    "low_rank_pruned_4_bits": LowRank(ratio=0.5) | MagnitudePruning(0.5) | Quantization(bits=4),
    "low_rank_by_energy_pruned": LowRank(energy=0.8) | MagnitudePruning(0.5),
    "tucker_8_bits": LowRank(energy=0.8, split=Split.TUCKER) | Quantization(bits=8),
}
KINDS = ("linear", "conv2d_groups", "embedding", "linear_tied", "attention", "lstm")
CELLS = [
    (kind, name) for kind in KINDS for name, chain in CHAINS.items()
    if not (chain.replaces_layer and "factors" in LAYERS[kind].refuses)
]  # fmt: skip
cells = pytest.mark.parametrize(("kind", "name"), CELLS, ids=["-".join(cell) for cell in CELLS])


def rule(chain: Chain, schedules: Any = WINDOWS) -> Rule:
    return Rule(chain, schedules=tuple(schedules[: len(chain.compressors)]))


def prepared(kind: str, name: str, seed: int = 0) -> Run:
    """A run of the table's, in which each technique has its window."""
    layer, chain = LAYERS[kind], CHAINS[name]
    recipe = Recipe(dict.fromkeys(layer.names, rule(chain)), schedule=LinearSchedule(steps=1))
    return Run(Pair(layer, Technique(chain)), layer.build(seed), torch.float32, recipe)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@cells
def test_while_every_beta_is_1_no_output_and_no_gradient_changes_a_bit(kind: str, name: str) -> None:
    plain, run = LAYERS[kind].build(), prepared(kind, name)
    batch = run.layer.batch()
    assert same(run.outputs(), outputs(plain, run.layer.batch(99)))
    loss(run.model(*batch)).backward()
    loss(plain(*run.layer.batch())).backward()
    got = [p.grad for p in run.model.parameters() if p.grad is not None]
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(got) == len(expected)
    # Parametrized weights come last among the parameters of their layer.
    assert sorted(g.double().sum().item() for g in got) == sorted(e.double().sum().item() for e in expected)


@cells
def test_at_the_end_it_is_the_chain_and_nothing_of_the_original_is_left(kind: str, name: str, tmp_path: Path) -> None:
    run, plain = prepared(kind, name).train(END), LAYERS[kind]
    assert {beta for betas in run.transition.betas.values() for beta in betas} == {0.0}
    assert run.transition.done
    # A chain with one beta, and the same weights and masks.
    together = vanishing.prepare(plain.build(1), plain.recipe(CHAINS[name], schedule=StepSchedule(at=0))).model
    known = together.state_dict().keys()
    kept = {k.replace(".1.form.part.", ".0.form.parts.1."): v for k, v in run.model.state_dict().items()}
    together.load_state_dict(
        {k if k in known else "form.parts.0.".join(k.rsplit("form.", 1)): v for k, v in kept.items()}
    )
    expected = run.outputs()
    assert same(outputs(together, run.layer.batch(99)), expected)
    run.transition.finish()
    for got, wanted in zip(run.outputs(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    vanishing.save(run.model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", plain.build(5))
    assert same(outputs(loaded, run.layer.batch(99)), run.outputs())


@cells
def test_a_run_is_split_without_a_trace(kind: str, name: str) -> None:
    whole, states = prepared(kind, name), []
    for step in range(END + 2):
        states.append(whole.train(step).state())
    for state in states:
        split = prepared(kind, name, seed=1).load(state).train(END + 1)
        assert all(torch.equal(split.state()["model"][k], v) for k, v in states[-1]["model"].items())


def test_each_technique_blends_what_the_ones_before_leave() -> None:
    layer = nn.Linear(12, 6, bias=False)
    weight = layer.weight.detach().clone()
    chain = MagnitudePruning(0.5) | Quantization(bits=3, granularity=vanishing.PerTensor())
    transition = vanishing.prepare(nn.Sequential(layer), Recipe({"*": rule(chain)}, schedule=LinearSchedule(steps=1)))
    for step in range(END):
        transition.seek(step)
        first, second = (window(step) for window in WINDOWS[:2])
        assert transition.betas == {"0": (first, second)}
        pruned = first * weight + (1 - first) * reference.prune_per_tensor(weight, 0.5)
        quantized = reference.quantize_symmetric(pruned, 3) * (pruned != 0)
        torch.testing.assert_close(layer.weight, second * pruned + (1 - second) * quantized)


def test_after_low_rank_the_others_fade_on_its_factors() -> None:
    layer = nn.Linear(12, 6, bias=False)
    weight = layer.weight.detach().clone()
    chain = LowRank(rank=3) | Quantization(bits=4)
    transition = vanishing.prepare(nn.Sequential(layer), Recipe({"*": rule(chain)}, schedule=StepSchedule(at=0)))
    transition.seek(0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    factors = [u[:, :3] * s[:3].sqrt(), s[:3, None].sqrt() * v[:3]]
    for step in range(END):
        transition.seek(step)
        first, second = (window(step) for window in WINDOWS[:2])
        rows = [torch.stack([reference.quantize_symmetric(row, 4) for row in factor]) for factor in factors]
        left, right = (second * f + (1 - second) * q for f, q in zip(factors, rows, strict=True))
        torch.testing.assert_close(layer.weight, first * weight + (1 - first) * left @ right, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_straight_through_composition() -> None:
    layer = nn.Linear(10, 4, bias=False)
    chain = MagnitudePruning(0.5, gradient=Gradient.EXACT) | Quantization(bits=4)
    transition = vanishing.prepare(nn.Sequential(layer), Recipe({"*": rule(chain)}, schedule=StepSchedule(at=0)))
    transition.seek(3)
    latent: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
    mask = (reference.prune_per_tensor(latent.detach(), 0.5) != 0).float()
    beta = WINDOWS[0](3)
    layer.weight.sum().backward()
    torch.testing.assert_close(latent.grad, beta + (1 - beta) * mask)


def test_windows_in_any_order_and_layers_one_after_another() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    chain = MagnitudePruning(0.5) | Quantization(bits=4)
    staggered = Staggered(LinearSchedule(steps=4))
    own = Rule(chain, schedules=(StepSchedule(at=6), staggered))
    transition = vanishing.prepare(model, Recipe({"*": own}, schedule=LinearSchedule(steps=1)))
    transition.seek(1)
    assert transition.betas == {"0": (1.0, 0.5), "2": (1.0, 1.0)}
    transition.seek(4)
    assert transition.betas == {"0": (1.0, 0.0), "2": (1.0, 0.0)}
    assert not transition.done
    with transition.original():
        original = model(torch.ones(1, 8))
    with transition.compressed():
        assert not torch.equal(model(torch.ones(1, 8)), original)
    transition.cancel()
    assert torch.equal(model(torch.ones(1, 8)), original)


def test_a_mask_is_frozen_when_its_own_fade_is_over() -> None:
    layer = nn.Linear(8, 1, bias=False)
    chain = MagnitudePruning(0.5, freeze=True, update_every=1) | Quantization(bits=8)
    recipe = Recipe({"*": rule(chain, (LinearSchedule(steps=2), LinearSchedule(steps=9)))}, schedule=StepSchedule(at=0))
    transition = vanishing.prepare(nn.Sequential(layer), recipe)
    latent: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
    rising, falling = torch.arange(1.0, 9.0), torch.arange(1.0, 9.0).flip(0)
    for values in (rising, falling, rising, rising):
        with torch.no_grad():
            latent.copy_(values)
        transition.step()
    assert (layer.weight != 0).flatten().tolist() == [True] * 4 + [False] * 4


def test_the_summary_of_a_model_in_transition_is_that_of_the_finished_one() -> None:
    for name in ("pruned_4_bits", "low_rank_pruned_4_bits"):
        run = prepared("linear", name).train(END)
        before = vanishing.summary(run.model).after
        run.transition.finish()
        assert vanishing.summary(run.model).after == before


def test_structured_then_the_others_in_windows_of_their_own(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
        return BertModel(BertConfig(vocab_size=50, **sizes)).eval()

    model, tokens = build(), torch.arange(12)[None]
    transition = vanishing.prepare(model, WidthPruning(0.5), steps=2)
    transition.seek(2)
    transition.finish()
    chain = LowRank(rank=4) | MagnitudePruning(0.5) | Quantization(bits=4)
    recipe = Recipe({"encoder.*.dense": rule(chain)}, schedule=LinearSchedule(steps=1))
    transition = vanishing.prepare(model, recipe)
    transition.seek(END)
    expected = model(tokens).last_hidden_state
    transition.finish()
    torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", build())
    assert torch.equal(loaded.eval()(tokens).last_hidden_state, model(tokens).last_hidden_state)
    shapes = {tuple(p.shape) for name, p in loaded.named_parameters() if "intermediate" in name and p.ndim == 2}
    assert shapes == {(4, 16), (16, 4)}


@pytest.mark.parametrize(
    ("compressor", "schedules", "words"),
    [
        (CHAINS["pruned_binary"], WINDOWS, "got 3 for 2"),
        (CHAINS["pruned_binary"], WINDOWS[:1], "got 1 for 2"),
        (Binary(), WINDOWS[:1], r"Binary\(\) is one technique. Use `schedule`"),
        (CHAINS["pruned_binary"], (Binary(), Binary()), "schedules"),
    ],
)
def test_there_is_one_schedule_for_each_technique(compressor: Compressor, schedules: Any, words: str) -> None:
    with pytest.raises(vanishing.ConfigError, match=words):
        Rule(compressor, schedules=schedules)
    with pytest.raises(vanishing.ConfigError, match="takes one of the two"):
        Rule(CHAINS["pruned_binary"], schedule=WINDOWS[0], schedules=WINDOWS[:2])


def test_schedules_of_a_chain_round_trip_and_may_be_shares_of_the_training() -> None:
    shares = (LinearSchedule(steps="30%"), LinearSchedule(start="30%", steps="20%"))
    recipe = Recipe({"*": rule(CHAINS["pruned_binary"], shares)}, schedule=StepSchedule(at=0))
    assert recipe.is_relative
    assert Recipe.from_json(Recipe.from_yaml(recipe.to_yaml()).to_json()) == recipe
    transition = vanishing.prepare(nn.Sequential(nn.Linear(4, 4)), recipe)
    transition.set_length(100)
    assert transition.end == 50
    transition.seek(40)
    assert transition.betas == {"0": (0.0, 0.5)}
