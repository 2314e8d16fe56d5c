"""The laws of the design, for every technique on every layer kind of `cases.py`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vanishing
from cases import LAYERS, PAIRS, TECHNIQUES, LayerCase, Pair, Run, Technique, by_old_names, loss, outputs
from vanishing import Compressor, Gradient, LowRank, MagnitudePruning
from vanishing.blended_block import BlendedBlock
from vanishing.layers import Factored, QuantizedInput
from vanishing.places import join

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

BETA, END = 0.3, 5


def is_quick(layer: str, technique: str) -> bool:
    """Whether a pair belongs to the fast tests: the full table takes minutes."""
    both = LAYERS[layer].quick and TECHNIQUES[technique].quick
    return both or layer == "linear" or technique in ("binary", "rank_2")


def cells(pairs: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """Run a test for pairs of layer kind and technique."""
    return pytest.mark.parametrize(
        "pair",
        [
            pytest.param(PAIRS[cell], id="-".join(cell), marks=() if is_quick(*cell) else pytest.mark.slow)
            for cell in pairs
        ],
    )


accepted = cells(cell for cell, pair in PAIRS.items() if pair.layer.refusal(pair.technique) is None)
refused = cells(cell for cell, pair in PAIRS.items() if pair.layer.refusal(pair.technique) is not None)
linear = cells(c for c, pair in PAIRS.items() if pair.layer.linear and pair.layer.refusal(pair.technique) is None)


def blended_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every weight in transition: its layer, its name and the latent weight."""
    factors = {thin for module in model.modules() if isinstance(module, Factored) for thin in module}
    for module in model.modules():
        if parametrize.is_parametrized(module) and module not in factors:
            for name, parametrization in module.parametrizations.items():  # type: ignore[operator, union-attr]
                yield module, name, parametrization.original


def has_its_own_parameters(technique: Technique) -> bool:
    """Whether the compressed form shares no weight with the original."""
    return technique.compressor.replaces_layer if isinstance(technique.compressor, vanishing.WeightCompressor) else True


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    """Compare to the last bit."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare within a tolerance relative to the largest value."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        scale = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def gradients(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    """The gradients of a fixed random projection of a value; zeros where there is none."""
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype)
    return list(torch.autograd.grad(value, of, direction, materialize_grads=True))


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """Keep what was imported out of the garbage collector's sight, which some tests ask to look for lost weights."""
    gc.freeze()
    yield
    gc.unfreeze()


@accepted
def test_1_the_outer_shapes_stay(pair: Pair) -> None:
    shapes = [tensor.shape for tensor in outputs(pair.layer.build(), pair.layer.batch(99))]
    run = pair.prepare().train(2)
    for context in (run.transition.original, run.transition.compressed):
        with context():
            assert [tensor.shape for tensor in run.outputs()] == shapes
            for module, name, latent in blended_weights(run.model):
                assert getattr(module, name).shape == latent.shape
    assert [tensor.shape for tensor in run.outputs()] == shapes


