"""Logging to Weights & Biases, offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.training.launches import assert_equal, launch, left_by, only_run

INSTALLED = importlib.util.find_spec("wandb") is not None


@pytest.mark.skipif(INSTALLED, reason="wandb is installed")
def test_without_it_the_run_is_refused(tiny: tuple[str, ...], tmp_path: Path) -> None:
    ended = launch(*tiny, "wandb=true")
    assert ended.status == 2 and ended.error.startswith("wandb=true: expected the package wandb")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not INSTALLED, reason="expected wandb (extra wandb), it is not installed")
def test_two_launches_are_one_run_there(
    tiny: tuple[str, ...], tmp_path: Path, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = launch(*tiny, "wandb=true", "trainer.max_time=0.001s")
    assert first.status == 0 and "stopped" in first.out, first.err
    folder = only_run(tmp_path / "runs")
    mark = (folder / "wandb" / "id").read_text()
    assert launch(f"resume={folder}", "wandb=true").status == 0
    logs = list((folder / "wandb").glob(f"offline-run-*-{mark}/run-{mark}.wandb"))
    assert len(logs) == 2, "expected a log of each launch, under one id"
    assert any(b"validation/accuracy" in log.read_bytes() for log in logs)
    assert_equal(left_by(folder), straight)
