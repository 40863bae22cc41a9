from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chela.config.compose import load
from chela.config.identity import fingerprint
from chela.config.schema import ModelConfig
from chela.layers.attention import Attended
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.training import resume as checkpoint
from experiments.probe import attention_adds, by_length
from experiments.probe import main as probe_main
from experiments.table import main as table_main
from lra.source import DataConfig
from lra.tasks import get_task
from lra.tasks.base import InMemory, Task
from lra.tasks.corpus import Corpus
from tests.experiments.conftest import MakeRun


def keep_weights(folder: Path) -> None:
    """Write the weights of an untrained model as the run's best."""
    config = load(folder / "config.yaml")
    model = build_model(config.model, get_task(config.task), config.seed)
    state = {"step": 1, "model": dict(model.state_dict()), "accuracy": 0.5, "fingerprint": fingerprint(config)}
    (folder / "checkpoints").mkdir()
    checkpoint.save(folder / "checkpoints" / "best.ckpt", state)


class Remembering(torch.nn.Module):
    """A head that reads one attention: its output is the score of class 1; the mean over positions is 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.attended = Attended()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        attended = self.attended((inputs == 2).float()[..., None])
        return torch.cat([0.5 * torch.ones_like(attended), attended], -1)


@dataclass
class Spot(Task):
    """Say at each position whether the symbol is a 2; every fourth is."""

    num_classes, l_max, vocab_size, objective = 2, 8, 3, "tokens"

    def dataset(self, split: str) -> InMemory:
        tokens = np.array([1, 1, 1, 2] * 2)
        return InMemory(
            [(np.roll(tokens, i)[: 8 - i % 2 * 4], (np.roll(tokens, i) - 1)[: 8 - i % 2 * 4]) for i in range(6)]
        )


def test_the_mean_and_zeros_take_away_what_the_attention_adds() -> None:
    """All 2s are found with the attention; without it every position is called a 1, which three quarters are."""
    found = attention_adds(Remembering(), Spot(), batch=2)
    assert found["scores"] == {"as it is": 1.0, "mean": 0.75, "zeros": 0.75}
    assert found["adds"] == 25.0 and found["records"] == 6
    assert attention_adds(Remembering(), Spot(), records=2)["records"] == 2


def test_the_mean_of_a_causal_network_is_of_what_came_so_far() -> None:
    network = Remembering()
    network.built_from = SimpleNamespace(causal=True), None  # type: ignore[assignment]
    seen: list[torch.Tensor] = []
    network.register_forward_hook(lambda module, args, output: seen.append(output[..., 1]))
    attention_adds(network, Spot(), records=1)
    assert seen[0][0].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert seen[1][0].tolist() == pytest.approx([0, 0, 0, 1 / 4, 1 / 5, 1 / 6, 1 / 7, 2 / 8])


def test_the_command_keeps_what_it_found_and_tables_show_it(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = make_run(), make_run("model=s4d")
    keep_weights(folder)
    keep_weights(other)
    where = f"data.dir={tmp_path / 'data'}"
    assert probe_main([str(folder), "records=20", where]) == 0
    said = capsys.readouterr().out
    assert "as it is: accuracy " in said and "attention adds " in said
    adds = json.loads((folder / "probe.json").read_text())["adds"]
    assert table_main([str(tmp_path / "runs"), "probe=true", "published=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| ListOps")] == [f"{adds:.2f}", "–"]
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| attention of ")] == [f"{adds:.2f}"]
    assert probe_main([str(other), where]) == 2
    assert "expected a run with attention" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chela", "mega"])
def test_a_network_is_scored_in_the_windows_that_it_can_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"one and two and three. " * 60)
    task = Corpus(window=16)
    task.prepare(DataConfig(root=str(tmp_path / "mine.txt"), dir=str(tmp_path / "data")))
    config = ModelConfig(d_model=8, depth=1, d_ff=8, causal=True, mixer=mixer_options(name)())
    network = build_model(config, TaskFacts(257, 16, 257, objective="tokens"), seed=0).eval()
    found = by_length(network, task, [1, 2])
    windows = [row["window"] for row in found["windows"]]
    assert windows == ([16, 32] if name == "chela" else [16])
    assert all(4 < row["bits"] < 12 for row in found["windows"])
    assert not found["not_scored"] if name == "chela" else "window 32: expected" in found["not_scored"][0]


def test_windows_are_at_least_the_training_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe_main([str(tmp_path), "times=0"]) == 2
    assert "times: expected numbers from 1, got 0" in capsys.readouterr().err
