"""What a forward pass leaves for the losses that a recipe's distillation adds to the task's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from vanishing.blend import Blend, Comparison, Form
from vanishing.blended_weight import BlendedWeight
from vanishing.caches import caches_among
from vanishing.distillation import Distillation, LocalLoss, Teacher, relative_distance, sum_of
from vanishing.distributed import is_distributed, is_sharded
from vanishing.errors import TransitionError
from vanishing.inputs import evaluation
from vanishing.layers import find_kind
from vanishing.sites import Site, WeightSite
from vanishing.teacher import FrozenOriginal, find_features


class _Pass:
    """What one forward pass leaves: it is compared with the original's only if somebody asks."""

    def __init__(self, versions: dict[int, int]) -> None:
        self.versions = versions
        self.distances: list[Tensor] = []
        self.features: dict[str, list[Any]] = {}
        self.call: tuple[Any, ...] | None = None
        """Arguments, keywords and output."""
        self.loss: Tensor | None = None


class _Passes:
    """The last forward pass in training; every one has an object of its own, so that a compiled graph reads no other.

    Attributes:
        last: None before the first.
        is_under_way: whether the model is in it now.
    """

    def __init__(self) -> None:
        self.last: _Pass | None = None
        self.is_under_way = False

    @property
    def current(self) -> _Pass | None:
        """The pass that is under way."""
        return self.last if self.is_under_way else None


class AuxiliaryLoss:
    """The sum of the losses of a recipe's distillation.

    It is made while the model is the original, `attach` comes when the blends are in place, and `detach` at the end.
    What is on the modules are functions, not this object: a copy of the model has nothing to do with the teacher.

    Args:
        model: the original.
        distillation: what the recipe asks for.
        sites: where the forms meet.
    """

    def __init__(self, model: nn.Module, distillation: Sequence[Distillation], sites: Sequence[Site]) -> None:
        self._model = model
        self._sites = sites
        self._passes = _Passes()
        self._handles: list[RemovableHandle] = []
        self._local: LocalLoss | None = None
        self._comparison: Comparison | None = None
        self._compared: list[tuple[list[BlendedWeight], list[WeightSite]]] = []
        """What the hook of a layer looks at, and where that comes from."""
        self.teacher: FrozenOriginal | None = None
        for each in distillation:
            if isinstance(each, LocalLoss):
                # One throughout: a compiled graph is of these functions.
                self._local = each
                self._comparison = _comparison(model, self._passes, each.weight / _count(sites))
            elif isinstance(each, Teacher):
                blocks = [site.name for site in sites if not isinstance(site, WeightSite)]
                names = [name for name, _ in model.named_modules()]
                self.teacher = FrozenOriginal(model, each, find_features(names, each, blocks)[0])

    @property
    def is_wanted(self) -> bool:
        """Whether there is any."""
        return self._local is not None or self.teacher is not None

    def attach(self) -> None:
        """Let forward passes of the model in training leave what is needed."""
        if not self.is_wanted:
            return
        if self._local is not None:
            self._attach_to_layers()
        if self.teacher is not None:
            for name in self.teacher.features:
                module = self._model.get_submodule(name)
                self._handles.append(module.register_forward_hook(_keep_feature(self._passes, name)))
        begin, end = _around_a_pass(self._model, self._passes)
        self._handles.append(self._model.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(end, with_kwargs=True))

    def detach(self) -> None:
        """Leave the model alone, and let go of the teacher."""
        for handle in self._handles:
            handle.remove()
        for blend in self._blends():
            vars(blend).pop("comparison", None)
        self._handles, self._compared, self._sites, self._passes = [], [], [], _Passes()
        self._local = self.teacher = None

    def set_step(self, step: int) -> None:
        """Say how many optimizer steps are done."""
        if self._local is None:
            return
        for blends, sites in self._compared:
            # Loading factors of another rank makes new ones.
            blends[:] = _weight_blends(sites)
        comparison = self._comparison if step % self._local.every == 0 else None
        for blend in self._blends():
            if blend.comparison is not comparison:
                vars(blend).update(comparison=comparison)

    def value(self) -> Tensor:
        """Return the sum for the last forward pass, a scalar.

        Raises:
            TransitionError: there was no such pass, or it has changed its inputs.
        """
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        if not self.is_wanted or not (self._model.training and torch.is_grad_enabled()):
            return torch.zeros((), device=device)
        last = self._passes.last
        if last is None or last.call is None:
            raise TransitionError(
                "auxiliary_loss: the model that was given to prepare has not been called in training mode. Call that "
                "model itself, as a whole, and then auxiliary_loss in the same process."
            )
        if last.loss is None:
            losses = list(last.distances)
            self._refuse_sharded_inputs()
            if self.teacher is not None:
                if caches_among(*last.call[:2]):
                    raise TransitionError(
                        "Teacher: the model was trained with a cache of its caller, which the teacher would write to "
                        "as well. Train without past_key_values, or leave the teacher out of the recipe."
                    )
                now = _versions(*last.call[:2])
                if any(now.get(tensor, version) != version for tensor, version in last.versions.items()):
                    raise TransitionError(
                        "Teacher: the inputs of the last forward pass have been written to, and the teacher would get "
                        "others than the model got. Call auxiliary_loss before, or write into a copy."
                    )
                self.teacher.follow(device)
                arguments, keywords, output = last.call
                losses.append(self.teacher.loss(arguments, keywords, output, last.features))
            last.loss = sum_of(losses) if losses else torch.zeros((), device=device)
        return last.loss

    def _refuse_sharded_inputs(self) -> None:
        """Raise where FSDP2 would have taken the weights away again that the comparison was made with."""
        if self._local is None or not is_distributed():
            return
        for site in self._sites:
            if isinstance(site, WeightSite) and site.quantizes_input and is_sharded(site.weight):
                raise TransitionError(
                    f"LocalLoss: {site.name!r} quantizes its input and its weight is spread over processes, which "
                    f"cannot be compared. Train with DistributedDataParallel, or leave LocalLoss out of the recipe."
                )

    def _blends(self) -> Iterator[Blend]:
        for site in self._sites:
            for stage in site.stages:
                yield from stage

    def _attach_to_layers(self) -> None:
        sites: dict[nn.Module, list[WeightSite]] = {}
        for site in self._sites:
            if isinstance(site, WeightSite):
                for module in dict.fromkeys(module for module, _ in site.planned.owners):
                    sites.setdefault(module, []).append(site)
        names = {module: name for name, module in self._model.named_modules()}
        for module, of_module in sites.items():
            blends = _weight_blends(of_module)
            self._compared.append((blends, of_module))
            is_linear = _is_linear(module) and not any(site.quantizes_input for site in of_module)
            hook = _compare_forms(self._passes, names[module], blends, is_linear=is_linear)
            # First: what other hooks make of the output is not of the weight.
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))


