"""Models and data that come inside Python packages, found without importing the package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def find_packaged(package: str, ending: str) -> Path:
    """Return the file of an installed package whose name ends so.

    The package is never imported, so it can be installed without its dependencies.

    Raises:
        FileNotFoundError: the package is not installed, or holds no such file.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"No file *{ending} of the package {package} was found. Run: pip install --no-deps {package}"
    )
