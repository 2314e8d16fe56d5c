"""The transition of a model from its original to its compressed form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vanishing.auxiliary import AuxiliaryLoss
from vanishing.batchnorm import reestimate_batchnorm, tried_out
from vanishing.distillation import Distillation
from vanishing.distributed import agreed, is_sharded
from vanishing.drives import Drive, Timetable
from vanishing.equality import difference_beyond_rounding
from vanishing.errors import TransitionError
from vanishing.idle import drop_idle_gradients, freeze_originals
from vanishing.inputs import call
from vanishing.optimizers import OptimizerWatch, exchange, held_ids, join, leave
from vanishing.places import Places
from vanishing.plan import Plan
from vanishing.pulls import add_pulls
from vanishing.receipt import FinishedLayer, Receipt, extend_receipt
from vanishing.recipe import Recipe
from vanishing.renewal import renew
from vanishing.sites import Site, StructureSite, WeightSite, build_weight_site
from vanishing.teacher import FrozenOriginal

_WHOLE_MODEL_TOLERANCE = 1e-4
_ANY_LENGTH = 10**9


def begin(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    blocks: Sequence[Site],
    optimizer: Optimizer | None,
    example_inputs: Any,
    *,
    distillation: Sequence[Distillation],
) -> Transition:
    """Change a model by a plan without problems.

    Args:
        model: the model.
        plan: what is compressed.
        recipe: where the plan comes from.
        blocks: the places of the blocks of the plan.
        optimizer: as in `prepare`.
        example_inputs: as in `prepare`.
        distillation: what the model learns from the original while they fade.

    Raises:
        TransitionError: the model cannot be run between the two forms; nothing was changed.
    """
    ramps = [rule.ramp or recipe.ramp for _, rule in recipe.rules]
    in_turn = [bool(rule.schedules) for _, rule in recipe.rules]
    weights = [build_weight_site(w, ramped=ramps[w.rule] is not None, in_turn=in_turn[w.rule]) for w in plan.weights]
    transition = Transition(model, recipe, [*weights, *blocks], example_inputs)
    transition._begin(optimizer, distillation)
    return transition


class Transition:
    """What `prepare` changed in a model, and the clock that drives it: the number of optimizer steps.

    Its state is that one number, and where a schedule is adaptive what it has decided; beta follows in closed form.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, sites: list[Site], example_inputs: Any) -> None:
        self.model = model
        self.recipe = recipe
        self._sites = sites
        self._example_inputs = example_inputs
        self._step = 0
        self._override: float | None = None
        places = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        self._in_model_order = sorted(sites, key=lambda site: places[site.name])
        # At the first step the length of the training makes no difference.
        self._timetable = Timetable(recipe.resolved(_ANY_LENGTH), self._in_model_order)
        self._ended: str | None = None
        self._frozen: list[nn.Parameter] = []
        self._auxiliary: AuxiliaryLoss | None = None
        self._relative = recipe
        # A weak method, as the hook of the watch lives as long as the watch.
        self._optimizers = OptimizerWatch(_called_weakly(self._complete_gradients))
        self._checked_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    # The clock

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def beta(self) -> float:
        """The original's share at this step by the recipe's schedule (a rule may have its own, see `betas`).

        Where that schedule has layers fade one after another it is the largest of their shares.
        """
        return self._last_beta if self._ended is not None else self._timetable.beta(self._step)

    @property
    def betas(self) -> dict[str, tuple[float, ...]]:
        """The original's share in each layer or block at this step, by full name.

        Several where the techniques of a chain have schedules of their own, in their order; empty at the end.
        """
        return self._timetable.betas(self._step)

    @property
    def end(self) -> int:
        """The first optimizer step at which every schedule and every ramp is over.

        Until it is over an adaptive schedule counts as if it took until its deadline.
        """
        return self._last_end if self._ended is not None else self._timetable.end(self._step)

    def set_length(self, steps: int) -> None:
        """Give the training's length, which schedules such as `LinearSchedule(steps="40%")` are a share of.

        Nothing happens where the recipe has no such schedule.

        Args:
            steps: optimizer steps of the whole training.

        Raises:
            TransitionError: the transition is over, or is under way with another length.
            ValueError: a length below 1, or one with which an adaptive schedule's deadline is too early.
        """
        self._require_active()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"set_length(steps={steps!r}): steps is a number of optimizer steps, at least 1.")
        recipe = self._relative.resolved(steps)
        if recipe == self.recipe:
            return
        if self._step > 0:
            raise TransitionError(
                f"set_length({steps}): the training is under way, laid out for another length. Give it at step 0."
            )
        self.recipe = recipe
        self._timetable = Timetable(recipe, self._in_model_order)
        self._set_strengths()
        self._set_betas()

    @property
    def done(self) -> bool:
        """Whether only the compressed form is left, at its full strength."""
        return self._step >= self.end

    @property
    def active(self) -> bool:
        """Whether the transition goes on: neither `finish` nor `cancel` has ended it."""
        return self._ended is None

    def gap(self) -> float | None:
        """Return how far the compressed weights are from their originals: the mean over weights of |g(W) - W| / |W|.

        Frobenius norms. Left out are blocks, whose outputs would have to be compared, and factors that are spread over
        processes; None if nothing else is there.

        Raises:
            TransitionError: the transition is over.
        """
        self._require_active()
        return self._gap(self._sites)

    def step(self) -> None:
        """Move the clock by one; to be called once after each optimizer step.

        Raises:
            TransitionError: the transition is over, or the optimizer was made before `prepare`.
        """
        self._move(self._step + 1)

    def seek(self, step: int) -> None:
        """Set the clock to a number of optimizer steps done, as a training framework counts them.

        To the next step it is the same as `step`. A jump measures nothing: an adaptive schedule has the value there
        that follows from what it has decided so far, and full speed where it has decided nothing.

        Raises:
            TransitionError: the transition is over, or the optimizer was made before `prepare`.
            ValueError: a step below 0.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"seek(step={step!r}): step is a number of optimizer steps, at least 0.")
        self._move(step)

    # What runs

    @contextlib.contextmanager
    def compressed(self) -> Iterator[nn.Module]:
        """Run as if beta were 0 inside a `with`: the model that will be shipped."""
        with self._overridden(0.0):
            yield self.model

    @contextlib.contextmanager
    def original(self) -> Iterator[nn.Module]:
        """Run as if beta were 1 inside a `with`: the original, as trained so far."""
        with self._overridden(1.0):
            yield self.model

    def auxiliary_loss(self) -> Tensor:
        """Return the loss to add to the task's own, a scalar: what the recipe's `distillation` asks for.

        It is that of the last forward pass in training mode, over the mean of its batch, and its graph is that of the
        pass: call it after the pass and before `backward`. Without distillation, in evaluation mode or without
        gradients, and once the transition is over it is 0. A teacher runs in here, under autocast if this is called
        under it.

        Raises:
            TransitionError: there was no forward pass of the whole model in training mode, or the model's outputs have
                nothing that a teacher's can be compared with.
        """
        if self._auxiliary is not None:
            return self._auxiliary.value()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the optimizer steps done, and what adaptive schedules have decided.

        The recipe and the teacher's fingerprint are there to compare with. With the model's and the optimizer's own
        state it gives an exact resume.
        """
        state = {"steps_done": self._step, "recipe": json.dumps(self.recipe.to_dict())}
        slow = [[list(span) for span in drive.slow] for drive in self._timetable.adaptive]
        state |= {"slow": slow} if slow else {}
        return state | ({} if self._teacher is None else {"teacher": self._teacher.fingerprint})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to where `state_dict` was taken; masks and factors come with the model's own state.

        Raises:
            TransitionError: the state is of another recipe or of another original that is the teacher, or no state of a
                transition.
        """
        self._require_active()
        known = isinstance(state, Mapping) and set(state) - {"slow", "teacher"} == {"steps_done", "recipe"}
        if not known or not isinstance(state["steps_done"], int) or state["steps_done"] < 0:
            got = dict(state) if isinstance(state, Mapping) else state
            raise TransitionError(f"expected a transition's state with steps_done and recipe, got {got!r:.200}.")
        if state["recipe"] != json.dumps(self.recipe.to_dict()):
            self._require_length()
            raise TransitionError(
                f"the state was saved with another recipe, {state['recipe']}. Prepare the model with that one to "
                f"resume; where a schedule is a share of the training, train for as long as before."
            )
        if self._teacher is not None and state.get("teacher", self._teacher.fingerprint) != self._teacher.fingerprint:
            raise TransitionError(
                "the state was saved with another teacher: that is the model as it is given to prepare. To resume, "
                "build it with the original weights that it had then, call prepare, and load the states after that."
            )
        decided = _decided(state.get("slow", []), len(self._timetable.adaptive))
        for drive, slow in zip(self._timetable.adaptive, decided, strict=True):
            drive.slow = slow
        self._step = state["steps_done"]
        self._set_strengths()
        self._set_betas()

    # The end

    def finish(self, *, force: bool = False, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """Turn the model into its compressed form, made of plain modules, and let go of the original.

        The originals and, where an optimizer is known, their optimizer state are freed. What is left is compared with
        what the transition computed at beta = 0.

        Args:
            force: finish before the schedules are over.
            recalibrate: batches to estimate BatchNorm's statistics anew from (a tensor, a tuple whose first item is the
                input, or a mapping of keywords each); recommended for convolutional networks.

        Returns:
            The same model object.

        Raises:
            TransitionError: the schedules are not over and `force` is not set; `recalibrate` has no batch; or the
                transition has ended already.
        """
        self._require_active()
        if self._step == 0 and not force and (self.recipe.is_relative or not self.done):
            raise TransitionError(
                "finish: the clock stands at 0: transition.step() was never called. Call it after each optimizer "
                "step, or give the framework's Trainer a TransitionCallback."
            )
        self._require_length()
        if any(is_sharded(p) for p in self.model.parameters()):
            raise TransitionError(
                "finish: the model's weights are spread over processes. Call "
                "vanishing.integrations.fsdp.finish_gathered(transition, build) in every process instead."
            )
        if not (self.done or force):
            raise TransitionError(
                f"finish: {self.end - self._step} of {self.end} optimizer steps remain until the compressed form "
                f"stands alone. Train on, or call finish(force=True) to cut them off."
            )
        with self._overridden(0.0):
            batches = None if recalibrate is None else tried_out(self.model, recalibrate)
        if not self.done:
            self._move(self.end, decide=False)
        with self._overridden(0.0):
            for site in self._sites:
                site.check()
            before = self._example_outputs()
        extend_receipt(self.model, Receipt(self.recipe, self._finish_sites()))
        self._compare(before, self._example_outputs())
        if batches is not None:
            reestimate_batchnorm(self.model, batches)
        self._example_inputs = None
        return self.model

    def cancel(self) -> nn.Module:
        """Give the original model back, with its weights as trained so far.

        Raises:
            TransitionError: the transition has ended already.
        """
        self._require_active()
        new = [p for site in self._sites for p in site.new_parameters]
        places = Places(self.model)
        self._thaw_originals()
        for site in self._sites:
            site.remove(places)
        self._close("cancelled")
        self._let_go(new)
        return self.model

    # Inside

    def _begin(self, optimizer: Optimizer | None, distillation: Sequence[Distillation]) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self._close, "refused")
            if self.recipe.freeze_original:
                undo.callback(self._thaw_originals)
                self._frozen = freeze_originals(self.model, self._sites)
            auxiliary = AuxiliaryLoss(self.model, distillation, self._sites)
            places = Places(self.model)
            for site in self._sites:
                site.install(places)
                undo.callback(site.remove, places)
            auxiliary.attach()
            self._auxiliary = auxiliary
            undo.callback(auxiliary.detach)
            self._set_strengths()
            self._set_betas()
            renew(self.recipe, self._sites, self._timetable, self._step, previous=None, arriving=True)
            # Between the forms, where both run and their shapes must agree, and with nothing left of the original.
            for beta in (0.5, 0.0):
                with self._overridden(beta):
                    self._example_outputs()
            undo.pop_all()
        if optimizer is not None:
            self._optimizers.seen.add(optimizer)
            names = {id(p): name for name, p in self.model.named_parameters()}
            for site in self._sites:
                join(optimizer, site.original_parameters, {names[id(p)]: p for p in site.new_parameters})

    @property
    def _teacher(self) -> FrozenOriginal | None:
        return None if self._auxiliary is None else self._auxiliary.teacher

    def _thaw_originals(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _gap(self, sites: Iterable[Site]) -> float | None:
        # A factor's weight, on which another technique fades, is measured as it will be.
        with self._overridden(0.0):
            weights = [site for site in sites if isinstance(site, WeightSite)]
            gaps = [
                site.gap()
                for site in weights
                if site.blend.form.shares_weight or not any(is_sharded(p) for p in site.new_parameters)
            ]
        return sum(gaps) / len(gaps) if gaps else None

    def _measure(self, drive: Drive) -> float | None:
        """The gap of what a schedule drives, one for all processes."""
        gap = self._gap(dict.fromkeys(site for site, _ in drive.targets))
        weights = (site.weight for site, _ in drive.targets if isinstance(site, WeightSite))
        return None if gap is None else agreed(gap, next(weights).device)

    def _move(self, step: int, *, decide: bool = True) -> None:
        self._require_active()
        self._require_length()
        self._check_optimizers()
        previous, self._step = self._step, step
        if step == previous:
            return
        if self._timetable.strengths(step) != self._timetable.strengths(previous):
            self._set_strengths()
        self._set_betas()
        renew(self.recipe, self._sites, self._timetable, step, previous=previous, arriving=abs(step - previous) > 1)
        if decide and step == previous + 1:
            for drive in self._timetable.adaptive:
                drive.decide(step, functools.partial(self._measure, drive))

    def _set_strengths(self) -> None:
        strengths = self._timetable.strengths(self._step)
        for site in self._sites:
            for stage in range(len(site.stages)):
                for form in site.forms(stage):
                    form.strength, form.settled = strengths[site.rule, stage]

    def _set_betas(self) -> None:
        for group in self._timetable.groups:
            # Compiled graphs of a group run its originals until the last of them is gone.
            fading = self._override != 0.0 and not all(drive.is_over(self._step) for drive in group)
            fading = fading or self._override == 1.0
            for drive in group:
                for (site, stage), beta in zip(drive.targets, drive.betas(self._step), strict=True):
                    for blend in site.stages[stage]:
                        blend.set_beta(beta if self._override is None else self._override, fading=fading)
        if self._auxiliary is not None:
            self._auxiliary.set_step(self._step)

    @contextlib.contextmanager
    def _overridden(self, beta: float) -> Iterator[None]:
        self._require_active()
        outer, self._override = self._override, beta
        self._set_betas()
        try:
            yield
        finally:
            self._override = outer
            if self._ended is None:
                self._set_betas()

    def _require_length(self) -> None:
        if self.recipe.is_relative:
            raise TransitionError(
                "the recipe's schedule is a share of the training, whose length is not known. Call "
                "transition.set_length with its number of optimizer steps; the callbacks for frameworks do so."
            )

    def _require_active(self) -> None:
        if self._ended is not None:
            raise TransitionError(f"this transition was {self._ended}. Call prepare again for another one.")

    def _close(self, how: str) -> None:
        self._last_end, self._last_beta = self.end, self.beta
        if self._auxiliary is not None:
            self._auxiliary.detach()
        self._sites, self._in_model_order = [], []
        self._timetable = Timetable(self.recipe.resolved(_ANY_LENGTH), [])
        self._auxiliary = None
        self._ended = how
        self._optimizers.close()

    def _finish_sites(self) -> dict[str, FinishedLayer]:
        """Leave plain modules and let go of the originals, before anything else is run."""
        gone = [p for site in self._sites for p in (*site.original_parameters, *site.new_parameters)]
        layers: dict[str, FinishedLayer] = {}
        places = Places(self.model)
        for site in self._sites:
            site.release(places)
        for site in self._sites:
            for name, finished in site.finish(places).items():
                # A layer with several weights, as an attention's, or that is cut on both sides, is one entry.
                known = layers.get(name)
                layers[name] = finished if known is None else _merged(known, finished)
        exchange(
            self._optimizers.seen, [pair for s in self._sites if isinstance(s, StructureSite) for pair in s.narrowed]
        )
        self._close("finished")
        self._let_go(gone)
        return layers

    def _let_go(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters out of the optimizers, but for those that the model still has somewhere."""
        stays = {id(p) for p in self.model.parameters()}
        leave(self._optimizers.seen, [p for p in parameters if id(p) not in stays])

    def _complete_gradients(self, optimizer: Optimizer) -> None:
        """Before a step of an optimizer, when the gradients are there."""
        drop_idle_gradients(self.model, self._sites)
        add_pulls((each for site in self._sites for each in site.pulled_weights()), optimizer)

    def _check_optimizers(self) -> None:
        """Raise if the optimizers that trained the model do not hold what is new in it."""
        if all(optimizer in self._checked_optimizers for optimizer in self._optimizers.seen):
            return
        held = held_ids(self._optimizers.seen)
        trains_model = any(id(p) in held for p in self.model.parameters())
        for site in self._sites:
            new = [p for p in site.new_parameters if p.requires_grad]
            originals = site.original_parameters
            trained = any(id(p) in held for p in originals) if originals else trains_model
            if trained and any(id(p) not in held for p in new):
                raise TransitionError(
                    f"the optimizer was made before prepare: it does not hold the {len(new)} new parameters of the "
                    f"compressed form of {site.name!r}, which would never be trained. Pass optimizer= to prepare, or "
                    f"make the optimizer afterwards."
                )
        self._checked_optimizers.update(self._optimizers.seen)

    def _example_outputs(self) -> list[Tensor]:
        """The model's floating outputs for the example inputs, in evaluation mode; none without example inputs."""
        if self._example_inputs is None:
            return []
        outputs = torch.utils._pytree.tree_leaves(call(self.model, self._example_inputs))
        return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]

    def _compare(self, before: list[Tensor], after: list[Tensor]) -> None:
        difference = difference_beyond_rounding(before, after, _WHOLE_MODEL_TOLERANCE)
        if difference is not None:
            raise TransitionError(
                f"the finished model differs from the transition at beta = 0 by {difference:.3g} on the example inputs."
            )


def _merged(first: FinishedLayer, second: FinishedLayer) -> FinishedLayer:
    return dataclasses.replace(
        first,
        grids=first.grids | second.grids,
        narrowed_from=first.narrowed_from or second.narrowed_from,
        counts=first.counts | second.counts,
    )


def _decided(slow: Any, count: int) -> list[list[tuple[int, int]]]:
    """The slow spans of each adaptive schedule, as a state has them."""
    try:
        spans = [[(int(start), int(stop)) for start, stop in each] for each in slow]
    except (TypeError, ValueError):
        spans = []
    if len(spans) != count:
        raise TransitionError(
            f"the state must hold what its adaptive schedules have decided, the spans of {count} of them in slow, got "
            f"{slow!r:.200}. Take it from Transition.state_dict."
        )
    return spans


def _called_weakly(method: Callable[[Optimizer], None]) -> Callable[[Optimizer], None]:
    reference = weakref.WeakMethod(method)

    def call_if_alive(optimizer: Optimizer) -> None:
        alive = reference()
        if alive is not None:
            alive(optimizer)

    return call_if_alive
