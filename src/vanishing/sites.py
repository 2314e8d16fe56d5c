"""The places in a model where a transition goes on: weights of layers, and blocks."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vanishing.blend import Blend
from vanishing.blended_block import BlendedBlock
from vanishing.blended_weight import (
    BlendedWeight,
    blended_weights,
    compressed_in_turn,
    grid_in_turn,
    install_blended_weight,
    remove_blended_weight,
)
from vanishing.compressors import BlockCompressor, CompressedWeight, Compressor
from vanishing.compressors.chain import Chain
from vanishing.compressors.low_rank import LowRankWeight
from vanishing.compressors.structured import TakenUnits
from vanishing.distributed import whole
from vanishing.equality import difference_beyond_rounding
from vanishing.errors import ConfigError, TransitionError
from vanishing.layers import Factored, QuantizedInput
from vanishing.narrowing import Exchanged
from vanishing.places import Places, drop_copied_hooks
from vanishing.plan import Plan, PlannedBlock, PlannedWeight
from vanishing.pulls import PulledWeight
from vanishing.random_state import random_state_kept
from vanishing.receipt import FinishedLayer
from vanishing.structure import cut, recount

_TOLERANCE = 1e-5


class Site(ABC):
    """One place where original and compressed form meet.

    The life of a site: made (the model is unchanged), `install`, then `release` and `finish`, or `remove`.
    """

    name: str
    rule: int
    blend: Blend
    compressor: Compressor

    @property
    def stages(self) -> list[list[Blend]]:
        """The blends that have one beta: one list, or one for each technique of a chain that fade by themselves."""
        return [[self.blend]]

    @abstractmethod
    def install(self, places: Places) -> None:
        """Change the model."""

    @abstractmethod
    def remove(self, places: Places) -> None:
        """Give the model its original back."""

    @abstractmethod
    def check(self) -> None:
        """Raise `TransitionError` if what `finish` would leave differs from the transition at beta = 0."""

    def release(self, places: Places) -> None:
        """Let go of what would be in the way when other sites finish; by default there is nothing."""
        return

    @abstractmethod
    def finish(self, places: Places) -> dict[str, FinishedLayer]:
        """Leave the compressed form in the model; return what was done, by module name."""

    @abstractmethod
    def forms(self, stage: int) -> Iterator[CompressedWeight]:
        """Yield every compressed weight of a stage."""

    @abstractmethod
    def pulled_weights(self) -> list[PulledWeight]:
        """Return the latent weights at which techniques pull."""

    @property
    @abstractmethod
    def original_parameters(self) -> list[nn.Parameter]:
        """The parameters of the original form; the compressed one may have some of them too."""

    @property
    @abstractmethod
    def new_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the compressed form has."""

    @property
    @abstractmethod
    def replaced_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the original form has."""

    @property
    def idle_parameters(self) -> list[nn.Parameter]:
        """The parameters of the form that has no part in what is computed now."""
        if self.blend.beta == 0.0:
            return self.replaced_parameters
        # What is compared learns while it has no share.
        return self.new_parameters if self.blend.beta == 1.0 and self.blend.comparison is None else []


class WeightSite(Site):
    """A weight, blended in weight space, with every layer that holds it."""

    blend: BlendedWeight

    def __init__(self, planned: PlannedWeight, *, ramped: bool, in_turn: bool) -> None:
        self.name = planned.names[0]
        self.rule = planned.rule
        self.compressor = planned.compressor
        self.planned = planned
        weight = planned.layer.weight
        assert isinstance(weight, nn.Parameter)
        if in_turn:
            assert isinstance(planned.compressor, Chain)
            self._stage_count = len(planned.compressor.compressors)
            forms = planned.compressor.forms_in_turn(planned.layer, ramped=ramped)
        else:
            self._stage_count = 1
            forms = [planned.compressor.form(planned.layer, ramped=ramped)]
        self._blends = [BlendedWeight(form).to(weight.device) for form in forms]
        self.blend = self._blends[0]
        self._orders = [tuple(module._parameters) for module, _ in planned.owners]
        first = planned.layer.module
        self._before = (sum(p.numel() for p in first.parameters(recurse=False)), _bytes(first))

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight; asked for anew, as loading and casting may put another parameter in its place."""
        return _latent_weight(*self.planned.owners[0])

    @property
    def stages(self) -> list[list[Blend]]:
        form = self.blend.form
        if self._stage_count == 1:
            return [[self.blend]]
        if isinstance(form, LowRankWeight):
            # Asked for anew, as loading another rank makes new ones.
            factors = zip(*(blends for blends, _ in form.factor_blends().values()), strict=True)
            return [[self.blend], *(list(blends) for blends in factors)]
        return [[blend] for blend in self._blends]

    @torch.no_grad()
    def gap(self) -> float:
        """Return the distance of the compressed weight from the latent one, as a share of the latter's norm."""
        weight = whole(self.weight)
        distance = (compressed_in_turn(self._blends, weight) - weight).norm()
        return float(distance / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny))

    @property
    def quantizes_input(self) -> bool:
        """Whether a technique rounds what goes into the layer."""
        return self._blends[-1].form.input_quantizer is not None

    @property
    def idle_parameters(self) -> list[nn.Parameter]:
        idle = self.replaced_parameters if self.blend.beta == 0.0 else []
        waiting = [b for stage in self.stages for b in stage if b.beta == 1.0 and b.comparison is None]
        if waiting:
            theirs = {id(p) for blend in waiting for p in blend.parameters()}
            idle = idle + [p for p in self.new_parameters if id(p) in theirs]
        return idle

    def _weights(self) -> list[nn.Parameter]:
        """The latent weight of every owner: one parameter, unless something has untied them."""
        return [_latent_weight(module, name) for module, name in self.planned.owners]

    def forms(self, stage: int) -> Iterator[CompressedWeight]:
        if self._stage_count > 1 and isinstance(self.blend.form, LowRankWeight) and stage == 0:
            # Those on its factors are of other stages.
            yield self.blend.form
            return
        for blend in self.stages[stage]:
            for module in blend.modules():
                if isinstance(module, CompressedWeight):
                    yield module

    def selected(self, stage: int) -> list[tuple[CompressedWeight, Tensor]]:
        """Return the forms that a technique renews after a step, each with its latent weight.

        Only a mask is kept between steps, and it comes first on its weight: it is selected on the latent one.
        """
        if stage == 0:
            return [(self.blend.form, self.weight.detach())]
        form = self.blend.form
        if stage > 1 or not isinstance(form, LowRankWeight):
            return []
        return [(blends[0].form, weight.detach()) for blends, weight in form.factor_blends().values()]

    def following(self, stage: int) -> list[tuple[CompressedWeight, Callable[[], Tensor]]]:
        """Return the forms of a technique that comes after another on their weight, with what returns what they see."""
        form = self.blend.form
        if isinstance(form, LowRankWeight):
            turn, in_turn = stage - 1, list(form.factor_blends().values())
        else:
            turn, in_turn = stage, [(self._blends, self.weight)]
        if turn < 1:
            return []
        return [(blends[turn].form, functools.partial(_seen, blends[:turn], weight)) for blends, weight in in_turn]

    def pulled_weights(self) -> list[PulledWeight]:
        form = self.blend.form
        if isinstance(form, LowRankWeight):
            share = 1.0 - self.blend.beta
            factors = form.factor_blends().values()
            return [PulledWeight(weight, blends, share) for blends, weight in factors if _pull(blends)]
        if not _pull(self._blends):
            return []
        return [PulledWeight(weight, self._blends, 1.0) for weight in dict.fromkeys(self._weights())]

    @property
    def original_parameters(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(self._weights()))

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        shared = {id(p) for module, _ in self.planned.owners for p in module._parameters.values()}
        return [p for blend in self._blends for p in blend.parameters() if id(p) not in shared]

    @property
    def replaced_parameters(self) -> list[nn.Parameter]:
        return [] if self.blend.form.shares_weight else self.original_parameters

    def install(self, places: Places) -> None:
        for module, name in self.planned.owners:
            install_blended_weight(module, name, self._blends)

    def remove(self, places: Places) -> None:
        for (module, name), order in zip(self.planned.owners, self._orders, strict=True):
            remove_blended_weight(module, name, order)

    def check(self) -> None:
        form = self.blend.form
        if not isinstance(form, LowRankWeight):
            return
        layer = self.planned.layer
        plain = form.plain_layers(layer.module)
        with torch.no_grad(), random_state_kept(self.weight.device):
            probe = layer.kind.probe_input(layer.module)
            assert probe is not None
            expected, got = layer.module.forward(probe), plain(probe)
        difference = difference_beyond_rounding([expected], [got], _TOLERANCE)
        if difference is not None:
            raise TransitionError(
                f"{self.name!r} would change when it is finished: its outputs differ by {difference:.3g} from those at "
                f"beta = 0. This is a defect of the technique, not of your model; transition.cancel() gives the "
                f"original back."
            )

    @torch.no_grad()
    def finish(self, places: Places) -> dict[str, FinishedLayer]:
        form, layer = self.blend.form, self.planned.layer
        if isinstance(form, LowRankWeight):
            blends = form.factor_blends().items()
            grids = {f"{path}.weight": g for path, (each, w) in blends if (g := grid_in_turn(each, w))}
            plain = form.plain_layers(layer.module)
            _make_factors_plain(plain)
            plain.keep_bias(getattr(layer.module, "bias", None))
            self.remove(places)
            places.put(layer.module, plain)
            structure = "factored"
        else:
            grid = grid_in_turn(self._blends, self.weight)
            grids = {name: grid for _, name in self.planned.owners} if grid else {}
            # Adding zero turns the -0 of a pruned negative weight into the 0 that the file gives back.
            final = compressed_in_turn(self._blends, self.weight) + 0.0
            self.remove(places)
            for weight in self._weights():
                weight.copy_(final)
            structure = "weight"
            on_input = self._blends[-1].form.input_quantizer
            if on_input is not None:
                structure, grids = "quantized_input", {f"layer.{name}": grid for name, grid in grids.items()}
                quantizer = on_input.plain()
                for module, _ in self.planned.owners:
                    places.put(module, QuantizedInput(quantizer, module))
        finished = FinishedLayer(self.planned.compressor, structure, *self._before, grids)
        return dict.fromkeys(self.planned.names, finished)


