"""A table of results in the README is the first that the command named above it prints."""

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
TABLES = MADE.findall((ROOT / "README.md").read_text())


def test_there_is_a_table() -> None:
    assert TABLES


@pytest.mark.parametrize(("folder", "table"), TABLES, ids=[folder for folder, _ in TABLES])
def test_the_table_is_what_the_command_prints(folder: str, table: str) -> None:
    (part,) = parts(read_runs([ROOT / folder]))
    assert table.strip() == render([main_grid(part)], "md").strip(), f"make the table of {folder} again"
