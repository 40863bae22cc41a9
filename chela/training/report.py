"""What a run tells at its end: ``result.json``, and the lines on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console
from torch import nn

from chela.config.identity import fingerprint, own_code
from chela.config.schema import Config
from chela.core.errors import UsageError
from chela.models.generate import generate
from chela.models.heads import TokenModel
from chela.results import TITLES, of_arena, to_the_letter
from chela.training import machine
from chela.training.objectives import Score
from chela.training.run import RunFolder, RunState, trusted
from chela.training.step import LitModel
from lra.datamodule import LRADataModule

SAMPLE = 400  # symbols


def result_of(
    fabric: Fabric,
    module: LitModel,
    data: LRADataModule,
    state: RunState,
    tests: dict[str, dict[str, Any]],
    wall_seconds: float,
) -> dict[str, Any]:
    """Return what ``result.json`` holds; ``tests`` has what ``score.tested`` says of each test set."""
    config, task, objective, device = module.config, data.task, module.objective, fabric.device
    assert state.best is not None
    by = f"by_{task.grouped_by}"
    tests = {split: found | {"count": int(found["count"])} for split, found in tests.items()}
    test = tests.pop("test", None)
    grouped = {f"test_{by}": test.pop(by)} if test and by in test else {}
    return {
        "task": config.task.name,
        "task_title": task.title,
        "model": config.model.name,
        "preset": config.preset,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
        "objective": task.objective,
        "score": dataclasses.asdict(objective.score),
        "steps": state.step,
        "epochs": data.records("train").epochs(state.step * config.trainer.batch_size),
        **({"lra": to_the_letter(config)} if config.task.name in TITLES else {}),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_step": state.best["step"],
        "best_validation": {name: state.best[name] for name in objective.columns},
        "last_validation": {name: state.last[name] for name in objective.columns},
        "test": test,
        **({"sample": text} if (text := sample(module.model, task)) else {}),
        **grouped,
        "majority_accuracy": data.records("test").majority_accuracy() if test else None,
        "validation_policy": config.data.validation,
        "data_note": task.note,
        **({"context": context} if (context := task.context) else {}),
        "learned": state.learned,
        "wall_seconds": round(wall_seconds, 1),
        "training_seconds": round(state.seconds, 1),
        "evaluation_seconds": round(state.evaluation_seconds, 1),
        "tokens_per_second": round(state.totals[2] / max(state.seconds, 1e-9)),
        "peak_memory_bytes": machine.peak_memory_bytes(device),
        "precision": fabric.strategy.precision.precision,
        "processes": fabric.world_size,
        **machine.describe(device),
        **({"own_code": code} if (code := own_code(config)) else {}),
        **{f"test_{split}": found for split, found in tests.items()},
    }


def sample(model: nn.Module, task: Any) -> str:
    """Return a text that the network writes; empty where it is no model of text, or has no states."""
    if not getattr(task, "alphabet", "") or not isinstance(model, TokenModel):
        return ""
    symbols = min(SAMPLE, task.l_max) if model.backbone.ends() else SAMPLE
    with contextlib.suppress(UsageError):  # a system of somebody's own without states
        return str(generate(model.eval(), task.before.decode(), symbols, temperature=0.8))[1:]
    return ""


def report(console: Console, config: Config, run: RunFolder, result: dict[str, Any]) -> None:
    """Print a result, and the commands that go on from it."""
    lra = of_arena(result)
    if config.task.name in TITLES and not to_the_letter(config):
        lra = f"{result['preset']} is another task than that of full: not an LRA number"
    score = Score(**result["score"])
    tested = "test set left unseen (trainer.test=false)"
    if result["test"] is not None:
        accuracy = "" if score.name == "accuracy" else f"accuracy {result['test'].get('accuracy', math.nan):.2%}, "
        tested = f"test {score.text(result['test'])} ({accuracy}majority class {result['majority_accuracy']:.2%})"
    console.print(
        f"{result['task']} {result['preset']} {result['model']} seed {result['seed']}: {tested}, "
        f"best validation {score.text(result['best_validation']).removeprefix('accuracy ')} at step "
        f"{result['best_step']}, validation policy {result['validation_policy']}{f'  ({lra})' if lra else ''}"
    )
    for name in (key for key, found in result.items() if key.startswith("test_") and "count" in found):
        console.print(f"{name}: {score.text(result[name])} of {result[name]['count']:,}")
    if result.get("data_note"):
        console.print(f"data: {result['data_note']}")
    if result.get("context"):
        console.print(f"context: {result['context']}")
        console.print(f"generate: python -m chela.generate run={run.path}{trusted(config)}")
    console.print(f"evaluate: python -m chela.evaluate run={run.path}{trusted(config)}")
    console.print(f"resume:   python -m chela.train resume={run.path}{trusted(config)}")
    console.print(f"plot:     python -m experiments.plot {run.path}")
