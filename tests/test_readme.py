"""What the README shows runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from snippets import blocks_of, run

README = Path(__file__).parents[1] / "README.md"


# The Trainer's default for machines with a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_readme_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks_of(README)) >= 4
    run(README)
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_the_readme_names_every_public_name_that_a_recipe_takes() -> None:
    import vanishing
    from vanishing.config import concrete_kinds
    from vanishing.schedules import Schedule

    text = README.read_text()
    techniques = [c.__name__ for c in concrete_kinds(vanishing.Compressor) if c.__module__.startswith("vanishing.")]
    schedules = [c.__name__ for c in concrete_kinds(Schedule) if c.__module__.startswith("vanishing.")]
    missing = [name for name in (*techniques, *schedules) if name not in text and name != "Chain"]
    assert not missing
