"""`vanishing demo`, a tiny run of it: the table, the JSON, the page and the errors."""

from __future__ import annotations

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vanishing
from vanishing.bench.arms import ARMS
from vanishing.bench.digits import digits_task
from vanishing.bench.training import Budget
from vanishing.cli import app, demo

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a tiny run prints, and its folder."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    tiny = Budget(steps=4, fade_steps=2, learning_rate=1e-3, evaluations=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "BUDGET", tiny)
        patch.setattr(demo, "DENSE_BUDGET", tiny)
        result = RUNNER.invoke(app, ["demo", "--output", str(output), "--seeds", "1"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    return result.output, output


class Loads(HTMLParser):
    """Collects what a page would fetch, and the text of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_table_has_every_technique_by_every_strategy(finished: tuple[str, Path]) -> None:
    printed, output = finished
    for technique in demo.TECHNIQUES:
        for arm in ARMS:
            assert re.search(rf"{technique} +│ {arm.name} +│ +\d+\.\d │ +\d+\.\d kB │ +\d+\.\d× │", printed)
        assert f"{technique}: VCON against" in printed
    assert str(output / "report.html") in printed


def test_the_json_holds_the_accuracy_of_the_models_in_the_folder(finished: tuple[str, Path]) -> None:
    _, output = finished
    results = json.loads((output / "results.json").read_text())
    assert len(results["runs"]) == len(ARMS) * len(demo.TECHNIQUES)
    run = next(r for r in results["runs"] if (r["technique"], r["arm"], r["outcome"]["seed"]) == ("rank 3", "VCON", 0))
    folder = output / "models" / "seed-0" / "rank-3-VCON"
    task = digits_task(0)
    assert task.accuracy(vanishing.load(folder, task.make_model())) == run["outcome"]["accuracy"]
    assert sum(file.stat().st_size for file in folder.iterdir()) == run["outcome"]["file_bytes"]
    assert [point["step"] for point in run["curve"]] == [0, 4]
    assert [point["beta"] for point in run["curve"]] == [1.0, 0.0]


def test_every_strategy_starts_from_the_same_original(finished: tuple[str, Path]) -> None:
    _, output = finished
    runs = json.loads((output / "results.json").read_text())["runs"]
    starts = {run["curve"][0]["blend"] for run in runs if run["arm"] == "VCON" and run["outcome"]["seed"] == 0}
    task = digits_task(0)
    original = vanishing.load(output / "models" / "seed-0" / "original", task.make_model())
    assert starts == {task.accuracy(original)}


def test_the_page_fetches_nothing_and_says_what_the_table_says(finished: tuple[str, Path]) -> None:
    _, output = finished
    parser = Loads()
    parser.feed((output / "report.html").read_text(encoding="utf-8"))
    text = " ".join(parser.text)
    assert parser.loads == []
    results = json.loads((output / "results.json").read_text())
    for technique, lead in results["lead_of_vcon"].items():
        assert technique[1:] in text
        assert f"{100 * lead['difference']['mean']:+.1f} points. One seed says little." in text
    assert text.count("Plotly.newPlot(") >= len(demo.TECHNIQUES) + 2


@pytest.mark.parametrize("occupied", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_one_clear_line(tmp_path: Path, occupied: str) -> None:
    (tmp_path / "file").touch()
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path / occupied)])
    assert result.exit_code == 1
    assert "cannot write to" in result.stderr
    assert "--output" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("package", "needs"), [("sklearn", "scikit-learn"), ("plotly", "plotly")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, needs: str) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "vanishing.bench.digits")
    for module in ("vanishing.bench.report", "vanishing.charts"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert needs in result.stderr
    assert "pip install 'vanishing[demo]'" in result.stderr


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vanishing", "demo", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vanishing", run_name="__main__")
    assert stop.value.code == 0
    assert "vanishing demo" in capsys.readouterr().out


def test_the_small_vit_takes_images_and_gives_logits() -> None:
    assert digits_task(0).make_model()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
