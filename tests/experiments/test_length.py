"""Bits by window, for networks that read on beyond the training window and for those that end there."""

from pathlib import Path

import pytest

from chela.config.schema import ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from experiments.length import by_length, main
from lra.source import DataConfig
from lra.tasks.corpus import Corpus


@pytest.mark.parametrize("name", ["chela", "mega"])
def test_a_network_is_scored_in_the_windows_that_it_can_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"one and two and three. " * 60)
    task = Corpus(window=16)
    task.prepare(DataConfig(root=str(tmp_path / "mine.txt"), dir=str(tmp_path / "data")))
    config = ModelConfig(d_model=8, depth=1, d_ff=8, causal=True, mixer=mixer_options(name)())
    network = build_model(config, TaskFacts(257, 16, 257, objective="tokens"), seed=0).eval()
    found = by_length(network, task, "test", [1, 2])
    windows = [row["window"] for row in found["windows"]]
    assert windows == ([16, 32] if name == "chela" else [16])
    assert all(4 < row["bits"] < 12 for row in found["windows"])
    assert not found["not_scored"] if name == "chela" else "window 32: expected" in found["not_scored"][0]


def test_windows_are_at_least_the_training_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "times=0"]) == 2
    assert "times: expected numbers from 1, got 0" in capsys.readouterr().err
