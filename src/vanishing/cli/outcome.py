"""How a command ends: the exit codes, and errors in one line on the standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import IntEnum

import typer
from rich.console import Console

from vanishing.errors import VanishingError


class ExitCode(IntEnum):
    """What the exit code of a command says; a signal's own code is 128 and its number."""

    FAILED = 1
    """It broke off; what it had saved is there."""
    REFUSED = 2
    """What was asked for cannot be done; nothing was changed."""


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn errors that are meant for the user into a line on the standard error and an exit code."""
    try:
        yield
    except ImportError as error:
        # Optional libraries: the file that needs one says which extra holds it.
        fail(command, str(error), ExitCode.REFUSED)
    except VanishingError as error:
        from vanishing.workflow.problems import Interrupted, RunProblem

        if isinstance(error, Interrupted):
            fail(command, str(error), 128 + error.signal)
        fail(command, _shortened(str(error)), ExitCode.FAILED if isinstance(error, RunProblem) else ExitCode.REFUSED)


def _shortened(message: str) -> str:
    """One line of a message: of a list of problems the first, and how many more there are."""
    _, *problems = message.splitlines()
    if not problems:
        return message
    return f"{problems[0].removeprefix('  - ')} ({len(problems) - 1} more problems like this.)"


def fail(command: str, message: str, code: int) -> None:
    """Print a message on the standard error and end the command."""
    console = Console(stderr=True)
    console.print(f"vanishing {command}: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
