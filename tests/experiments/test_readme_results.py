"""Tables of results in README and docs are the first table that the command named above them prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.render import render
from experiments.runs import read_runs
from experiments.summary import parts
from experiments.table import main_grid

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"<!-- python -m experiments\.table (?P<folder>\S+) -->\n(?P<table>(?:\|.*\n)+)")
TABLES = [
    (file.name, match["folder"], match["table"])
    for file in (ROOT / "README.md", ROOT / "docs" / "results.md")
    for match in MADE.finditer(file.read_text())
]


def test_there_are_tables() -> None:
    assert {file for file, _, _ in TABLES} == {"README.md", "results.md"}


@pytest.mark.parametrize(("file", "folder", "table"), TABLES, ids=[f"{file}-{folder}" for file, folder, _ in TABLES])
def test_the_table_is_what_the_command_prints(file: str, folder: str, table: str) -> None:
    (part,) = parts(read_runs([ROOT / folder]))
    assert table.strip() == render([main_grid(part)], "md").strip(), f"{file}: make the table of {folder} again"
