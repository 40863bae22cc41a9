"""Stands in for ``chela.train``: the same words, folders and exit statuses, a checkpoint each step, no torch.

What it scores depends on the configuration and on every step having been taken once and in order, so that a run that
is cut, doubled or begun anew by mistake scores something else. ``model.d_ff`` chooses how it goes wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chela.config.compose import resolve, to_yaml
from chela.config.identity import fingerprint
from chela.results import ACCURACY

CRASHES, DIVERGES_ABOVE, DIES = 13, 0.05, 17  # d_ff, optimizer.lr, d_ff


@functools.cache
def mixer_options(name: str) -> Any:
    """The options of a system as the tests hand them over: its class would load torch, a second a run."""
    declared = json.loads(os.environ["FAKE_OPTIONS"])[name]
    fields = [(key, kind, dataclasses.field(default=value, metadata=said)) for key, kind, value, said in declared]
    return dataclasses.make_dataclass("Options", fields)


def main(words: list[str]) -> int:
    config = resolve(words)
    mark = fingerprint(config)
    parent = Path(config.runs) / f"{config.task.name}-{config.preset}"
    folder = parent / f"{config.model.name}-seed{config.seed}-{mark}"
    result = folder / "result.json"
    if result.exists() and (json.loads(result.read_text())["test"] or not config.trainer.test):
        return 0
    if config.model.d_ff == CRASHES:
        print("RuntimeError: it went wrong")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    checkpoint = folder / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "digest": mark}
    for step in range(state["step"] + 1, config.trainer.max_steps + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.01")))
        state = {"step": step, "digest": hashlib.sha256(f"{state['digest']}{step}".encode()).hexdigest()}
        _write(checkpoint, state)
        with open(folder / "metrics.csv", "a") as file:
            file.write(f"{step},train,1.0,0.5,0.001,9000,{step}\n")
        if config.model.d_ff == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if config.optimizer.lr > DIVERGES_ABOVE:
            print("error: expected finite numbers")
            return 3
        if asked or (config.trainer.max_time and step < config.trainer.max_steps):
            return 143 if asked else 0
    accuracy = int(state["digest"][:6], 16) / 16**6
    _write(
        result,
        {"format_version": 2, "fingerprint": mark, "score": ACCURACY, "best_validation": {"accuracy": accuracy}}
        | {"test": {"accuracy": accuracy} if config.trainer.test else None, "majority_accuracy": 0.1}
        | {"learned": True, "parameters": 1000, "tokens_per_second": 9000, "peak_memory_bytes": 10**8}
        | {"steps": config.trainer.max_steps, "wall_seconds": 1.0, "training_seconds": 1.0}
        | {"git_commit": "0" * 40, "device": "none", "threads": config.trainer.threads, "processes": 1},
    )
    return 0


def _write(path: Path, value: dict[str, object]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


if __name__ == "__main__":
    sys.modules["chela.layers.mixers"] = SimpleNamespace(mixer_options=mixer_options)  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
