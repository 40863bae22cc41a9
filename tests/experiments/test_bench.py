"""The benchmark machinery: what it measures is what was done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chela.config.compose import resolve
from chela.models import build_model
from experiments.bench import Options, Row, __main__, models, timing
from experiments.bench.__main__ import main
from lra.tasks import get_task


def test_candidates_take_turns() -> None:
    turns: list[str] = []
    candidates = {"slow": lambda: (turns.append("slow"), time.sleep(0.004)), "fast": lambda: turns.append("fast")}
    times = timing.interleaved(candidates, seconds=0.01, least=3, most=5)
    assert turns[2:6] == ["slow", "fast", "slow", "fast"]
    assert times["slow"].median() >= 0.004 > times["fast"].median()


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(250_000)  # freed before the next

    assert 1_000_000 <= timing.peak_memory(run) < 1_500_000


def test_quick_run_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    assert main(["linear_attention", "quick=true", f"out={path}"]) == 0
    data = json.loads(path.read_text())
    assert {"device", "cores", "threads", "versions", "allocator", "git_commit"} <= data["machine"].keys()
    (row,) = data["rows"]
    assert row["values"]["causal [ms]"] == pytest.approx(np.median(row["raw"]["causal"]))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("causal [ms]"))
    assert float(line.split()[-1]) == pytest.approx(1e3 * row["values"]["causal [ms]"], rel=1e-3)


def test_committed_results_are_read_and_fit_into_80_columns() -> None:
    for path in (Path(__file__).parents[2] / "experiments/results/bench").rglob("*.json"):
        rows = [Row(row["key"], row["values"]) for row in json.loads(path.read_text())["rows"]]
        assert max(map(len, __main__.table(rows, 80).splitlines())) <= 80


def test_many_sizes_and_long_names_wrap_and_lose_nothing() -> None:
    names = [f"system {i} of a rather long name, as variants have [ms]" for i in range(5)]
    text = __main__.table([Row({"task": f"task{i}", "L": 1}, dict.fromkeys(names, i)) for i in range(10, 30)])
    assert "..." not in text and max(map(len, text.splitlines())) <= 80
    assert all(text.count(f"task{i}") == 1 and text.count(f" {i},000") == 5 for i in range(10, 30))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer"], "did you mean 'layers'?"),
        (["layers", "task=text"], "for train alone"),
        (["train", "tasks=text"], "did you mean 'task'?"),
        (["train", "task=txt"], "did you mean 'text'?"),
        (["train", "batch=0"], "batch: expected at least 1"),
        (["layers", "out=FOLDER"], "out: expected a JSON file that can be written"),
        (["layers", "out=FOLDER/file/new.json"], "out: expected a JSON file that can be written"),
    ],
)
def test_mistakes_are_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    assert main([*(word.replace("FOLDER", str(tmp_path)) for word in words), "quick=true"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.fixture(scope="module")
def training_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "train.json"
    words = ["task=listops,retrieval,image,recall", "model=chela,softmax", "batch=3", "quick=true", f"out={path}"]
    assert main(["train", *words]) == 0
    return json.loads(path.read_text())


def test_training_is_measured_at_the_shape_of_each_task(training_steps: dict[str, Any]) -> None:
    rows = training_steps["rows"]
    shapes = [(row["key"]["task"], row["key"]["L"], row["key"]["batch"]) for row in rows]
    assert shapes == [("listops", 32, 3), ("retrieval", 64, 3), ("image", 64, 3), ("recall", 16, 3)]
    for row, tokens in zip(rows, (3 * 32, 2 * 3 * 64, 3 * 64, 3 * 16), strict=True):  # recall: a label a position
        values = row["values"]
        for name in ("chela", "softmax"):
            assert values[f"{name} [tokens/s]"] == pytest.approx(tokens / values[f"{name} [ms]"])
            assert values[f"{name} [MiB]"] > 0
        assert values["speed, chela / softmax"] == pytest.approx(values["softmax [ms]"] / values["chela [ms]"])
        assert values["memory, chela / softmax"] == pytest.approx(values["chela [MiB]"] / values["softmax [MiB]"])
        assert row["note"] == ""


def test_what_does_not_fit_is_said_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(config: Any, *_: object, **__: object) -> Any:
        return (lambda *_: full()) if config.model.name == "softmax" else (lambda *_: torch.empty(1000))

    def full() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(models, "training_step", step)
    (row,) = models.train(Options("train", quick=True, model=["softmax", "chela"], batch=3))
    assert row.note == "listops tiny softmax not run: 3 records do not fit; try batch=N"
    assert "chela [ms]" in row.values and not any("softmax" in name for name in row.values)


def test_a_training_step_moves_the_weights_and_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.nn.Module] = []
    monkeypatch.setattr(models, "build_model", lambda *given: built.append(build_model(*given)) or built[0])
    config = resolve(["task=retrieval", "preset=tiny", "model=chela"])
    about = get_task(config.task)
    step = models.training_step(config, about, "cpu", "32-true")
    before = {name: p.detach().clone() for name, p in built[0].named_parameters()}
    step(*models.random_records(about, 2, "cpu"))
    moved = {name for name, p in built[0].named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) > 0.9 * len(before)
    assert all(p.grad is None for p in built[0].parameters())
