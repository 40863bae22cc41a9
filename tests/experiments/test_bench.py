"""The benchmark machinery: what it measures is what was done."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from experiments.bench import registry, report, timing
from experiments.bench.__main__ import main
from experiments.bench.registry import Row


def test_candidates_take_turns() -> None:
    turns: list[str] = []
    candidates = {"slow": lambda: (turns.append("slow"), time.sleep(0.004)), "fast": lambda: turns.append("fast")}
    times = timing.interleaved(candidates, seconds=0.01, least=3, most=5)
    assert turns[2:6] == ["slow", "fast", "slow", "fast"]
    assert times["slow"].median >= 0.004 > times["fast"].median


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(250_000)  # freed before the next

    assert 1_000_000 <= timing.peak_memory(run) < 1_500_000


def test_every_benchmark_is_found_and_a_wrong_name_is_told() -> None:
    assert "linear_attention" in registry.names()
    with pytest.raises(ValueError, match="expected one of the benchmarks"):
        registry.find("nothing")


def test_quick_run_writes_json_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    assert main(["linear_attention", "--quick", "--out", str(path)]) == 0
    data = json.loads(path.read_text())
    assert {"device", "cores", "threads", "torch", "allocator", "commit"} <= data["machine"].keys()
    assert data["rows"][0]["values"]["causal [ms]"] > 0

    benchmark = registry.find("linear_attention")
    row = Row(data["rows"][0]["key"], {"causal [ms]": 2 * data["rows"][0]["values"]["causal [ms]"]})
    cells = [list(column.cells) for column in report.table(benchmark, [row], data).columns]
    assert cells[1][0].endswith("(×2.00)")


def test_a_missing_file_to_compare_with_is_told(tmp_path: Path) -> None:
    assert main(["linear_attention", "--compare", str(tmp_path / "none.json")]) == 2
