"""What happens in a step, and when something is logged, validated, saved or stopped.

``fit`` is one launch of a run: it finds or makes the run's folder, goes on from the newest checkpoint, takes the
remaining steps, scores the test set, and writes the result. Fabric moves things to the device, sets the precision and
joins several processes; the rest stands here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from chela.config.compose import load
from chela.config.identity import fingerprint
from chela.config.schema import Config, seconds
from chela.core.errors import DivergedError, UsageError
from chela.core.files import sync, write_whole
from chela.models import build_model
from chela.models.heads import Network
from chela.models.pretrained import from_pretrained
from chela.results import read_result
from chela.training import resume
from chela.training.log import Log
from chela.training.machine import arithmetic, hardware, matmul, processes, quiet_lightning, rank
from chela.training.objectives import Objective
from chela.training.resume import TIME_IS_UP, Signals, Stopped, agree, on_rank_zero, stopped_by, summed
from chela.training.run import RunFolder, RunState, claimed, find_run, report, result_of
from chela.training.score import data_of, expect_prefill, score_split
from chela.training.step import LitModel, diverged
from lra.batches import Batch
from lra.datamodule import LRADataModule
from lra.tasks.base import IGNORED


def fit(config: Config, console: Console, started: float) -> int:
    """Train, test, and write the result; return the exit status.

    A finished run is reported, not repeated; one that left the test set unseen is tested once it may be. From
    ``started``, by ``time.monotonic()``, ``trainer.max_time`` counts.
    """
    begun = find_run(config)
    if begun is not None and begun.result.exists():
        result = read_result(begun.result)
        if result["test"] is not None or not config.trainer.test:
            console.print(f"finished already: {begun.path} (again=true makes it anew)")
            report(console, config, begun, result)
            return 0
    quiet_lightning()
    leads, platform = rank() == 0, hardware(config)
    if platform["accelerator"] == "cpu":
        console.print(f"products of matrices by {matmul()} (trainer.matmul={config.trainer.matmul})")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("wandb=true: expected the package wandb: pip install wandb")
    fabric = Fabric(**platform, **processes(config, platform["accelerator"]))
    with Signals() as signals:
        try:
            data = data_of(config)
            model = build_model(config.model, data.task, config.seed)
            if config.weights and (begun is None or not begun.last.exists()):
                begin_with(model, config.weights, config.trust)
            module = LitModel(model, Objective(data.task), config)
            if config.trainer.sequence_parallel > 1:
                module.model.get_submodule("backbone").expect_sequence_parallel()  # type: ignore[operator]
            if config.data.carry:
                expect_prefill(module.model, "data.carry=true")
            data.prepare_data()  # before there is a folder: missing data must not leave one behind
            with claimed(config, console, leads) as (run, goes_on):
                fabric.launch()  # from here on all processes run, each with its part of every batch
                run, goes_on = fabric.broadcast((run, goes_on))
                assert run is not None
                Launch(fabric, module, data, run, signals, started, console).run_to_the_end(goes_on)
            return 0
        except Stopped as stop:
            if stop.step is None:  # the other processes were not asked; they would wait for this one
                for other in getattr(fabric.strategy.launcher, "procs", ()):
                    other.terminate()
            return stop.status if leads else 0
        except UsageError:
            if leads:
                raise
            return 0  # all processes raise it at the same step; the first one reports it


def begin_with(model: Network, weights: str, trust: str) -> None:
    """Give a network the best weights of a run's folder, or weights that have a name; UsageError where none fit."""
    folder = Path(weights).expanduser()
    if (folder / "config.yaml").is_file():
        given = RunFolder(folder).load_weights(load(folder, trust), "best")["model"]
    else:
        given = from_pretrained(weights, trust.split(",")).state_dict()
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        got = f"{weights}, whose do not fit ({' '.join(str(error).split())[:160]})"
        raise UsageError(f"weights: expected those of a network like this one, got {got}") from None


@dataclasses.dataclass
class Launch:
    """One launch of a run: its part of the steps, and at the last one the test."""

    fabric: Fabric
    module: LitModel
    data: LRADataModule
    run: RunFolder
    signals: Signals
    started: float  # by ``time.monotonic()``
    console: Console

    def __post_init__(self) -> None:
        fabric, module, data = self.fabric, self.module, self.data
        self.config, self.state = module.config, RunState(arithmetic=arithmetic(fabric.device))
        fabric.to_device(module)
        self.network, self.optimizer = fabric.setup(module, module.configure_optimizers())
        module.setup()
        pieces = self.config.trainer.sequence_parallel
        data.rank, data.world_size = fabric.global_rank // pieces, fabric.world_size // pieces

    def run_to_the_end(self, goes_on: bool) -> None:
        """Go on where the last launch stopped, and finish the run."""
        if goes_on:
            self.restore()
        self.earlier_seconds = self.state.wall_seconds
        self.log = Log(self.fabric, self.run, self.config, self.module.objective, self.state.step, self.console)
        try:
            self.train()
            if self.signals.asked:  # after the last step was saved
                raise stopped_by(self.signals.asked)
            self.finish()
        except DivergedError as error:
            where = self.run.last if self.run.last.exists() else "none yet"
            raise DivergedError(f"{error}. Last good checkpoint: {where}") from None

    def train(self) -> None:
        """Take the remaining steps; batches, dropout and learning rate of a step follow from (seed, step) alone."""
        fabric, module, network, state, config = self.fabric, self.module, self.network, self.state, self.config.trainer
        self.data.first_step = state.step
        batches = iter(self.data.train_dataloader())
        self.signals.patient = True  # from here on a signal waits for the end of the step
        self.clock = self.saved_at = time.monotonic()
        self.logged = state.totals[2], state.seconds
        try:
            for step in range(state.step, config.max_steps):
                self.optimizer.zero_grad()
                parts = [next(batches) for _ in range(config.accumulate)]
                for part, weight in enumerate(self.weights(parts)):
                    batch = fabric.to_device(parts[part])
                    assert (step, part) == (batch["step"], batch["part"]), "the data module gives the steps in order"
                    module.on_train_batch_start(batch, part)  # seeds the step, sets its learning rate
                    with fabric.no_backward_sync(network, enabled=part + 1 < config.accumulate):
                        with fabric.autocast():
                            loss = network.training_step(batch, part)
                        fabric.backward(loss * weight)
                module.configure_gradient_clipping(self.optimizer)
                self.optimizer.step()
                state.step = module.step = step + 1

                now = time.monotonic()
                state.seconds += now - self.clock
                self.clock = now
                last = state.step == config.max_steps
                if state.step % config.log_every == 0 or last:
                    self.log_step()
                if (config.max_steps - state.step) % config.val_every == 0:
                    self.validate()
                self.save_or_stop()
        finally:
            self.signals.patient = False
            self.log.close()

    def weights(self, parts: list[Batch]) -> Iterable[Any]:
        """Return the weight of each part's mean loss: its share of the targets of all parts, and of all processes.

        The processes' gradients are averaged after it. Where each sequence has one label, parts weigh alike.
        """
        if parts[0]["labels"].ndim == 1:
            return [1 / len(parts)] * len(parts)
        targets = torch.stack([(batch["labels"] != IGNORED).sum().float() for batch in parts]).to(self.fabric.device)
        return targets / summed(self.fabric, targets.sum()).clamp(min=1) * self.fabric.world_size

    def log_step(self) -> None:
        """Log the step's batch; a value that has no column in ``Log.columns`` is not written."""
        self.module.expect_finite()
        counts = summed(self.fabric, self.module.step_counts)
        (_, _, tokens), seconds = self.totals(), self.state.seconds
        values = self.module.objective.values(counts.tolist())
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["tokens_per_second"] = (tokens - self.logged[0]) / max(seconds - self.logged[1], 1e-9)
        self.logged = tokens, seconds
        self.log.line(self.state.step, "train", values, seconds)

    def totals(self) -> list[float]:
        """Return targets hit, targets and tokens since the run's first step, of all processes; a GPU is waited for."""
        new = summed(self.fabric, self.module.run_counts).tolist()
        self.state.totals = [old + more for old, more in zip(self.state.totals, new, strict=True)]
        self.module.run_counts.zero_()
        return self.state.totals

    def validate(self) -> None:
        """Score the validation set, and keep the weights when they are the best so far.

        Its time does not count as training.
        """
        began = time.monotonic()
        values = score_split(self.module, self.data, "validation", self.fabric)
        took = time.monotonic() - began
        self.log.line(self.state.step, "validation", values, self.state.seconds, took)
        self.clock = time.monotonic()
        if not math.isfinite(values["loss"]):
            raise diverged("the validation loss", self.state.step)
        self.state.last = {"step": self.state.step, **values}
        if self.module.objective.score.better(self.state.last, self.state.best):
            self.state.best = self.state.last
            on_rank_zero(self.fabric, self._save_best)

    def save_or_stop(self) -> None:
        """Save a checkpoint or stop the run after a step, where either is due."""
        config, step, now = self.config.trainer, self.state.step, time.monotonic()
        limit = seconds(config.max_time)
        asked = self.signals.asked or (TIME_IS_UP if limit is not None and now - self.started > limit else 0)
        late = now - self.saved_at > 60 * config.checkpoint_minutes
        due = late or step % config.checkpoint_every == 0 or step == config.max_steps
        due, asked = agree(self.fabric, due, asked)
        if due or asked:
            self.save()
        if asked == TIME_IS_UP and step < config.max_steps:
            raise Stopped(f"trainer.max_time={config.max_time}", 0, step)
        if asked > TIME_IS_UP:
            raise stopped_by(asked, step)

    # ---- checkpoints ----

    def save(self) -> None:
        """Write the checkpoint of this step (process 0) while the others wait.

        DivergedError where a weight is no finite number: the checkpoint before this step is kept.
        """
        self.module.expect_finite()
        for name, value in self.module.model.state_dict().items():
            if not value.isfinite().all():
                raise diverged(name, self.state.step)
        self.totals()
        self.state.wall_seconds = self.earlier_seconds + time.monotonic() - self.started
        on_rank_zero(self.fabric, self._save_last)
        self.saved_at = time.monotonic()

    def _save_last(self) -> None:
        if self.run.metrics.exists():
            sync(self.run.metrics)  # a checkpoint never outlives the lines that led to it
        saved = {"step": self.state.step, "fingerprint": fingerprint(self.config)}
        saved |= {"model": self.module.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        saved |= {"state": dataclasses.asdict(self.state)}
        saved |= {"carried": self.module.carried} if self.module.carried else {}
        resume.save(self.run.last, saved, previous=self.run.previous)

    def _save_best(self) -> None:
        """Write the best weights to a file of their own. A run killed before the next checkpoint finds them again."""
        best = {"fingerprint": fingerprint(self.config), **self.state.last, "model": self.module.model.state_dict()}
        resume.save(self.run.best, best)

    def restore(self) -> None:
        """Put weights, optimiser and state where the newest checkpoint has them; UsageError where it does not fit."""
        try:  # in process 0, for all: each must go on from the same one
            identity, say = fingerprint(self.config), self.console.print
            saved = on_rank_zero(self.fabric, lambda: self.run.load_last(identity, say))
        except UsageError as error:
            raise UsageError(f"resume: {error}") from None
        if saved is None:
            self.console.print("no checkpoint yet: from the first step")
            return
        with resume.loading(self.run.path):
            self.module.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.module.carried = self.fabric.to_device(saved.get("carried", {}))
            state = {"arithmetic": ""} | saved["state"]  # older checkpoints have none
            for item in dataclasses.fields(self.state):
                setattr(self.state, item.name, state[item.name])
        before, now = self.state.arithmetic, arithmetic(self.fabric.device)
        if before and before != now:
            self.console.print(f"begun on {before}; on {now} the last digits differ from one run on one machine")
        self.state.arithmetic = now

    # ---- the end ----

    def finish(self) -> None:
        """Score the best weights on the test set, and write the result."""
        state, module, data = self.state, self.module, self.data
        best = on_rank_zero(self.fabric, lambda: self.run.load_weights(self.config, "best"))
        assert best is not None
        module.model.load_state_dict(best["model"])
        # the file decides: a launch that was killed may have saved it, and on a GPU repeated steps may differ
        state.best = {key: best[key] for key in ("step", *module.objective.columns, "count")}
        splits = (*data.task.further, "test") if self.config.trainer.test else ()
        tests = {split: score_split(module, data, split, self.fabric) for split in splits}
        if self.fabric.is_global_zero:
            wall_seconds = self.earlier_seconds + time.monotonic() - self.started
            result = result_of(self.fabric, module, data, state, tests, wall_seconds)
            write_whole(self.run.result, (json.dumps(result, indent=2) + "\n").encode())
            report(self.console, self.config, self.run, result)