class StructureSite(WeightSite):
    """The weights that take units up, blended in weight space, and the layers that make them."""

    def __init__(self, planned: PlannedWeight, *, ramped: bool, in_turn: bool) -> None:
        assert planned.layer.group is not None
        self.group = planned.layer.group
        owners = tuple((part.layer, "weight") for part in self.group.takers)
        super().__init__(dataclasses.replace(planned, owners=owners), ramped=ramped, in_turn=in_turn)
        layers = {part.name: part.layer for part in self.group.parts}
        self._sizes = {n: (sum(p.numel() for p in layer.parameters()), _bytes(layer)) for n, layer in layers.items()}
        self.narrowed: Exchanged = []

    @property
    def original_parameters(self) -> list[nn.Parameter]:
        return super().original_parameters + [p for part in self.group.makers for p in part.layer.parameters()]

    def release(self, places: Places) -> None:
        # A layer that takes units up may make those of another site, which cuts it as well.
        self.remove(places)

    @torch.no_grad()
    def finish(self, places: Places) -> dict[str, FinishedLayer]:
        form = self.blend.form
        assert isinstance(form, TakenUnits)
        kept = form.kept
        shapes = {part.name: part.shape for part in self.group.parts}
        self.narrowed = cut(self.group, kept)
        finished = {
            name: FinishedLayer(self.compressor, "weight", *self._sizes[name], {}, narrowed_from=shape)
            for name, shape in shapes.items()
        }
        counts = recount(self.group, len(kept))
        if counts:
            finished[self.group.owner_name] = FinishedLayer(self.compressor, "weight", 0, 0, {}, counts=counts)
        return finished


