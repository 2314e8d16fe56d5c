"""The Python in the README and the documentation: read from Markdown, and run as it stands."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^```python(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$(?:\n+^```text\n(?P<output>.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One piece of Python on a page.

    Args:
        code: what it holds.
        line: where it begins on its page.
        title: the name of the program that it is; None for a piece that goes on where the one before ended.
        output: what the page shows right below it as printed, None for nothing.
    """

    code: str
    line: int
    title: str | None
    output: str | None


def blocks_of(page: Path) -> list[Block]:
    """Return every piece of Python on a page, in order."""
    text = page.read_text()
    return [
        Block(found["code"], text.count("\n", 0, found.start("code")), found["title"], found["output"])
        for found in _FENCE.finditer(text)
    ]


def run(page: Path) -> dict[str, object]:
    """Run a page's pieces in one namespace, compare what they print with what it shows, and return the namespace."""
    # A class on a page looks its module up by name, and two pages may define a technique of one name.
    names: dict[str, object] = {"__name__": __name__}
    for block in blocks_of(page):
        if block.title is not None:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # The empty lines make a traceback name the page's own.
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), names)
        if block.output is not None:
            assert _lines(printed.getvalue()) == _lines(block.output), f"{page}:{block.line}"
    return names


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
