"""Runs that are killed at random moments end with the bits of one that never was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "killed_runs.py"
KILLS = 20


def finished(folder: Path, kills: int, seed: int) -> Path:
    folder.mkdir()
    program = [sys.executable, str(WORKER), str(folder), str(kills), str(seed)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "small"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_no_bit_of_the_model_that_is_shipped(tmp_path: Path) -> None:
    expected = finished(tmp_path / "whole", kills=0, seed=0)
    got = finished(tmp_path / "killed", kills=KILLS, seed=0)
    files = sorted(file.name for file in expected.iterdir())
    assert files == sorted(file.name for file in got.iterdir())
    for name in files:
        assert (got / name).read_bytes() == (expected / name).read_bytes(), name
    began = (tmp_path / "killed" / "began").read_text().splitlines()
    # The kills fell into the training and not only before it: it was resumed from several of its checkpoints.
    assert len(set(began)) > 4, began
