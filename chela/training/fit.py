"""One run, from a configuration to a result."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning as L
import torch
from rich.console import Console

from chela.config import fingerprint
from chela.errors import UsageError
from chela.models import build_model
from chela.schema import Config
from chela.training import checkpoint, machine
from chela.training.keeping import Keeper, Stopped
from chela.training.metrics import ChanceWatch, Metrics
from chela.training.module import LitClassifier
from chela.training.progress import ProgressDisplay
from chela.training.run import RunFolder, find_run
from lra.datamodule import LRADataModule
from lra.tasks import get_task


def fit(config: Config, console: Console) -> int:
    """Train, test, and write the result; return the exit status.

    A run that is already finished is reported, not repeated.
    """
    run, goes_on = find_run(config)
    leads = _rank() == 0
    if leads and goes_on and run.result.exists():
        _report(console, run, run.read_result())
        return 0
    if leads and not goes_on:
        run.create(config)
    console.print(f"{'going on with' if goes_on else 'run'} {run.path}")

    quiet_lightning()
    trainer, module, data, keeper = assemble(config, console, run, goes_on)
    try:
        trainer.fit(module, datamodule=data)
    except Stopped as stop:
        console.print(f"{stop}; saved. To go on: python -m chela.train resume={keeper.run.path}")
        return stop.status
    assert keeper.best is not None
    best = {name: value.clone() for name, value in keeper.best["model"].items()}
    module.model.load_state_dict(best)
    if trainer.is_global_zero:
        keeper.write_best(module)
    trainer.test(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        result = _result(config, trainer, module, data, keeper)
        keeper.run.write_result(result)
        _report(console, keeper.run, result)
    return 0


def assemble(
    config: Config, console: Console, run: RunFolder, goes_on: bool
) -> tuple[L.Trainer, LitClassifier, LRADataModule, Keeper]:
    """Build everything that a run needs; the callbacks' order is the order in which they see a step."""
    task = get_task(config.task)
    data = data_module(config)
    data.prepare_data()
    module = LitClassifier(build_model(config.model, task, config.seed), config)
    watch = ChanceWatch(data.majority_accuracy("train"), console.print)
    keeper = Keeper(run, goes_on, console.print, parts={})
    metrics = Metrics(keeper, config.tensorboard)
    keeper.parts = {"metrics": metrics, "watch": watch}
    display = ProgressDisplay(console, metrics, _progress_mode(config, console))
    trainer = L.Trainer(
        **hardware(config),
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy="ddp" if config.trainer.devices * config.trainer.num_nodes > 1 else "auto",
        max_steps=config.trainer.max_steps,
        val_check_interval=config.trainer.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[metrics, watch, display, keeper],
    )
    return trainer, module, data, keeper


def data_module(config: Config) -> LRADataModule:
    """Build the data module of a configuration."""
    return LRADataModule(
        config.task,
        config.data,
        batch_size=config.trainer.batch_size,
        eval_batch_size=config.trainer.eval_batch_size,
        seed=config.seed,
        max_steps=config.trainer.max_steps,
    )


def evaluate(config: Config, run: RunFolder, which: str, split: str) -> dict[str, float]:
    """Score a checkpoint of a run ("best" or "last") on "test" or "validation"; the same number as the run's own.

    Returns:
        ``loss``, ``accuracy`` and ``count``.
    """
    quiet_lightning()
    state = checkpoint.load(run.best if which == "best" else run.last)
    data = data_module(config)
    module = LitClassifier(build_model(config.model, get_task(config.task), config.seed), config)
    try:
        module.model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        raise UsageError(
            f"expected weights of this run's model, got others ({str(error).splitlines()[0][:120]})"
        ) from None
    trainer = L.Trainer(
        **hardware(config),
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


def hardware(config: Config) -> dict[str, Any]:
    """Choose accelerator and precision.

    Raises:
        UsageError: A GPU is asked for and torch sees none.
    """
    has_gpu = torch.cuda.is_available()
    wanted = config.trainer.accelerator
    if wanted == "gpu" and not has_gpu:
        raise UsageError("trainer.accelerator: expected a CUDA GPU for gpu, torch sees none; use cpu or auto")
    accelerator = ("cuda" if has_gpu else "cpu") if wanted == "auto" else {"gpu": "cuda", "cpu": "cpu"}[wanted]
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if accelerator == "cuda" else "32-true"
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    return {"accelerator": accelerator, "precision": precision}


def quiet_lightning() -> None:
    """Keep back Lightning's advertisements and the hints that do not hold here."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*litmodels.*|.*litlogger.*|.*tensorboardX.*")


def _result(
    config: Config, trainer: L.Trainer, module: LitClassifier, data: LRADataModule, keeper: Keeper
) -> dict[str, Any]:
    assert keeper.best is not None
    metrics, watch = keeper.parts["metrics"], keeper.parts["watch"]
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
        "test_accuracy": module.evaluated["accuracy"],
        "test_loss": module.evaluated["loss"],
        "test_count": int(module.evaluated["count"]),
        "majority_accuracy": data.majority_accuracy("test"),
        "validation_policy": config.data.validation,
        "learned": watch.learned,
        "wall_seconds": round(keeper.wall_seconds(), 1),
        "training_seconds": round(metrics.seconds, 1),
        "tokens_per_second": round(metrics.tokens / max(metrics.seconds, 1e-9)),
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        **machine.describe(),
    }


def _report(console: Console, run: RunFolder, result: dict[str, Any]) -> None:
    lra = "" if result["preset"] == "full" else f"  ({result['preset']} is a smaller task: not an LRA number)"
    console.print(
        f"{result['task']} {result['preset']} {result['model']} seed {result['seed']}: test accuracy "
        f"{result['test_accuracy']:.2%} (majority class {result['majority_accuracy']:.2%}), "
        f"best validation {result['best_validation_accuracy']:.2%} at step {result['best_step']}, "
        f"validation policy {result['validation_policy']}{lra}"
    )
    console.print(f"evaluate: python -m chela.evaluate run={run.path}")
    console.print(f"resume:   python -m chela.train resume={run.path}")
    console.print(f"plot:     python -m experiments.plot {run.path}")


def _progress_mode(config: Config, console: Console) -> str:
    if config.trainer.progress != "auto":
        return config.trainer.progress
    return "live" if console.is_terminal else "plain"


def _rank() -> int:
    from lightning.fabric.utilities.rank_zero import _get_rank

    return _get_rank() or 0


def stdout_console() -> Console:
    """Return the console of a run: plain words, nothing folded; silent on all processes but the first."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=_rank() != 0)
