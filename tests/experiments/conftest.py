"""Run folders as training leaves them, without the training."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from chela.config.compose import resolve, to_yaml
from chela.config.identity import fingerprint
from chela.layers.mixers import mixer_options
from chela.results import ACCURACY, TITLES
from experiments.sweep import main

MakeRun = Callable[..., Path]
COLUMNS = ("step", "split", "loss", "accuracy", "lr", "tokens_per_second", "seconds")  # those of chela.training
LOSS = {"name": "loss", "unit": "nats", "scale": 1, "digits": 3, "best": "min"}
FAKE = (sys.executable, "-m", "tests.experiments.fake_train")
os.environ["FAKE_OPTIONS"] = json.dumps(
    {
        name: [
            (field.name, field.type, field.default, dict(field.metadata))
            for field in dataclasses.fields(mixer_options(name))
        ]
        for name in ("chela", "softmax", "linear", "lightning")
    }
)
SMALL = {
    "preset": "tiny",
    "tasks": ["listops"],
    "models": ["chela", "softmax"],
    "seeds": [0, 1],
    "overrides": {"trainer.max_steps": 12},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where ``sweep`` puts its runs."""
    return tmp_path / "sweep"


def sweep(tmp_path: Path, content: dict[str, object], *words: str) -> int:
    """Make runs that only seem to train."""
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(content))
    return main([str(path), f"runs={tmp_path / 'sweep'}", "jobs=2", *words], command=FAKE)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes the folder of a run: ``make_run("model=softmax", seed=1, accuracy=0.5)``."""

    def make(*words: str, seed: int = 0, accuracy: float | None = 0.5, root: Path | None = None, **result: Any) -> Path:
        config = resolve(["task=listops", "preset=tiny", f"seed={seed}", *words])
        mark = fingerprint(config)
        parent = (root or tmp_path / "runs") / f"{config.task.name}-{config.preset}"
        folder = parent / f"{config.model.name}-seed{seed}-{mark}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        write_metrics(folder / "metrics.csv", seed, result.get("tokens_per_second", 9000))
        if accuracy is not None:
            found = {
                "format_version": 2,
                "score": ACCURACY,
                "task": config.task.name,
                "task_title": TITLES.get(config.task.name, config.task.name),
                "model": config.model.name,
                "preset": config.preset,
                "seed": seed,
                "fingerprint": mark,
                "parameters": 1000,
                "best_validation": {"accuracy": accuracy},
                "test": {"accuracy": accuracy, "loss": None, "count": None},
                "majority_accuracy": 0.17,
                "learned": True,
                "wall_seconds": 20.0,
                "tokens_per_second": 10000,
                "peak_memory_bytes": 500_000_000,
                "processes": 1,
                "device": "x86_64",
                "threads": 1,
                "git_commit": "0123456789abcdef0123456789abcdef01234567",
            }
            (folder / "result.json").write_text(json.dumps({**found, **result}))
        return folder

    return make


def strange(folder: Path, loss: float) -> Path:
    """Turn a run into one of a stranger's task and system, scored by its loss, as version 2 writes it."""
    config = OmegaConf.load(folder / "config.yaml")
    names = {"task.name": "absent_module:Recall", "model.name": "mine", "model.mixer.name": "absent:Mine"}
    for key, value in names.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    result = json.loads((folder / "result.json").read_text())
    scores = {"loss": loss, "accuracy": 0.25, "bits": 1.5 * loss}
    result |= {"score": LOSS, "task_title": "Recall", "task": "absent_module:Recall"}
    result |= {"best_validation": scores, "test": {**scores, "count": 9}}
    (folder / "result.json").write_text(json.dumps(result | {"majority_accuracy": 0.125, "learned": None}))
    metrics = (folder / "metrics.csv").read_text().replace("loss,accuracy", "loss,bits")
    (folder / "metrics.csv").write_text(metrics)
    return folder


def write_metrics(path: Path, seed: int = 0, speed: int = 9000) -> None:
    """Write twenty training steps, the first of which was held up, and two validations."""
    lines = [",".join(COLUMNS)]
    for step in range(1, 21):
        accuracy, seen = 0.1 + 0.01 * step + 0.01 * seed, speed if step > 1 else 1
        lines.append(f"{step},train,{2.3 - 0.05 * step},{accuracy},0.001,{seen},{0.1 * step}")
        if step % 10 == 0:
            lines.append(f"{step},validation,{2.2 - 0.04 * step},{0.12 + 0.01 * step + 0.01 * seed},,,{0.1 * step}")
    path.write_text("\n".join(lines) + "\n")
