"""Every system trains on every task: a smoke run each, all of them slow; CI runs two that change from day to day."""

import datetime
import json
from pathlib import Path

import pytest

from chela.config.compose import names
from chela.train import main as train
from lra.tasks import TASKS

ALL = [(task, model) for task in TASKS for model in names("model")]
TODAY = datetime.date.today().toordinal()
GENERATED = [(task, model) for task, model in ALL if task == "listops"]
ROTATING = {GENERATED[(2 * TODAY + i) % len(GENERATED)] for i in range(2)}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Prepared records, made once."""
    return tmp_path_factory.mktemp("records")


def _words(task: str, request: pytest.FixtureRequest) -> list[str]:
    """Where the task's data comes from."""
    if task == "image":
        return [f"data.root={request.getfixturevalue('real_image').root}"]
    if task in ("text", "select", "retrieval"):
        words = ["data.source=imdb"] if task == "retrieval" else []
        return [*words, f"data.root={request.getfixturevalue('shared') / 'text'}"]
    if task == "shakespeare":
        return [f"data.root={request.getfixturevalue('shared') / 'lm'}"]
    if task == "corpus":
        return [f"data.root={Path(__file__).parents[2] / 'README.md'}"]
    if task in ("enwik8", "text8", "wikitext103"):
        pytest.skip(f"{task} is a hundred million bytes that would have to be fetched; shakespeare and corpus are here")
    return []


def _train(task: str, model: str, data: Path, runs: Path, words: list[str]) -> dict:
    small = ["preset=tiny", "trainer.max_steps=6", "trainer.val_every=3", "allocator=false", "tensorboard=false"]
    where = [f"data.dir={data}", "data.processes=1", f"runs={runs}", "trainer.accelerator=cpu", "trainer.threads=1"]
    assert train([f"task={task}", f"model={model}", *small, *where, *words]) == 0
    (result,) = runs.rglob("result.json")
    return json.loads(result.read_text())


@pytest.mark.parametrize(
    ("task", "model"),
    [pytest.param(*pair, marks=() if pair in ROTATING else pytest.mark.slow) for pair in ALL],
    ids=[f"{task}-{model}" for task, model in ALL],
)
def test_trains(task, model, data, tmp_path, request):
    result = _train(task, model, data, tmp_path, _words(task, request))
    assert result["steps"] == 6
    assert result["model"] == model
    assert 0 <= result["test"]["accuracy"] <= 1
