"""The original as it was when it was given to `prepare`, as a teacher of the model that it became."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vanishing.distillation import Teacher, relative_distance, softened_divergence, sum_of
from vanishing.errors import TransitionError
from vanishing.patterns import nearest
from vanishing.places import is_below

_IGNORED_LABEL = -100
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenOriginal:
    """A copy of a model that is not trained, and what another model can learn from it.

    It has copies of the weights that are trained and shares those that are not.

    Args:
        model: the original.
        settings: what is learned.
        features: full names of the modules whose outputs are compared.
    """

    def __init__(self, model: nn.Module, settings: Teacher, features: Sequence[str]) -> None:
        self.settings = settings
        self.features = tuple(features)
        self._shared = [p for p in model.parameters() if not (p.requires_grad or settings.bfloat16)]
        dtype = torch.bfloat16 if settings.bfloat16 else None
        known: dict[int, Any] = {id(p): p for p in self._shared}
        for parameter in model.parameters():
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(_copied(parameter, dtype), requires_grad=False)
        saved = set(model.state_dict(keep_vars=True))
        for name, buffer in model.named_buffers():
            # Others, as the frequencies of rotary positions, are in the type that they need.
            known[id(buffer)] = _copied(buffer, dtype if name in saved else None)
        try:
            self._model = copy.deepcopy(model, known).eval()
        except Exception as error:
            error.add_note("This happened while the model was copied to be its own Teacher.")
            raise
        self._reference = next(iter(self._model.parameters()), None)
        self._outputs: dict[str, list[Any]] = {}
        for name in self.features:
            self._model.get_submodule(name).register_forward_hook(_keeper(self._outputs, name))
        self._fingerprint: int | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds and the model does not."""
        shared = {id(p) for p in self._shared}
        return [t for t in (*self._model.parameters(), *self._model.buffers()) if id(t) not in shared]

    @property
    def fingerprint(self) -> int:
        """A number that tells one teacher from another, the same on every device."""
        if self._fingerprint is None:
            found = 0
            for place, tensor in enumerate((*self._model.parameters(), *self._model.buffers()), start=1):
                values = tensor.detach().contiguous().reshape(-1)
                parts = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
                found += place * int(parts.view(_INTEGERS[parts.element_size()]).sum(dtype=torch.int64))
            self._fingerprint = found % 2**53
        return self._fingerprint

    def loss(
        self, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any, features: Mapping[str, list[Any]]
    ) -> Tensor:
        """Return what the model has to learn from one of its forward passes, a scalar.

        Args:
            arguments: what the model was called with.
            keywords: by name.
            output: what it returned.
            features: what the named modules returned, for each of their calls.

        Raises:
            TransitionError: there are no logits to compare, or a weight that was frozen is trained now.
        """
        if any(parameter.requires_grad for parameter in self._shared):
            raise TransitionError(
                "Teacher: a weight is trained that was frozen when the model was given to prepare, and the teacher "
                "shares it. Freeze it again, or let it be trainable before prepare and freeze it afterwards."
            )
        student = _logits(output) if self.settings.logits else None
        expected = self._run(arguments, keywords)
        losses = []
        if student is not None:
            mask = _counted(self._model, keywords, student)
            distance = softened_divergence(student, _logits(expected), self.settings.temperature, mask)
            losses.append(self.settings.logits * distance)
        tokens = _attended(keywords)
        weight = self.settings.feature_weight / max(len(self.features), 1)
        for name in self.features:
            wanted, found = self._outputs.pop(name, []), features.get(name, [])
            if len(wanted) != len(found):
                raise TransitionError(
                    f"Teacher(features): the model called {name!r} {len(found)} times and its teacher {len(wanted)} "
                    f"times, so their outputs cannot be compared. Let it be called as often in training as in "
                    f"evaluation (layer dropout?), or name other features."
                )
            pairs = zip(wanted, found, strict=True)
            losses += [weight * relative_distance(t, s, tokens) for t, s in pairs]
        return sum_of(losses)

    def follow(self, device: torch.device) -> None:
        """Move to the device on which the model is."""
        if self._reference is not None and self._reference.device != device:
            self._model.to(device)

    @torch.no_grad()
    def _run(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        self._outputs.clear()
        if self.settings.bfloat16:
            arguments, keywords = tree_map(_in_bfloat16, (arguments, dict(keywords)))
        return self._model(*arguments, **keywords)


def find_features(names: Iterable[str], settings: Teacher, replaced: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the modules whose outputs are compared, and what is wrong with the globs that name them, in words.

    Args:
        names: full names of all modules of the original.
        settings: the teacher's.
        replaced: names of the blocks that are replaced as a whole; there is nothing to compare inside of them.
    """
    found: list[str] = []
    problems: list[str] = []
    known, blocks = list(names), list(replaced)
    for glob in settings.features:
        matched = [name for name in known if name and fnmatch.fnmatchcase(name, glob)]
        kept = [name for name in matched if not any(name != block and is_below(name, block) for block in blocks)]
        found += [name for name in kept if name not in found]
        if not matched:
            alike = ", ".join(map(repr, nearest(glob, known)))
            near = f" The nearest names are {alike}." if alike else ""
            problems.append(f"Teacher(features): nothing matched {glob!r}.{near} Correct it, or leave it out.")
        elif not kept:
            problems.append(
                f"Teacher(features): all that {glob!r} matches is inside of blocks that are replaced as a whole. Name "
                f"those blocks."
            )
    return found, problems


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(wanted, copy=True)


def _in_bfloat16(leaf: Any) -> Any:
    return leaf.to(torch.bfloat16) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _keeper(outputs: dict[str, list[Any]], name: str) -> Any:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    return keep


def _logits(output: Any) -> Tensor:
    """The logits with classes last."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)):
        # The loss may be first.
        found = next((each for each in output if isinstance(each, Tensor) and each.dim() > 1), None)
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise TransitionError(
            f"Teacher: there are no logits in what the model returns, a {type(output).__name__}. Let it return "
            f"logits or something that has them, or learn from features alone, Teacher(logits=0, features=...)."
        )
    logits = found if found.dim() < 4 else found.movedim(1, -1)
    if logits.shape[-1] == 1:
        raise TransitionError(
            "Teacher: logits of one number each are no distribution. Learn from features alone, Teacher(logits=0, "
            "features=...)."
        )
    return logits


def _attended(keywords: Mapping[str, Any]) -> Tensor | None:
    mask = keywords.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _counted(model: Any, keywords: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """Which tokens count in the loss of the logits, where labels or a mask of the tokens say so."""
    labels = keywords.get("labels")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1] and labels.dim() > 1:
        counted = labels != _IGNORED_LABEL
        # transformers' models that predict the next token compare each one's logits with the label after it.
        if getattr(model, "loss_type", None) == "ForCausalLM":
            counted = nn.functional.pad(counted[:, 1:], (0, 1), value=False)
        return counted
    mask = _attended(keywords)
    return mask if mask is not None and mask.shape == logits.shape[:-1] else None
