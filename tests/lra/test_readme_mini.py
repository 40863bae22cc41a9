"""The table of mini tasks: every task has a line, and its command gives what the line says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^\| `chela train (?P<words>[^`]+)` \| (?P<minutes>[\d.]+) \| (?P<score>[\d.]+) \|", re.M)
LINES = [match.groupdict() for match in LINE.finditer((ROOT / "docs" / "tasks.md").read_text())]


def test_every_task_has_a_line() -> None:
    assert [line["words"].split()[0] for line in LINES] == [
        f"task={task}" for task in ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "select", "recall")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=lambda line: line["words"])
def test_the_command_gives_that_score(line: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Within 3 points: another machine or number of threads adds in another order, and another run it is."""
    words = shlex.split(line["words"])
    task = words[0].removeprefix("task=")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHELA_DATA": str(tmp_path / "data")}
    if task in ("text", "retrieval", "select", "image"):
        real = request.getfixturevalue("real_image" if task == "image" else "real_text")
        words += [f"data.root={real.root}"]
    command = [sys.executable, "-m", "chela.train", *words, "preset=mini", f"runs={tmp_path / 'runs'}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    (result,) = (tmp_path / "runs").glob("*/*/result.json")
    assert 100 * json.loads(result.read_text())["test"]["accuracy"] == pytest.approx(float(line["score"]), abs=3)
