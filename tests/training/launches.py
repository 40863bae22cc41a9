"""Launches of tiny runs, in this process or in one that may be killed, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chela.__main__ import main as chela_main
from chela.train import main as train_main

# 48 records in batches of 8: an epoch is 6 steps; validations at steps 2, 7 and 12, checkpoints at 4, 8 and 12
TINY = (
    "task=listops",
    "preset=tiny",
    "task.train=48",
    "task.validation=30",
    "task.test=40",
    "model.norm=batch",
    "model.dropout=0.1",
    "trainer.max_steps=12",
    "trainer.batch_size=8",
    "trainer.eval_batch_size=16",
    "trainer.val_every=5",
    "trainer.checkpoint_every=4",
    "trainer.threads=1",
    "trainer.progress=none",
    "tensorboard=false",
    "allocator=false",
)
EPOCH = 6
LAST = 12


@dataclass
class Ended:
    """What a launch printed and how it ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


def launch(*words: str, main: Callable[[list[str]], int] = train_main) -> Ended:
    """Call ``chela train``, or another command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return Ended(status, out.getvalue(), err.getvalue())


# ---- launches that can be killed: forked from a process that has imported everything, so that one costs little ----

FORKS = multiprocessing.get_context("forkserver")
_LOADED = ["chela.training.loop", "chela.models", "lra.tasks.listops", "lra.generators.listops", "tensorflow_datasets"]
FORKS.set_forkserver_preload([*_LOADED, "pytest", "tests.training.launches"])


def fork(words: tuple[str, ...], log: Path, prepare: Callable[..., None] | None = None, *given: Any) -> Any:
    """Start a launch in a process of its own; it prints to ``log`` and calls ``prepare(*given)`` first."""
    return _start(train_main, words, (log, log), prepare, given)


def apart(folder: Path, *words: str, prepare: Callable[..., None] | None = None, given: tuple[Any, ...] = ()) -> Ended:
    """Do as ``python -m chela`` does in a folder, from which it imports; call ``prepare(*given)`` first."""
    logs = (folder / ".stdout", folder / ".stderr")
    process = _start(chela_main, words, logs, prepare, given, folder)
    process.join(120)
    return Ended(process.exitcode, *(log.read_text() for log in logs))


def _start(main: Any, words: tuple[str, ...], logs: tuple[Path, Path], *more: Any) -> Any:
    for log in logs:
        log.unlink(missing_ok=True)
    process = FORKS.Process(target=_forked, args=(main, words, logs, *more))
    process.start()
    return process


def _forked(
    main: Callable[[list[str]], int],
    words: tuple[str, ...],
    logs: tuple[Path, Path],
    prepare: Callable[..., None] | None,
    given: tuple[Any, ...],
    folder: Path | None = None,
) -> None:
    torch.set_num_threads(1)
    for number, log in enumerate(logs, 1):
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
    if folder is not None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
    if prepare is not None:
        prepare(*given)
    status = main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def in_step(step: int, action: Callable[[], object]) -> None:
    """Call something when a step (from 1) is taken, once; the class stays so."""
    from chela.training.step import LitModel

    plain, todo = LitModel.training_step, [action]

    def training_step(self: LitModel, batch: Any, batch_idx: int) -> Any:
        if self.step + 1 == step and todo:
            todo.pop()()
        return plain(self, batch, batch_idx)

    LitModel.training_step = training_step  # type: ignore[method-assign]


def die_at(point: int) -> None:
    """Kill this process at the given one of all points at which it is about to change, or has just changed, a file."""
    from chela.core import files
    from chela.training import log as metrics
    from chela.training.step import LitModel

    left = point

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            tick()
            result = function(*arguments, **options)
            tick()
            return result

        return wrapped

    class Halves(io.FileIO):
        def write(self, data: Any) -> int:
            half = len(data) // 2
            super().write(data[:half])
            tick()
            return half + (super().write(data[half:]) or 0)

    os.fsync = around(os.fsync)
    os.replace = around(os.replace)
    metrics.append = around(metrics.append)
    LitModel.test_step = around(LitModel.test_step)  # type: ignore[method-assign]
    files.open = lambda path, *mode, **_: Halves(path, *mode)  # type: ignore[attr-defined]


# ---- what a run leaves behind --------------------------------------------------------------------------------------

# Neither clocks, nor the state of the checkout, in which somebody may be at work.
_CLOCK = {"wall_seconds", "training_seconds", "tokens_per_second", "peak_memory_bytes", "processes", "seconds"}
_CLOCK |= {"evaluation_seconds", "evaluation", "git_commit"}


def only_run(runs: Path) -> Path:
    """The one run under a folder."""
    (config,) = runs.rglob("config.yaml")
    return config.parent


def metrics_of(run: Path) -> list[dict[str, str]]:
    """The lines of ``metrics.csv``, without what a clock says."""
    head, *lines = (run / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    return [{key: value for key, value in row.items() if key not in _CLOCK} for row in rows]


def left_by(run: Path) -> dict[str, Any]:
    """Everything that a finished run leaves, without what a clock says."""
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    last["state"] = {key: value for key, value in last["state"].items() if key not in _CLOCK}
    result = json.loads((run / "result.json").read_text())
    result = {key: value for key, value in result.items() if key not in _CLOCK}
    return {"last": last, "best": best, "result": result, "metrics": metrics_of(run)}


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Compare to the last bit, naming the place of the first difference."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), f"{where}: {len(found)} against {len(expected)}"
        for i, value in enumerate(expected):
            assert_equal(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, f"{where}: {found!r} against {expected!r}"
