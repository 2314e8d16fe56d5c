"""The progress of a run on the standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class TerminalDisplay:
    """A bar with the remaining time, the loss and beta."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._bar = TaskID(0)

    def begin(self, what: str, steps: int, done: int) -> None:
        """Begin a stage."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[figures]}"),
            console=self._console,
        )
        self._bar = self._progress.add_task(what, total=steps, completed=done, figures="")
        self._progress.start()

    def advance(self, done: int, figures: dict[str, float]) -> None:
        """Show a step."""
        assert self._progress is not None
        self._progress.update(self._bar, completed=done, figures=_in_words(figures))

    def end(self) -> None:
        """End the stage."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LineDisplay:
    """A line every half a minute, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what, self._steps, self._first = "", 0, 0
        self._started = self._shown = 0.0

    def begin(self, what: str, steps: int, done: int) -> None:
        """Begin a stage."""
        self._what, self._steps, self._first = what, steps, done
        self._started = self._shown = time.monotonic()
        self.say(f"{what}: step {done} of {steps}")

    def advance(self, done: int, figures: dict[str, float]) -> None:
        """Show a step, if some time has passed."""
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES and done < self._steps:
            return
        self._shown = now
        remaining = (now - self._started) / max(1, done - self._first) * (self._steps - done)
        left = timedelta(seconds=round(remaining))
        self.say(f"{self._what}: step {done} of {self._steps}, {left} left, {_in_words(figures)}")

    def end(self) -> None:
        """End the stage."""

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