@accepted
def test_2_at_beta_1_no_output_and_no_gradient_changes_a_bit(pair: Pair) -> None:
    plain, run = pair.layer.build(), None
    model = pair.layer.build()
    parameters = dict(model.named_parameters())
    run = Run(pair, model, torch.float32, pair.layer.recipe(pair.technique.compressor))
    assert run.transition.beta == 1.0
    for training in (True, False):
        batches = [pair.layer.batch(), pair.layer.batch()]
        for each, batch in zip((plain, model), batches, strict=True):
            each.train(training)
            each.zero_grad()
            loss(each(*batch)).backward()
        for one, other in zip(*batches, strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
        for name, parameter in plain.named_parameters():
            assert_same_bits([parameters[name].grad], [parameter.grad])  # type: ignore[list-item]
    assert_same_bits(run.outputs(), outputs(plain, pair.layer.batch(99)))
    originals = set(parameters.values())
    assert all(parameter.grad is None for parameter in model.parameters() if parameter not in originals)


@accepted
def test_3_at_beta_0_the_original_has_no_influence(pair: Pair) -> None:
    run = pair.prepare().train(2)
    with run.transition.compressed():
        before = run.outputs()
        assert all(tensor.isfinite().all() for tensor in before)
        weights = {
            (id(module), name): getattr(module, name).detach().clone() for module, name, _ in blended_weights(run.model)
        }
        own = has_its_own_parameters(pair.technique)
        originals = [latent for _, _, latent in blended_weights(run.model)]
        originals += [p for m in run.model.modules() if isinstance(m, BlendedBlock) for p in m.original.parameters()]
        if own:
            loss(run.model(*pair.layer.batch())).backward()
            assert all(p.grad is None for p in originals if not _is_shared(run.model, p))
            with torch.no_grad():
                for original in originals:
                    if not _is_shared(run.model, original):
                        original.fill_(torch.nan)
            assert_same_bits(run.outputs(), before)
    if own:
        # The poison works: with a share of the original, its outputs are lost.
        assert any(not tensor.isfinite().all() for tensor in run.outputs())
        return
    places = [(module, name, weights[id(module), name]) for module, name, _ in blended_weights(run.model)]
    quantizers = {module: input_quantizer(module, name) for module, name, _ in blended_weights(run.model)}
    run.transition.cancel()
    with torch.no_grad():
        for module, name, weight in places:
            module.get_parameter(name).copy_(weight)
    for module, quantizer in quantizers.items():
        if quantizer is not None:
            module.register_forward_pre_hook(lambda _, x, quantizer=quantizer: (quantizer(x[0]), *x[1:]))
    assert_close(run.outputs(), before, 1e-6)


def input_quantizer(module: nn.Module, name: str) -> nn.Module | None:
    """What the layer's input goes through in its compressed form."""
    return module.parametrizations[name][0].form.input_quantizer  # type: ignore[index, union-attr]


def _is_shared(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether both forms use it, as they do a factored layer's bias."""
    replaced = [m.replacement for m in model.modules() if isinstance(m, BlendedBlock)]
    return any(parameter is p for block in replaced for p in block.parameters())


@accepted
def test_4_the_blended_weight_is_the_blend_of_the_weights(pair: Pair) -> None:
    run = pair.prepare(dtype=torch.float64).train(1)
    for module, name, latent in blended_weights(run.model):
        blend = module.parametrizations[name][0]  # type: ignore[index]
        of = [latent, *blend.parameters()]  # type: ignore[union-attr]
        got = blend.form.blend(latent, BETA)  # type: ignore[union-attr]
        expected = BETA * latent + (1 - BETA) * blend.form.compress(latent)  # type: ignore[union-attr]
        assert_close([got, *gradients(got, of)], [expected, *gradients(expected, of)], 1e-12)


@linear
def test_4_blending_weights_is_blending_outputs(pair: Pair) -> None:
    run = pair.prepare(dtype=torch.float64, schedule=vanishing.LinearSchedule(steps=10)).train(7)
    beta = run.transition.beta
    assert beta == pytest.approx(0.3)
    batch = pair.layer.batch(7, torch.float64)
    of = [p for p in (*batch, *run.model.parameters()) if p.requires_grad]
    got = run.model(*batch)
    with run.transition.original():
        original = run.model(*batch)
    with run.transition.compressed():
        compressed = run.model(*batch)
    expected = beta * original + (1 - beta) * compressed
    assert_close([got, *gradients(got, of)], [expected, *gradients(expected, of)], 1e-12)


@accepted
def test_5_finish_leaves_what_the_transition_computed_at_beta_0(pair: Pair) -> None:
    model = pair.layer.build()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    model.get_submodule(pair.layer.names[0]).requires_grad_(True).train()
    run = Run(pair, model, torch.float32, pair.layer.recipe(pair.technique.compressor))
    run.train(END)
    assert run.transition.done
    latents = [weakref.ref(latent) for _, _, latent in blended_weights(model)]
    with run.transition.compressed():
        expected = run.outputs()
    assert_same_bits(run.outputs(), expected)

    assert run.transition.finish() is model
    assert_close(run.outputs(), expected, 1e-6)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {id(p) for p in run.optimizer.state} <= held
    if has_its_own_parameters(pair.technique):
        gc.collect()
        assert not any(latent() is not None for latent in latents)
        assert not any(isinstance(module, BlendedBlock) for module in model.modules())
        return
    quantizes = pair.technique.compressor.quantizes_input  # type: ignore[attr-defined]
    assert any(isinstance(module, QuantizedInput) for module in model.modules()) == quantizes
    modules = by_old_names(model)
    assert {name: type(module) for name, module in modules.items()} == kinds
    found = [(join(n, p), id(q)) for n, m in modules.items() for p, q in m.named_parameters(recurse=False)]
    # A tied one has its first name alone.
    assert list({number: (name, number) for name, number in reversed(found)}.values())[::-1] == parameters
    assert {name: set(vars(m)) - {"_vanishing_receipt"} for name, m in modules.items()} == before


@accepted
def test_6_a_file_gives_the_same_outputs_and_holds_no_original(pair: Pair, tmp_path: Path) -> None:
    run = pair.prepare().train(END)
    latents = [latent.detach().clone() for _, _, latent in blended_weights(run.model)]
    run.transition.finish()
    expected = run.outputs()
    vanishing.save(run.model, tmp_path / "small")
    for stored in load_file(tmp_path / "small" / "model.safetensors").values():
        assert not any(stored.shape == latent.shape and torch.allclose(stored, latent) for latent in latents)
    fresh = pair.layer.build(seed=1)
    loaded = vanishing.load(tmp_path / "small", fresh)
    assert_same_bits(outputs(loaded, pair.layer.batch(99)), expected)


LOSSLESS: dict[str, Compressor] = {
    "pruned": MagnitudePruning(sparsity=0.0),
    "pruned_per_channel": MagnitudePruning(sparsity=0.0, granularity=vanishing.PerChannel()),
    "pruned_globally": MagnitudePruning(sparsity=0.0, granularity=vanishing.Global(), gradient=Gradient.EXACT),
    "full_rank": LowRank(energy=1.0),
    "full_rank_pruned": LowRank(energy=1.0) | MagnitudePruning(sparsity=0.0),
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float", "double"]
)
def test_7_in_the_lossless_limit_nothing_changes(layer: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = LAYERS[layer]
    if "full_rank" in name and "factors" in case.refuses:
        with pytest.raises(vanishing.RecipeError):
            Pair(case, Technique(LOSSLESS[name])).prepare()
        return
    run = Pair(case, Technique(LOSSLESS[name])).prepare(dtype=dtype)
    with run.transition.compressed():
        got = run.outputs()
    assert_close(got, outputs(case.build(dtype=dtype), case.batch(99, dtype)), tolerance)


@accepted
def test_8_a_run_that_is_split_at_any_step_ends_with_the_same_bits(pair: Pair) -> None:
    whole, snapshots = pair.prepare(), []
    for step in range(END):
        snapshots.append(whole.train(step).state())
    end = whole.train(END).state()
    final = whole.transition.finish().state_dict()
    for step, snapshot in enumerate(snapshots):
        # Other random weights, all of which the state must overwrite.
        split = pair.prepare(seed=1).load(snapshot)
        assert split.transition.steps_done == step
        assert_same_state(split.train(END).state(), end)
        assert_same_state(dict(split.transition.finish().state_dict()), dict(final))


def assert_same_state(got: Any, expected: Any) -> None:
    """Compare nested states to the last bit."""
    if isinstance(expected, Tensor):
        assert_same_bits([got], [expected])
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same_state(got[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(got, expected, strict=True):
            assert_same_state(one, other)
    else:
        assert got == expected


@refused
def test_a_pair_that_is_refused_is_refused_before_anything_changes(pair: Pair) -> None:
    model = pair.layer.build()
    before, expected = list(model.named_modules()), outputs(model, pair.layer.batch(99))
    reason = pair.layer.refusal(pair.technique)
    assert reason is not None
    with pytest.raises(vanishing.RecipeError, match=reason):
        vanishing.prepare(model, pair.layer.recipe(pair.technique.compressor), calibration=pair.calibration())
    assert list(model.named_modules()) == before
    assert_same_bits(outputs(model, pair.layer.batch(99)), expected)


@pytest.mark.parametrize("layer", [n for n, case in LAYERS.items() if "factors" in case.refuses and n != "linear_tied"])
def test_a_glob_leaves_what_a_technique_never_takes_and_says_why(layer: str) -> None:
    case: LayerCase = LAYERS[layer]
    model = nn.Sequential(case.build(), nn.Linear(4, 4))
    recipe = vanishing.Recipe({"*": LowRank(ratio=0.5)}, schedule=vanishing.LinearSchedule(steps=4))
    plan = recipe.match(model)
    rows = {row.name: row for row in plan.rows}
    assert rows["1"].outcome == "compress"
    said = [row.detail for row in rows.values() if row.outcome == "left"] + plan.problems
    assert any(case.refuses["factors"] in reason for reason in said)
