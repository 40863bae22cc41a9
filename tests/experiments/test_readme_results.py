"""Tables of results in the README and in docs/results*.md: each is the first that the command named above it prints.

Minutes and scores of the mini tasks are those of the committed runs.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments.table import main as table_main

ROOT = Path(__file__).parents[2]
GRID = r"(?P<table>(?:\|.*\n)+)"
MADE = re.compile(rf"<!-- python -m experiments\.table (?P<words>.*) -->\n{GRID}")
PAGES = ("README.md", "docs/results.md", "docs/results-v1.md")
ROW = re.compile(r"\| `python -m chela\.train task=(\w+)` \| ([\d.]+) \| ([\d.]+) \|")
TABLES = [found for page in PAGES for found in MADE.findall((ROOT / page).read_text())]
MINI = ROW.findall((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_there_is_a_table(page: str) -> None:
    assert MADE.search((ROOT / page).read_text())


@pytest.mark.parametrize(("words", "table"), TABLES, ids=[words.split()[0] for words, _ in TABLES])
def test_the_table_is_what_the_command_prints(
    words: str, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert table_main(shlex.split(words)) == 0
    found = re.search(GRID, capsys.readouterr().out)
    assert found and found["table"].strip() == table.strip(), f"make the table of {words} again"


@pytest.mark.parametrize(("task", "minutes", "score"), MINI)
def test_the_mini_tasks_are_as_their_runs(task: str, minutes: str, score: str) -> None:
    (found,) = (ROOT / "experiments/results/mini_alone").glob(f"{task}-mini/*/result.json")
    result = json.loads(found.read_text())
    assert (minutes, score) == (f"{result['wall_seconds'] / 60:.1f}", f"{100 * result['test']['accuracy']:.1f}")


def test_every_mini_task_but_shakespeare_has_a_row() -> None:
    assert len(MINI) == 8
