"""One run, from a configuration to a result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import math
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from chela.config import to_the_letter
from chela.core.errors import DivergedError, UsageError
from chela.identity import fingerprint, own_code
from chela.models import build_model
from chela.results import TITLES, of_arena, read_result
from chela.schema import Config
from chela.training import machine
from chela.training.contexts import AS_IN_TRAINING, Reading, batches, expect_bounded, of_text, sample
from chela.training.machine import check_memory, hardware, processes, quiet_lightning, rank, stdout_console
from chela.training.metrics import ChanceWatch, MetricsLog, Reporter
from chela.training.module import LitModel
from chela.training.objectives import Score, objective_of
from chela.training.progress import DataProgress, Display
from chela.training.run import RunFolder, RunState, claim_run, find_run
from chela.training.stopping import Keeper, Signals, Stopped, in_first, stopped_by
from lra.batches import Batch
from lra.datamodule import LRADataModule

# of Lightning's, which this package does itself
_OWN_WORK = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
QUIET: dict[str, Any] = dict.fromkeys(_OWN_WORK, False)


def fit(config: Config, console: Console, started: float) -> int:
    """Train, test, and write the result; return the exit status.

    A finished run is reported, not repeated; one that left the test set unseen is tested once it may be.

    Args:
        config: The resolved configuration.
        console: Where to print.
        started: When this launch began, by ``time.monotonic()``: the start of ``trainer.max_time``.

    Raises:
        UsageError: What a person can mend.
    """
    begun = find_run(config)
    if begun is not None and begun.result.exists():
        result = read_result(begun.result)
        if result["test"] is not None or not config.trainer.test:
            _report(console, config, begun, result)
            return 0
    quiet_lightning()
    leads = rank() == 0
    platform = hardware(config)
    check_memory(config, platform["accelerator"])
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("wandb=true: expected the package wandb, it is not installed; pip install 'chela[wandb]'")
    platform |= processes(config, platform["accelerator"])
    with Signals() as signals:
        try:
            data = TrainingData(config, console)
            data.prepare_data()  # before there is a folder, which data that cannot be had would leave behind
            with _claimed(config, console, leads) as (run, goes_on):
                keeper = Keeper(run, goes_on, RunState(), signals, started, console.print)
                _fit(config, console, keeper, platform, data)
            return 0
        except Stopped as stop:
            return stop.status if leads else 0
        except UsageError:
            if leads:
                raise
            return 0  # every process comes to it at the same step; the first one says it


@contextlib.contextmanager
def _claimed(config: Config, console: Console, leads: bool) -> Iterator[tuple[RunFolder | None, bool]]:
    """Hold the run's folder; take a new one back when the launch fails before there is anything in it."""
    run, goes_on, lock = claim_run(config) if leads else (None, False, None)
    if run is None or lock is None:
        yield None, False
        return
    console.print(f"{'going on with' if goes_on else 'run'} {run.path}")
    try:
        yield run, goes_on
    except Stopped as stop:
        where = "; nothing new to save" if stop.step is None else f" at step {stop.step}; saved"
        again = f"python -m chela.train resume={run.path}{_trusted(config)}"
        console.print(f"stopped ({stop.reason}){where}. To go on: {again}")
        raise
    except Exception as error:
        if not (goes_on or run.last.exists() or run.metrics.exists() or isinstance(error, DivergedError)):
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        lock.release()


def _fit(config: Config, console: Console, keeper: Keeper, platform: dict[str, Any], data: LRADataModule) -> None:
    trainer, module = assemble(config, console, keeper, platform, data)
    try:
        trainer.fit(module, datamodule=data)
        if keeper.signals.asked:  # after the last step was saved
            raise stopped_by(keeper.signals.asked)
        _finish(console, keeper, trainer, module, data)
    except DivergedError as error:
        where = keeper.run.last if keeper.run.last.exists() else "none yet"
        raise DivergedError(f"{error}. Last good checkpoint: {where}") from None
    except Stopped as stop:
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if stop.step is None and kill is not None:
            kill(signal.SIGTERM)  # the other processes were not asked; they would wait for this one
        raise


