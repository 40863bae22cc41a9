"""Read committed results: runs, their scores, and what a benchmark measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
Record = dict[str, Any]


def runs(*folders: str) -> list[Record]:
    """Read the finished runs of folders of committed results."""
    lines = [line for name in folders for line in (ROOT / name / "runs.jsonl").read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record.get("result")]


def of(model: str, task: str, preset: str, *folders: str) -> list[Record]:
    """Return a system's runs."""
    read, wanted = runs(*(f"experiments/results/{name}" for name in folders)), [model, task, preset]
    return [record for record in read if [record["result"][key] for key in ("model", "task", "preset")] == wanted]


def scores(model: str, task: str, preset: str, *folders: str) -> list[float]:
    """Return the test scores of a system's runs, in % where they are accuracies."""
    results = [record["result"] for record in of(model, task, preset, *folders)]
    return [result["test"][result["score"]["name"]] * result["score"]["scale"] for result in results]


def bench(name: str) -> dict[int, dict[str, float]]:
    """Return what a benchmark on an EPYC measured at each length."""
    rows = json.loads((RESULTS / "bench" / "epyc" / f"{name}.json").read_text())["rows"]
    return {row["key"]["L"]: row["values"] for row in rows}


def mean_of(values: list[float]) -> str:
    """Return a mean with one decimal, or a dash."""
    return f"{statistics.mean(values):.1f}" if values else "–"


def size_text(kib: float) -> str:
    """Return a size in KiB or MiB."""
    return f"{kib / 1024:.0f} MiB" if kib > 1024 else f"{kib:.0f} KiB"


def full(*words: str) -> str:
    """Return the table of all runs in the folders that are to be shown, of ``preset=mini`` unless it says another."""
    from experiments.runs import read_runs
    from experiments.summary import result_tables
    from experiments.table import measured, render

    given = {"preset": "mini"} | dict(word.split("=", 1) for word in words if "=" in word)
    found = read_runs(ROOT / word for word in words if "=" not in word)
    shown = [run for run in found if run.preset == given["preset"] and run.result]
    tables = result_tables(shown, ROOT / given["bench"] if "bench" in given else None)
    blocks = measured(tables, compact=True, probe="probe" in given)
    return render([next(block for block in blocks if not isinstance(block, str))], "md")


def title_of(head: str) -> str:
    """Return the first word of a column's heading."""
    return re.split(r"[ ,]", head)[0]


def cells_of(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table."""
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]


def number_of(cell: str) -> float:
    """Return the number in a cell."""
    return float(cell.strip("*×"))