class BlockSite(Site):
    """A block and its replacement, blended on outputs."""

    blend: BlendedBlock

    def __init__(self, planned: PlannedBlock) -> None:
        self.name = planned.name
        self.rule = planned.rule
        self.compressor = planned.compressor
        replacement = planned.compressor.build(planned.block)
        if any(isinstance(module, (BlendedBlock, BlendedWeight)) for module in replacement.modules()):
            raise ConfigError("the replacement is in a transition of its own. Finish that one in the factory.")
        drop_copied_hooks(replacement, planned.block)
        self.blend = BlendedBlock(planned.block, replacement, planned.name)
        device = next((p.device for p in planned.block.parameters()), None)
        if device is not None:
            self.blend.beta_tensor = self.blend.beta_tensor.to(device)
        self._observer = planned.observer

    def calibrate(self) -> None:
        """Give the compressed form what was observed in the calibration pass."""
        if self._observer is not None:
            assert isinstance(self.compressor, BlockCompressor)
            self.compressor.calibrate(self.blend.replacement, self._observer)

    def forms(self, stage: int) -> Iterator[CompressedWeight]:
        return iter(())

    def pulled_weights(self) -> list[PulledWeight]:
        return []

    @property
    def original_parameters(self) -> list[nn.Parameter]:
        return list(self.blend.original.parameters())

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        held = {id(p) for p in self.blend.original.parameters()}
        return [p for p in self.blend.replacement.parameters() if id(p) not in held]

    @property
    def replaced_parameters(self) -> list[nn.Parameter]:
        kept = {id(p) for p in self.blend.replacement.parameters()}
        return [p for p in self.blend.original.parameters() if id(p) not in kept]

    def install(self, places: Places) -> None:
        places.put(self.blend.original, self.blend)

    def remove(self, places: Places) -> None:
        places.put(self.blend, self.blend.original)

    def check(self) -> None:
        # The very module that ran at beta = 0 is what stays.
        return

    def finish(self, places: Places) -> dict[str, FinishedLayer]:
        original, replacement = self.blend.original, self.blend.replacement
        before = (sum(p.numel() for p in original.parameters()), sum(_bytes(m) for m in original.modules()))
        places.put(self.blend, replacement)
        return {self.name: FinishedLayer(self.compressor, "replaced", *before, {})}


