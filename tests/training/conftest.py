from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chela.training.step import LitModel
from tests.training.launches import FORKS, TINY, in_step, launch, left_by, only_run


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give loaders workers that need not import everything, which takes each seconds; tests/lra has spawned ones."""
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: FORKS)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data folder for all tests, filled on first use."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(data: str, tmp_path: Path) -> tuple[str, ...]:
    """The words of a tiny run in a folder of its own."""
    return (*TINY, f"data.dir={data}", f"runs={tmp_path / 'runs'}")


@pytest.fixture(scope="session")
def straight_run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped; nobody changes it."""
    runs = tmp_path_factory.mktemp("straight")
    ended = launch(*TINY, f"data.dir={data}", f"runs={runs}")
    assert ended.status == 0, ended.err
    return only_run(runs)


@pytest.fixture(scope="session")
def straight(straight_run: Path) -> dict[str, Any]:
    """What it leaves."""
    return left_by(straight_run)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """``in_step`` for the length of a test."""
    monkeypatch.setattr(LitModel, "training_step", LitModel.training_step)
    return in_step
