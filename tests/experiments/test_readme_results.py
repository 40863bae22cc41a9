"""A table of results in the README or in docs/results.md is the first that the command named above it prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from experiments.table import main as table_main

ROOT = Path(__file__).parents[2]
GRID = r"(?P<table>(?:\|.*\n)+)"
MADE = re.compile(rf"<!-- python -m experiments\.table (?P<words>.*) -->\n{GRID}")
PAGES = ("README.md", "docs/results.md")
TABLES = [found for page in PAGES for found in MADE.findall((ROOT / page).read_text())]


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
