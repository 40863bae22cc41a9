"""How far runs are: step, score, time left, last sign of life; made of what lies in their folders."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from chela.config.words import duration
from experiments.runs import Run
from experiments.summary import STEPS

RECENT = 50  # logged steps from which the speed is taken
_ALIVE = (".holder", "config.yaml", "result.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt")


def status_lines(runs: Sequence[Run], now: float) -> Iterator[str]:
    """Yield a line for each run, those that still go first; ``now`` is the time of day in seconds."""
    told = [(not _going(run), now - _last_sign(run), run) for run in runs]
    for over, quiet, run in sorted(told, key=lambda one: one[:2]):
        state = "running" if not over else "stopped" if run.state == "unfinished" else run.state
        words = [f"{run.task}-{run.preset}", run.model, f"seed {run.seed}", state, *_how_far(run)]
        yield "  ".join([*words, f"last sign {duration(max(quiet, 0))} ago", str(run.path)])


def _how_far(run: Run) -> Iterator[str]:
    """Tell step, scores and, of a run that has not ended, the time left at its speed, evaluations included."""
    train, validation, tenth = (run.metrics(split) for split in ("train", "validation", "tenth"))
    total = int(run.config[STEPS])
    step = int(max([frame["step"].max() for frame in (train, validation, tenth) if len(frame)], default=0))
    yield f"step {step:,}/{total:,} ({step / total:.0%})"
    for frame, what in ((validation, "validation"), (tenth, "a tenth of it")):
        if len(frame) and run.score["name"] in frame:
            last = frame.iloc[-1]
            yield f"{what} {_score_text(run, last)} at step {int(last['step']):,}"
    if run.state == "finished":
        yield f"test {_score_text(run, run.result['test'])}"
    if run.error:
        yield f"({run.error})"
    evaluation = validation.get("evaluation", pd.Series(dtype=float)).median()
    if not pd.isna(evaluation):
        yield f"{duration(evaluation)} an evaluation"
    recent = train.tail(RECENT)
    if run.state == "unfinished" and len(recent) > 1 and step < total:
        seconds, steps = (recent[name].iloc[-1] - recent[name].iloc[0] for name in ("seconds", "step"))
        to_come = -(-(total - step) // int(run.config["trainer.val_every"]))
        left = (total - step) * seconds / steps + to_come * (0 if pd.isna(evaluation) else evaluation)
        yield f"about {duration(left)} left"


def _score_text(run: Run, values: Mapping[str, float]) -> str:
    name, unit, scale, digits = (run.score[key] for key in ("name", "unit", "scale", "digits"))
    return f"{name} {scale * values[name]:.{digits}f}{'' if unit == '%' else ' '}{unit}"


def _last_sign(run: Run) -> float:
    files = [run.curves, *(run.path / name for name in _ALIVE)]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def _going(run: Run) -> bool:
    """Whether the launch that held the folder last still runs here; of another machine's launches nothing is known."""
    holder = run.path / ".holder"
    told = holder.read_text(encoding="utf-8", errors="replace") if holder.exists() else ""
    said = re.fullmatch(r"process (\d+) on (.*)", told)
    if run.state != "unfinished" or said is None or said[2] != platform.node():
        return False
    try:
        os.kill(int(said[1]), 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True
