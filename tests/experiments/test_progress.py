from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from experiments.launchers import Ended, Launcher
from experiments.plan import Job, read_sweep
from experiments.sweep import Sweep


class Failing(Launcher):
    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        yield from (Ended(job, 1, "RuntimeError: it went wrong") for job in jobs)


def test_there_is_a_line_for_each_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"preset": "tiny", "tasks": ["listops"], "models": ["chela"], "seeds": [0, 1, 2]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(grid))
    (pair,) = read_sweep(tmp_path / "s.yaml").pairs(tmp_path)
    jobs = pair.runs(None)
    jobs[2].folder.mkdir(parents=True)
    (jobs[2].folder / "result.json").write_text('{"format_version": 2, "test": {"accuracy": 1}}')
    assert Sweep([pair], Failing(tmp_path, 0, 1, jobs[0])).run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"{jobs[0].name}: FAILED, the others go on: RuntimeError: it went wrong")
    assert lines[2] == "1 of 3 runs finished (1 of them before), 2 failed"
    assert "to go on: start the same command again" in lines