def _count(sites: Sequence[Site]) -> int:
    """How many layers and blocks are compared."""
    weights = [site for site in sites if isinstance(site, WeightSite)]
    return len({module for site in weights for module, _ in site.planned.owners}) + len(sites) - len(weights)


def _weight_blends(sites: Sequence[WeightSite]) -> list[BlendedWeight]:
    found = [b for site in sites for stage in site.stages for b in stage if isinstance(b, BlendedWeight)]
    return list(dict.fromkeys(found))


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer in transition multiplies its one input with its one weight, and does nothing but add a bias."""
    kind, plain = find_kind(module), type(module).__mro__[1]
    return kind is not None and kind.takes_activations and plain.forward is kind.base_forward(module)  # type: ignore[attr-defined]


def _around_a_pass(model: nn.Module, passes: _Passes) -> tuple[Callable[..., None], Callable[..., None]]:
    def begin(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module is model:
            # A pass before may have failed.
            passes.is_under_way = False
        if not (module.training and torch.is_grad_enabled()):
            return
        if module is not model:
            if vars(module).get("_is_replica", False):
                raise TransitionError(
                    "DataParallel trains copies of the model, which auxiliary_loss does not see. Use "
                    "DistributedDataParallel, or leave distillation out of the recipe."
                )
            return
        passes.last = _Pass(_versions(arguments, keywords))
        passes.is_under_way = True

    # One tuple: of a tensor among a hook's own arguments the compiler would ask for a gradient that it cannot have.
    def end(module: nn.Module, *call: Any) -> None:
        current = passes.current
        if module is model and current is not None:
            current.call = call
            passes.is_under_way = False

    return begin, end


def _keep_feature(passes: _Passes, name: str) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        current = passes.current
        if current is not None:
            _refuse_without_gradients("Teacher(features)", name)
            current.features[name] = [*current.features.get(name, []), output]

    return keep


def _comparison(model: nn.Module, passes: _Passes, weight: float) -> Comparison:
    def is_wanted() -> bool:
        return model.training and torch.is_grad_enabled()

    def keep(distance: Tensor, counts: Tensor | None) -> None:
        # Also where nobody will ask: activations that are computed again must be computed as they were.
        distance = weight * distance
        if counts is not None:
            distance = distance * counts
        current = passes.current
        if current is not None:
            current.distances.append(distance)

    return Comparison(is_wanted, keep)


def _compare_forms(
    passes: _Passes, name: str, blends: Sequence[BlendedWeight], *, is_linear: bool
) -> Callable[..., None]:
    def compare(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        fading = [blend for blend in blends if not blend.vanished and blend.comparison is not None]
        comparison = fading[0].comparison if fading else None
        if comparison is None:
            return
        if passes.is_under_way:
            _refuse_without_gradients("LocalLoss", name)
        if not comparison.is_wanted():
            return
        if parametrize._cache_enabled:
            raise TransitionError(
                f"LocalLoss: {name!r} runs inside of torch.nn.utils.parametrize.cached(), which keeps one weight for "
                f"both forms. Leave one of the two out."
            )
        arguments, keywords = tree_map(_constant, (arguments, keywords))
        if is_linear and len(fading) == 1 and module.parametrizations.weight[-1] is fading[0]:  # type: ignore[union-attr,index]
            distance = _from_difference(module, fading, arguments, keywords, output)
        else:
            with torch.no_grad():
                original = _alone(module, fading, Form.ORIGINAL, arguments, keywords)
            distance = relative_distance(original, _alone(module, fading, Form.COMPRESSED, arguments, keywords))
        comparison.keep(distance, _has_a_share(fading))

    return compare


def _from_difference(
    module: nn.Module,
    blends: Sequence[BlendedWeight],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """The relative distance of a linear layer's two forms, from its output and one more product: d = f(x) - g(x).

    The output is `beta f(x) + (1 - beta) g(x)`, so that `f(x) = output + (1 - beta) d`.
    """
    difference: Tensor = _alone(module, blends, Form.DIFFERENCE, arguments, keywords)
    precise = torch.promote_types(difference.dtype, torch.float32)
    difference, output = difference.to(precise), output.detach().to(precise)
    bias: Any = module._parameters.get("bias")
    if bias is not None:
        # It is in both forms, and must not learn. Channels come before the positions of a convolution.
        positions = getattr(module, "kernel_size", ())
        difference = difference - bias.reshape(-1, *[1] * len(positions))
    norm = (output + (1 - blends[0].current_beta()) * difference.detach()).square().sum()
    return difference.square().sum() / norm.clamp(min=torch.finfo(precise).tiny)


def _has_a_share(blends: Sequence[BlendedWeight]) -> Tensor | None:
    """Whether an original has a share, for a graph that is compiled for every beta of a group of layers."""
    if not torch.compiler.is_compiling():
        return None
    return torch.stack([blend.beta_tensor for blend in blends]).amax() > 0


def _alone(
    module: nn.Module, blends: Sequence[BlendedWeight], form: Form, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    """What a layer computes with one form of its weights, without dropout."""
    for blend in blends:
        blend.alone = form
    try:
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout:
            with evaluation(module):
                return module.forward(*arguments, **keywords)
        return module.forward(*arguments, **keywords)
    finally:
        for blend in blends:
            blend.alone = None


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _refuse_without_gradients(who: str, name: str) -> None:
    if not torch.is_grad_enabled():
        raise TransitionError(
            f"{who}: {name!r} runs without gradients in a forward pass that is trained on, as activation checkpointing "
            f"does with use_reentrant=True. Use use_reentrant=False, or leave the module out."
        )


def _versions(*inputs: Any) -> dict[int, int]:
    """How often each tensor among the inputs was written to."""
    if torch.compiler.is_compiling():
        return {}
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return {id(leaf): leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()}
