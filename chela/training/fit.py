"""One run, from a configuration to a result."""

from __future__ import annotations

import copy
import signal
from typing import Any

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from rich.console import Console

from chela.config import fingerprint
from chela.errors import DivergedError, UsageError
from chela.models import build_model
from chela.schema import Config
from chela.training import checkpoint, machine
from chela.training.hardware import (
    check_memory,
    check_wandb,
    hardware,
    processes,
    quiet_lightning,
    rank,
    stdout_console,
)
from chela.training.keeping import Keeper
from chela.training.metrics import ChanceWatch, Metrics
from chela.training.module import LitClassifier
from chela.training.progress import DataProgress, ProgressDisplay
from chela.training.run import LAST_KEYS, RunFolder, claim_run, find_run
from chela.training.signals import Signals, Stopped, stopped_by
from lra.datamodule import LRADataModule


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
        result = begun.read_result()
        if result["test_accuracy"] is not None or not config.trainer.test:
            _report(console, begun, result)
            return 0
    quiet_lightning()
    leads = rank() == 0
    check_memory(config)
    check_wandb(config)
    platform = hardware(config)
    platform |= processes(config, platform["accelerator"])  # before a folder is made for a run that cannot be
    run, goes_on, lock = claim_run(config) if leads else (None, False, None)
    if run is not None:
        console.print(f"{'going on with' if goes_on else 'run'} {run.path}")
    with Signals() as signals:
        keeper = Keeper(run, goes_on, signals, started, console.print)
        try:
            _fit(config, console, keeper, platform)
            return 0
        except Stopped as stop:
            console.print(_farewell(stop, keeper))
            return stop.status if leads else 0
        except UsageError:
            if leads:
                raise
            return 0  # every process comes to it at the same step; the first one says it
        finally:
            if lock is not None:
                lock.release()


def _fit(config: Config, console: Console, keeper: Keeper, platform: dict[str, Any]) -> None:
    trainer, module, data = assemble(config, console, keeper, platform)
    try:
        trainer.fit(module, datamodule=data)
        if keeper.signals.asked:  # after the last step was saved
            raise stopped_by(keeper.signals.asked)
        _finish(config, console, keeper, trainer, module, data)
    except DivergedError as error:
        where = keeper.run.last if keeper.run.last.exists() else "none yet"
        raise DivergedError(f"{error}. Last good checkpoint: {where}") from None
    except Stopped as stop:
        launcher = trainer.strategy.launcher
        if stop.step is None and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)  # the other processes were not asked; they would wait for this one
        raise


