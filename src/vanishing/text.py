"""Tables as plain text, the same wherever they are printed."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(*parts: RenderableType, width: int) -> str:
    """Return what would be printed to a terminal of a width, without colors; in a notebook, too."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False)
    for part in parts:
        console.print(part, highlight=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text
