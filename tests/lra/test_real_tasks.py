"""Every task of real data trains, stops, goes on and is scored again, by the commands that a person types.

ListOps, which is generated, does so in ``tests/training``; Pathfinder, which is too, beside it here.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from chela import evaluate, train
from lra.source import DataConfig


def run_train(folder: Path, words: list[str], status: int = 0) -> dict[str, Any]:
    assert train.main([*words, f"runs={folder}", "trainer.progress=none"]) == status
    results = list(folder.glob("*/*/result.json"))
    return json.loads(results[0].read_text()) if results else {}


@pytest.mark.parametrize("task", ["text", "image", "retrieval", "pathfinder"])
def test_it_trains_resumes_and_evaluates(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"task={task}", "preset=tiny", "trainer.max_steps=5", "trainer.val_every=5", "allocator=false"]
    if task == "pathfinder":
        words += [f"data.dir={tmp_path / 'data'}", "data.processes=1"]
    else:
        real: DataConfig = request.getfixturevalue("real_image" if task == "image" else "real_text")
        words += [f"data.{name}={getattr(real, name)}" for name in ("dir", "root")]
    words += ["data.source=imdb"] if task == "retrieval" else []
    straight = run_train(tmp_path / "straight", words)
    assert straight["task"] == task and straight["preset"] == "tiny" and straight["validation_policy"] == "holdout"
    assert 0 < straight["majority_accuracy"] < 0.6

    stopped = train.main([*words, f"runs={tmp_path / 'cut'}", "trainer.max_time=0.001s"])
    assert not list((tmp_path / "cut").glob("*/*/result.json")), stopped
    (folder,) = (tmp_path / "cut").glob("*/*")
    cut = run_train(tmp_path / "cut", [f"resume={folder}"])
    assert cut["test"] == straight["test"] and cut["steps"] == straight["steps"] == 5

    capsys.readouterr()
    assert evaluate.main([f"run={folder}"]) == 0
    assert f"loss {cut['test']['loss']:.4f}" in capsys.readouterr().out