def _finish(console: Console, keeper: Keeper, trainer: L.Trainer, module: LitModel, data: LRADataModule) -> None:
    config = module.config
    best = in_first(trainer, lambda: keeper.run.load_weights(config, "best"))
    assert best is not None
    module.model.load_state_dict(best["model"])
    # as the file says: a launch that was killed may have saved it, and on a GPU its steps may come out otherwise
    keeper.state.best = {key: best[key] for key in ("step", *module.objective.columns, "count")}
    further = {}
    if config.trainer.test:
        for split in data.task.further:
            trainer.test(module, dataloaders=data.evaluation(data.records(split)), verbose=False)
            count = {"count": int(module.evaluated["count"])}
            further[f"test_{split}"] = _columns(module, module.evaluated) | count | _by_group(module, data)
        trainer.test(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        result = _result(trainer, module, data, keeper) | further
        keeper.run.write_result(result)
        _report(console, config, keeper.run, result)


def assemble(
    config: Config, console: Console, keeper: Keeper, platform: dict[str, Any], data: LRADataModule
) -> tuple[L.Trainer, LitModel]:
    """Build trainer and module; the callbacks' order is the order in which they see a step."""
    objective = objective_of(data.task)
    module = LitModel(build_model(config.model, data.task, config.seed), objective, config)
    if config.trainer.sequence_parallel > 1:
        module.model.get_submodule("backbone").expect_pieces()  # type: ignore[operator]
    if config.data.carry:
        expect_bounded(module.model, data.task.l_max, "data.carry=true")
    if not config.model.causal:
        _tell_of_padding(module.model, data, console)
    state = keeper.state
    log = MetricsLog(lambda: keeper.run, config)
    watch = ChanceWatch(state, data.records("train").majority_accuracy(), console.print)
    mode = config.trainer.progress
    display = Display(console, mode if mode != "auto" else "live" if console.is_terminal else "plain")
    trainer = L.Trainer(
        **platform,
        max_epochs=-1,  # the keeper stops at the last step
        accumulate_grad_batches=config.trainer.accumulate,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **QUIET,
        callbacks=[Reporter(state, [log, display], watch), keeper],
    )
    return trainer, module


def _tell_of_padding(model: nn.Module, data: LRADataModule, console: Console) -> None:
    """Say so where a system of somebody's own cannot tell padding from tokens, and there will be padding."""
    blocks = getattr(model.get_submodule("backbone"), "blocks", ())
    deaf = {type(block.mixer.layer).__name__ for block in blocks if "mask" not in block.mixer.context}
    lengths = data.records("train").lengths()
    if deaf and lengths.min() < lengths.max():
        console.print(
            f"note: {', '.join(sorted(deaf))}.forward takes no mask, and records differ in length: unless it looks "
            "back only, padding is mixed into real tokens (docs/extend.md)"
        )


class Intervals:
    """The training batches from one validation to the next, as Lightning's epochs: it validates at the end of each.

    Validations are at the last step of the run and so many steps before it, wherever the launch begins.

    Args:
        batches: Of the remaining steps, in order, each step in its parts.
        first_step: The step that they begin with.
        config: The run's configuration.
    """

    def __init__(self, batches: DataLoader[Batch], first_step: int, config: Config) -> None:
        self._batches, self._step, self._config = batches, first_step, config.trainer
        self._left: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the next interval."""
        if self._left is None:
            self._left = iter(self._batches)
        every = self._config.val_every
        steps = (self._config.max_steps - self._step) % every or every
        self._step += steps
        yield from itertools.islice(self._left, steps * self._config.accumulate)


class TrainingData(LRADataModule):
    """The data of a run, with its training batches in intervals; it says how far it is while records are made."""

    def __init__(self, config: Config, console: Console) -> None:
        names = ("batch_size", "eval_batch_size", "max_steps", "accumulate")
        sizes = {name: getattr(config.trainer, name) for name in names}
        sizes["pieces"] = config.trainer.sequence_parallel
        super().__init__(config.task, config.data, seed=config.seed, progress=DataProgress(console), **sizes)
        self.run_config = config

    def train_dataloader(self) -> Any:
        """Return the batches of the remaining steps."""
        return Intervals(super().train_dataloader(), self.first_step, self.run_config)


def evaluate(
    config: Config, run: RunFolder, which: str, split: str, reading: Reading = AS_IN_TRAINING
) -> tuple[Score, dict[str, Any]]:
    """Score a checkpoint of a run ("best" or "last") on "test" or "validation"; the same number as the run's own.

    Args:
        config: The run's configuration.
        run: Its folder.
        which: The checkpoint.
        split: What is scored; one of a task's ``further`` ones too.
        reading: How a text is read; the default is as in training.

    Returns:
        The score that counts, and the objective's columns with ``count``, the number of targets; of a text also what
        ``of_text`` tells.
    """
    quiet_lightning()
    trained, config = config, copy.deepcopy(config)
    config.trainer.sequence_parallel = 1
    if config.trainer.accelerator == "gpu":  # that was for training; without one the weights are scored all the same
        config.trainer.accelerator = "auto"
    data = TrainingData(config, stdout_console())
    data.prepare_data()
    if split not in (known := ("test", "validation", *data.task.further)):
        raise UsageError(f"split: expected {' or '.join(known)}, got {split}")
    platform, read = hardware(config), config.data.split(split)
    module = LitModel(build_model(config.model, data.task, config.seed), objective_of(data.task), config)
    if platform["precision"] == "64-true":
        module.double()  # before the weights come, which would lose half of their digits
    run.load_into(module.model, trained, which)
    trainer = L.Trainer(**platform, **QUIET, devices=1)
    if reading != AS_IN_TRAINING:
        trainer.validate(module, dataloaders=batches(data, module.model, read, reading), verbose=False)
    elif split == "validation":
        trainer.validate(module, datamodule=data, verbose=False)
    else:
        trainer.test(module, dataloaders=data.evaluation(data.records(split)), verbose=False)
    found = module.evaluated | of_text(data.task, read, reading, module.evaluated)
    return module.objective.score, found | _by_group(module, data)


def _result(trainer: L.Trainer, module: LitModel, data: LRADataModule, keeper: Keeper) -> dict[str, Any]:
    config, state, device = module.config, keeper.state, trainer.strategy.root_device
    tested = config.trainer.test
    assert state.best is not None
    return {
        "task": config.task.name,
        "task_title": data.task.title,
        "model": config.model.name,
        "preset": config.preset,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
        "objective": data.task.objective,
        "score": dataclasses.asdict(module.objective.score),
        "steps": state.step,
        "epochs": data.records("train").epochs(state.step * config.trainer.batch_size),
        **({"lra": to_the_letter(config)} if config.task.name in TITLES else {}),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_step": state.best["step"],
        "best_validation": _columns(module, state.best),
        "last_validation": _columns(module, state.last),
        "test": _columns(module, module.evaluated) | {"count": int(module.evaluated["count"])} if tested else None,
        **({"sample": text} if (text := sample(module.model, data.task)) else {}),
        **{f"test_{name}": by for name, by in _by_group(module, data).items()},
        "majority_accuracy": data.records("test").majority_accuracy() if tested else None,
        "validation_policy": config.data.validation,
        "data_note": data.task.note,
        **({"context": context} if (context := data.task.context) else {}),
        "learned": state.learned,
        "wall_seconds": round(keeper.wall_seconds(), 1),
        "training_seconds": round(state.seconds, 1),
        "evaluation_seconds": round(state.evaluation_seconds, 1),
        "tokens_per_second": round(state.totals[2] / max(state.seconds, 1e-9)),
        "peak_memory_bytes": machine.peak_memory_bytes(device),
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        **machine.describe(device),
        **({"own_code": code} if (code := own_code(config)) else {}),
    }


def _by_group(module: LitModel, data: LRADataModule) -> dict[str, Any]:
    return {f"by_{data.task.grouped_by}": by} if (by := module.evaluated_groups) else {}


def _columns(module: LitModel, values: dict[str, Any]) -> dict[str, float]:
    return {name: values[name] for name in module.objective.columns}


def _report(console: Console, config: Config, run: RunFolder, result: dict[str, Any]) -> None:
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
        console.print(f"generate: python -m chela.generate run={run.path}{_trusted(config)}")
    console.print(f"evaluate: python -m chela.evaluate run={run.path}{_trusted(config)}")
    console.print(f"resume:   python -m chela.train resume={run.path}{_trusted(config)}")
    console.print(f"plot:     python -m experiments.plot {run.path}")


def _trusted(config: Config) -> str:
    """Return the word that lets a run folder name the modules that this run's words named."""
    modules = {name.partition(":")[0] for name in (config.task.name, config.model.mixer.name) if ":" in name}
    return f" trust={','.join(sorted(modules))}" if modules else ""
