"""The script for a new GPU, tried without one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("listops-full", "bench-train", "bench-tune")


def run(out: Path, *part: str, dry: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DRY": "1" if dry else "", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(ROOT / "experiments/first_hour.sh"), str(out), *part]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("part", [*PARTS, pytest.param("", marks=pytest.mark.slow)])  # "": all of them, a minute or two
def test_a_dry_run_ends_well_and_names_the_card(part: str, tmp_path: Path) -> None:
    ended = run(tmp_path, *([part] if part else []))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.status.json")]
    assert {one["part"] for one in found} >= {part or "tests"}
    assert {(one["card"], one["status"]) for one in found} == {("cpu", 0)}


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.json").mkdir()  # where the part writes to
    assert run(tmp_path, "bench-train").returncode == 1
    assert json.loads((tmp_path / "bench-train.status.json").read_text())["status"] == 2


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path, dry=False)
    assert ended.returncode == 2 and "expected a GPU, found none" in ended.stderr
