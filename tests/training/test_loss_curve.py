"""Same seed, same loss: stored curves, so that a change of the numbers is never an accident.

Where a change is meant, write them anew with ``python -m tests.training.test_loss_curve`` and say why in the commit.
"""

import csv
import sys
import tempfile
from pathlib import Path

import pytest

from tests.training.launches import TINY, launch, metrics_of, only_run

STORED = Path(__file__).parent / "data"
MODELS = ("chela", "linear", "softmax")
WORDS = (
    *TINY,
    "task.train=200",
    "model.norm=layer",
    "model.dropout=0",
    "trainer.max_steps=24",
    "optimizer.lr=1e-2",
    "trainer.matmul=mkl",
)


def curve(model: str, data: str, runs: Path) -> list[dict[str, str]]:
    ended = launch(*WORDS, f"model={model}", f"data.dir={data}", f"runs={runs}")
    assert ended.status == 0, ended.err
    return metrics_of(only_run(runs))


@pytest.fixture(scope="module")
def curves(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    return {model: curve(model, data, tmp_path_factory.mktemp(model)) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_same_loss(model: str, curves: dict[str, list[dict[str, str]]]) -> None:
    rows = curves[model]
    with open(STORED / f"{model}.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in stored]
    for row, expected in zip(rows, stored, strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3), row


def test_another_seed_another_loss(curves: dict[str, list[dict[str, str]]], data: str, tmp_path: Path) -> None:
    assert launch(*WORDS, "seed=1", "trainer.max_steps=1", f"data.dir={data}", f"runs={tmp_path}").status == 0
    assert metrics_of(only_run(tmp_path))[0]["loss"] != curves["chela"][0]["loss"]


def write() -> None:
    """Write the stored curves anew."""
    STORED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            rows = curve(model, f"{folder}/data", Path(folder) / model)
            with open(STORED / f"{model}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, ["step", "split", "loss", "accuracy"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(write())
