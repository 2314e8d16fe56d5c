"""Sizes in words."""

from __future__ import annotations


def megabytes(size: int) -> str:
    """Return a size in MB (1,000,000 bytes), or in kB if it is a small one.

    >>> megabytes(90_300_000), megabytes(77_663)
    ('90.3 MB', '77.7 kB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1_000_000 else f"{size / 1e3:,.1f} kB"
