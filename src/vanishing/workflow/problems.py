"""How a run ends that does not reach its end."""

from __future__ import annotations

from vanishing.errors import VanishingError


class InputProblem(VanishingError, ValueError):
    """What was asked for cannot be done; nothing was changed."""


class RunProblem(VanishingError, RuntimeError):
    """A run broke off; what it had saved is there."""


class Interrupted(VanishingError):
    """A run was stopped by a signal, after it had saved where it stands."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