def _finish(
    config: Config, console: Console, keeper: Keeper, trainer: L.Trainer, module: LitClassifier, data: LRADataModule
) -> None:
    assert keeper.best is not None
    module.model.load_state_dict(keeper.best["model"])
    if trainer.is_global_zero:
        keeper.write_best(module)
    if config.trainer.test:
        trainer.test(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        result = _result(config, trainer, module, data, keeper)
        keeper.run.write_result(result)
        _report(console, keeper.run, result)


def _farewell(stop: Stopped, keeper: Keeper) -> str:
    if not keeper.has_run:
        return f"stopped ({stop.reason})"
    where = "; nothing new to save" if stop.step is None else f" at step {stop.step}; saved"
    return f"stopped ({stop.reason}){where}. To go on: python -m chela.train resume={keeper.run.path}"


def assemble(
    config: Config, console: Console, keeper: Keeper, platform: dict[str, Any]
) -> tuple[L.Trainer, LitClassifier, LRADataModule]:
    """Build everything that a run needs; the callbacks' order is the order in which they see a step."""
    data = data_module(config, console)
    data.prepare_data()
    module = LitClassifier(build_model(config.model, data.task, config.seed), config)
    metrics = Metrics(keeper, config)
    watch = ChanceWatch(metrics, data.majority_accuracy("train"), console.print)
    keeper.parts = {"metrics": metrics, "watch": watch}
    display = ProgressDisplay(console, metrics, _progress_mode(config, console))
    trainer = L.Trainer(
        **platform,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate,
        val_check_interval=config.trainer.val_every * config.trainer.accumulate,  # in batches that Lightning is handed
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[metrics, watch, display, keeper],
    )
    return trainer, module, data


def data_module(config: Config, console: Console) -> LRADataModule:
    """Build the data module of a configuration; it says how far it is while records are made."""
    return LRADataModule(
        config.task,
        config.data,
        batch_size=config.trainer.batch_size,
        eval_batch_size=config.trainer.eval_batch_size,
        seed=config.seed,
        max_steps=config.trainer.max_steps,
        accumulate=config.trainer.accumulate,
        progress=DataProgress(console),
    )


def evaluate(config: Config, run: RunFolder, which: str, split: str) -> dict[str, float]:
    """Score a checkpoint of a run ("best" or "last") on "test" or "validation"; the same number as the run's own.

    Returns:
        ``loss``, ``accuracy`` and ``count``.
    """
    quiet_lightning()
    identity = fingerprint(config)
    if which == "best":
        weights = run.load_best(identity)["model"]
    else:
        weights = checkpoint.load(run.last, LAST_KEYS, identity)["model"]
    if config.trainer.accelerator == "gpu":  # that was for training; without one the weights are scored all the same
        config = copy.deepcopy(config)
        config.trainer.accelerator = "auto"
    data = data_module(config, stdout_console())
    data.prepare_data()
    platform = hardware(config)
    module = LitClassifier(build_model(config.model, data.task, config.seed), config)
    if platform["precision"] == "64-true":
        module.double()  # before the weights come, which would lose half of their digits
    try:
        module.model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"expected weights of this run's model, got others ({str(error).splitlines()[0][:120]}); "
            "use the version of chela that wrote them"
        ) from None
    trainer = L.Trainer(
        **platform,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if split == "test":
        trainer.test(module, datamodule=data, verbose=False)
    else:
        trainer.validate(module, datamodule=data, verbose=False)
    return module.evaluated


def _result(
    config: Config, trainer: L.Trainer, module: LitClassifier, data: LRADataModule, keeper: Keeper
) -> dict[str, Any]:
    assert keeper.best is not None
    device = trainer.strategy.root_device
    metrics, watch, tested = keeper.parts["metrics"], keeper.parts["watch"], config.trainer.test
    return {
        "task": config.task.name,
        "model": config.model.name,
        "preset": config.preset,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_validation_accuracy": keeper.best["accuracy"],
        "best_step": keeper.best["step"],
        "validation_accuracy": keeper.latest["accuracy"],
        "test_accuracy": module.evaluated["accuracy"] if tested else None,
        "test_loss": module.evaluated["loss"] if tested else None,
        "test_count": int(module.evaluated["count"]) if tested else None,
        "majority_accuracy": data.majority_accuracy("test") if tested else None,
        "validation_policy": config.data.validation,
        "data_note": data.task.note,
        "learned": watch.learned,
        "wall_seconds": round(keeper.wall_seconds(), 1),
        "training_seconds": round(metrics.seconds, 1),
        "tokens_per_second": round(metrics.tokens / max(metrics.seconds, 1e-9)),
        "peak_memory_bytes": machine.peak_memory_bytes(device),
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        **machine.describe(device),
    }


def _report(console: Console, run: RunFolder, result: dict[str, Any]) -> None:
    lra = "" if result["preset"] == "full" else f"  ({result['preset']} is a smaller task: not an LRA number)"
    tested = "test set left unseen (trainer.test=false)"
    if result["test_accuracy"] is not None:
        tested = f"test accuracy {result['test_accuracy']:.2%} (majority class {result['majority_accuracy']:.2%})"
    console.print(
        f"{result['task']} {result['preset']} {result['model']} seed {result['seed']}: {tested}, "
        f"best validation {result['best_validation_accuracy']:.2%} at step {result['best_step']}, "
        f"validation policy {result['validation_policy']}{lra}"
    )
    if result.get("data_note"):
        console.print(f"data: {result['data_note']}")
    console.print(f"evaluate: python -m chela.evaluate run={run.path}")
    console.print(f"resume:   python -m chela.train resume={run.path}")
    console.print(f"plot:     python -m experiments.plot {run.path}")


def _progress_mode(config: Config, console: Console) -> str:
    if config.trainer.progress != "auto":
        return config.trainer.progress
    return "live" if console.is_terminal else "plain"
