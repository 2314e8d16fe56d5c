"""The documentation: what it shows runs as it stands, it names all that is public, and it builds without a warning."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import vanishing
import vanishing.integrations
from snippets import blocks_of, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SEVERAL = "tutorials/several-processes.md"
PROGRAMS = [block.title for block in blocks_of(DOCS / SEVERAL) if block.title is not None]
# Lightning warns of missing workers and of much else.
IGNORED = {"tutorials/lightning.md": "ignore", "tutorials/transformers.md": "ignore:'pin_memory' argument is set"}


def _pages_that_run() -> list[Any]:
    pages = [page for page in PAGES if any(block.title is None for block in blocks_of(DOCS / page))]
    marks = {page: [pytest.mark.filterwarnings(IGNORED[page])] if page in IGNORED else [] for page in pages}
    return [pytest.param(page, marks=marks[page]) for page in pages]


@pytest.mark.parametrize("page", _pages_that_run())
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(DOCS / page)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_for_several_processes_runs_by_its_command(program: str, tmp_path: Path) -> None:
    page = DOCS / SEVERAL
    (code,) = (block.code for block in blocks_of(page) if block.title == program)
    (command,) = re.findall(rf"^torchrun (.* {program})$", page.read_text(), flags=re.MULTILINE)
    (tmp_path / program).write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-6000:]
    names: dict[str, Any] = {"__name__": "a module, not a program"}
    exec(compile(code, program, "exec", dont_inherit=True), names)
    (folder,) = tmp_path.glob("small-*")
    model = vanishing.load(folder, names["build"]())
    assert isinstance(model, nn.Sequential)
    assert [row.technique for row in vanishing.summary(model).rows if row.technique] == [
        "MagnitudePruning(sparsity=0.8)",
        "LowRank(rank=8)",
    ]


def public_names() -> set[str]:
    """The names of the package, and of every framework's module but for what these share."""
    names = {f"vanishing.{name}" for name in vanishing.__all__}
    for found in pkgutil.iter_modules(vanishing.integrations.__path__, "vanishing.integrations."):
        if found.name == "vanishing.integrations.common":
            continue
        module = importlib.import_module(found.name)
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == found.name)
        names |= {f"{found.name}.{name}" for name in own if not name.startswith("_")}
    return names


def documented_names() -> list[str]:
    """What the pages of the API ask for, in order."""
    return [
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    ]


def test_every_public_name_is_in_the_reference() -> None:
    names = public_names()
    assert len(names) > 40
    assert not sorted(names - set(documented_names()))


def test_every_name_in_the_reference_is_there_once_and_has_a_docstring() -> None:
    documented = documented_names()
    assert len(documented) == len(set(documented))
    for name in documented:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name


def test_the_navigation_lists_every_page() -> None:
    listed: list[str] = []
    waiting: list[Any] = [yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, str):
            listed.append(entry)
        else:
            waiting += entry.values() if isinstance(entry, dict) else entry
    assert sorted(listed) == PAGES


class _Loaded(HTMLParser):
    """Collects the addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}.get(tag)
        if loads is not None and attributes.get("rel") != "canonical":
            self.addresses.append(attributes.get(loads) or "")


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed)
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    # Material for MkDocs tells of its successor at every start.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    for page in PAGES:
        parser = _Loaded()
        parser.feed((tmp_path / page).with_suffix(".html").read_text())
        assert parser.addresses
        assert not [address for address in parser.addresses if "//" in address]