def _pull(blends: Sequence[BlendedWeight]) -> bool:
    return any(blend.form.pulls for blend in blends)


def _seen(blends: Sequence[BlendedWeight], weight: Tensor) -> Tensor:
    """What blends make of a latent weight at this moment."""
    value = whole(weight.detach())
    for blend in blends:
        value = blend(value)
    return value


def _latent_weight(module: nn.Module, name: str) -> nn.Parameter:
    """Return a layer's weight, in transition or plain, without the many calls of `parametrize.is_parametrized`."""
    holder: Any = module
    parametrizations: Any = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        holder, name = parametrizations._modules[name], "original"
    return cast(nn.Parameter, holder._parameters[name])


def build_weight_site(planned: PlannedWeight, *, ramped: bool, in_turn: bool) -> WeightSite:
    """Return the place of a weight, with a beta for all of a chain or for each technique of it (`in_turn`)."""
    site = WeightSite if planned.layer.group is None else StructureSite
    return site(planned, ramped=ramped, in_turn=in_turn)


def build_block_sites(plan: Plan) -> list[BlockSite]:
    """Return the blocks with their replacements; a factory that fails to make one adds to the plan's problems."""
    sites = []
    for block in plan.blocks:
        try:
            sites.append(BlockSite(block))
        except ConfigError as error:
            plan.problems.append(f"{block.name!r} cannot be replaced: {error}")
    return sites


def _make_factors_plain(plain: Factored) -> None:
    for layer in plain.thin_layers().values():
        for name, blends in list(blended_weights(layer)):
            weight = layer.parametrizations[name].original  # type: ignore[index,union-attr]
            final = compressed_in_turn(blends, weight) + 0.0
            remove_blended_weight(layer, name, (name, "bias"))
            weight.copy_(final)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
