from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from experiments.board import Board
from experiments.plan import Job, read_plan


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    grid = {"preset": "tiny", "tasks": ["listops"], "models": ["chela"], "seeds": [0, 1, 2]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(grid))
    (pair,) = read_plan(tmp_path / "s.yaml", tmp_path, {}, []).pairs()
    return list(pair.runs(None))


def test_a_terminal_shows_what_runs_until_when_and_what_failed(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    board = Board(tmp_path, console)
    board.known(jobs, [])
    board.started(jobs[:2])
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "metrics.csv").write_text("step,split\n5,train\n6,tra")  # the last line is being written
    clock[0] += 10
    board.failed(jobs[1], "RuntimeError: it went wrong")
    board.show(jobs[:1], waiting=1, undecided=0)
    assert board._live is not None
    console.print(board._live.renderable)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0/3 done, 1 running, 1 waiting, 1 failed" in shown
    assert f"{jobs[0].name}" in shown and "5/20" in shown and "30 s" in shown  # 5 steps took 10 s, 15 are left
    assert "RuntimeError: it went wrong" in shown


def test_elsewhere_there_is_a_line_for_each_event(tmp_path: Path, jobs: list[Job]) -> None:
    console = Console(file=io.StringIO(), width=140)
    board = Board(tmp_path, console)
    with board:
        board.known(jobs, jobs[2:])
        board.started(jobs[:1])
        board.show(jobs[:1], 1, 0)
        board.finished(jobs[0])
        board.blocked("listops-tiny-chela", "no learning rate")
    board.summary()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].endswith(f"{jobs[0].name}: started")
    assert lines[1].endswith(f"{jobs[0].name}: finished (2/3)")
    assert lines[3] == "2 of 3 runs finished (1 of them before), 0 failed"
    assert "to go on: start the same command again" in lines
