"""Where the modules of a model stand, and how one takes the place of another."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

_ENDINGS = ("_hooks", "_hooks_with_kwargs", "_always_called")
# Hooks on a module's state stay with it: the names that they see are those below it.
_HOOKS = tuple(n for n in nn.Module().__dict__ if n.startswith(("_forward", "_backward")) and n.endswith(_ENDINGS))


class Places:
    """The places of all modules of a model, found once: a search for each module takes minutes with many experts.

    Args:
        model: the model; while this object is in use, only `put` changes which modules it has.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._add(model)

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in every place of the model where another one is; the user's hooks move along."""
        places = self._places.pop(id(old), [])
        self._add(new)
        for parent, name in places:
            parent._modules[name] = new
        self._places[id(new)].extend(places)
        _move_hooks(old, new)

    def _add(self, root: nn.Module) -> None:
        for parent in root.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places[id(child)].append((parent, name))


def join(module: str, name: str) -> str:
    """Return the full name of a parameter, or a module, of a module; the root module has no name."""
    return f"{module}.{name}" if module and name else module or name


def is_below(name: str, module: str) -> bool:
    """Whether a name is that of a module or of something in it."""
    return not module or name == module or name.startswith(f"{module}.")


def drop_copied_hooks(module: nn.Module, original: nn.Module) -> None:
    """Take from a module the hooks that it has as a copy of another one, whose place it will take with them."""
    for name in _HOOKS:
        if name.endswith("_hooks"):
            own, there = module.__dict__[name], original.__dict__[name]
            for key in [key for key, hook in own.items() if there.get(key) is hook]:
                for each in _HOOKS:
                    if each.startswith(name):
                        module.__dict__[each].pop(key, None)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of another one; hooks that it has of its own run inside of those."""
    for name in _HOOKS:
        moved, own = old.__dict__[name], new.__dict__[name]
        if not moved:
            continue
        if own:
            outer = dict(moved)
            moved.clear()
            moved.update(outer | own if "pre" in name else own | outer)
        # The dictionary itself, so that a handle that the user kept still removes its hook.
        new.__dict__[name], old.__dict__[name] = moved, type(moved)()
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook
