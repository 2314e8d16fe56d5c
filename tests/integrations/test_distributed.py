"""Two processes on CPUs train what one trains, at every beta, by DDP and by FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vanishing
from integrations.distributed_runs import SCHEDULE, STEPS, TECHNIQUES, build
from vanishing.integrations.fsdp import finish_gathered

WORKER = Path(__file__).parent / "distributed_runs.py"
WAYS = {"single": 1, "ddp": 2, "fsdp2": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for way, processes in WAYS.items():
        commands = [[sys.executable, str(WORKER), str(folder), way, str(r), str(processes)] for r in range(processes)]
        running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
        errors = [process.communicate(timeout=240)[1] for process in running]
        assert [process.returncode for process in running] == [0] * processes, "\n".join(errors)[-6000:]
    return folder


def test_the_runs_see_beta_at_both_ends_and_between() -> None:
    betas = [SCHEDULE(step) for step in range(STEPS)]
    assert betas[:3] == [1.0, 1.0, 1.0]
    assert 0.0 < betas[4] < 1.0
    assert betas[6:] == [0.0] * 4


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("way", [way for way, processes in WAYS.items() if processes > 1])
def test_two_processes_train_what_one_trains(way: str, technique: str, runs: Path) -> None:
    losses, expected = (json.loads((runs / f"{each}-{technique}.json").read_text()) for each in (way, "single"))
    assert losses == pytest.approx(expected, abs=1e-5)
    got, wanted = (vanishing.load(runs / f"{each}-{technique}", build()).state_dict() for each in (way, "single"))
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    # A loss that does not move would agree as well.
    assert len(set(expected)) == STEPS


def test_one_process_alone_has_nothing_to_gather() -> None:
    model = torch.nn.Linear(4, 4)
    transition = vanishing.prepare(model, vanishing.Binary(), steps=1)
    transition.step()
    with pytest.raises(vanishing.TransitionError, match="Call transition"):
        finish_gathered(transition, lambda: torch.nn.Linear(4, 4))
    assert type(transition.finish()) is torch.nn.Linear
