"""A table of results in the README or in docs/results*.md is the first that the command named above it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.runs import read_runs
from experiments.summary import result_tables
from experiments.table import main_grid, render

ROOT = Path(__file__).parents[2]
MADE = re.compile(
    r"<!-- python -m experiments\.table (?P<folder>\S+)(?P<compact> --compact)?(?: bench=(?P<bench>\S+))? -->\n"
    r"(?P<table>(?:\|.*\n)+)"
)
PAGES = ("README.md", "docs/results.md", "docs/results-v1.md")
TABLES = [found for page in PAGES for found in MADE.findall((ROOT / page).read_text())]


@pytest.mark.parametrize("page", PAGES)
def test_there_is_a_table(page: str) -> None:
    assert MADE.search((ROOT / page).read_text())


@pytest.mark.parametrize(("folder", "compact", "bench", "table"), TABLES, ids=[folder for folder, *_ in TABLES])
def test_the_table_is_what_the_command_prints(folder: str, compact: str, bench: str, table: str) -> None:
    (found,) = result_tables(read_runs([ROOT / folder]), ROOT / bench if bench else None)
    grid = main_grid(found).compact() if compact else main_grid(found)
    assert table.strip() == render([grid], "md").strip(), f"make the table of {folder} again"
