from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from experiments.launchers import Ended
from experiments.plan import Job, read_sweep
from experiments.sweep import Sweep


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    grid = {"preset": "tiny", "tasks": ["listops"], "models": ["chela"], "seeds": [0, 1, 2]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(grid))
    (pair,) = read_sweep(tmp_path / "s.yaml").pairs(tmp_path)
    return list(pair.runs(None))


class Launcher(SimpleNamespace):
    """Has one run in hand at a time, and ends it when it is looked at again."""

    stopping = ""

    def room(self) -> int:
        return 1 - len(self.jobs)

    def start(self, jobs: list[Job]) -> list[Job]:
        self.jobs += jobs
        return []

    @property
    def handles(self) -> list[Job]:
        return self.jobs

    def poll(self) -> list[Ended]:
        ended = [Ended(job, 1, "RuntimeError: it went wrong") for job in self.jobs]
        self.jobs.clear()
        return ended


def test_a_terminal_shows_what_runs_until_when_and_what_failed(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None, get_time=lambda: clock[0])
    sweep = Sweep([], tmp_path, Launcher(jobs=jobs[:1]), console)  # type: ignore[arg-type]
    sweep.known, sweep.failed = set(jobs), {jobs[1].name: "RuntimeError: it went wrong"}
    sweep.waiting.append(jobs[2])
    jobs[0].folder.mkdir(parents=True)
    for clock[0], step in ((1000, 0), (1002, 1), (1012, 6)):  # 5 steps take 10 s, 14 are left
        (jobs[0].folder / "metrics.csv").write_text(f"step,split\n{step},train\n7,tra")  # the last is being written
        sweep.show()
    sweep._progress.stop()
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("1 running, 1 waiting, 1 failed" in line and " 0/3 " in line for line in shown)
    (line,) = [line for line in shown if jobs[0].name in line and " 6/20 " in line]
    assert "0:00:28" in line


def test_elsewhere_there_is_a_line_for_each_event(tmp_path: Path, jobs: list[Job]) -> None:
    console = Console(file=io.StringIO(), width=200)
    (pair,) = read_sweep(tmp_path / "s.yaml").pairs(tmp_path)
    jobs[2].folder.mkdir(parents=True)
    (jobs[2].folder / "result.json").write_text('{"format_version": 2, "test": {"accuracy": 1}}')
    assert Sweep([pair], tmp_path, Launcher(jobs=[]), console, poll_seconds=0).run() == 1  # type: ignore[arg-type]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].endswith(f"{jobs[0].name}: started")
    assert lines[1].endswith(f"{jobs[0].name}: FAILED, the others go on: RuntimeError: it went wrong")
    assert lines[4] == "1 of 3 runs finished (1 of them before), 2 failed"
    assert "to go on: start the same command again" in lines
