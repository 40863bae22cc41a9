"""How far runs are: step, score, time left, last sign of life; made of what lies in their folders."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence

from chela.config.words import duration
from experiments.runs import Run
from experiments.summary import STEPS

RECENT = 50  # logged steps from which the speed is taken
_ALIVE = (".holder", "config.yaml", "result.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt")


def status_lines(runs: Sequence[Run], now: float) -> Iterator[str]:
    """Yield a line for each run, those that still go first; ``now`` is the time of day in seconds."""
    told = [(_going(run), now - _last_sign(run), run) for run in runs]
    for going, quiet, run in sorted(told, key=lambda one: (not one[0], one[1])):
        state = "running" if going else "stopped" if run.state == "unfinished" else run.state
        words = [f"{run.task}-{run.preset}", run.model, f"seed {run.seed}", state, *_how_far(run)]
        yield "  ".join([*words, f"last sign {duration(max(quiet, 0))} ago", str(run.path)])


def _how_far(run: Run) -> Iterator[str]:
    """Tell step, scores and, of a run that has not ended, the time left at its speed, evaluations included."""
    train, validation = run.metrics("train"), run.metrics("validation")
    tenth = run.metrics("tenth")
    total = int(run.config[STEPS])
    step = int(max([frame["step"].max() for frame in (train, validation, tenth) if len(frame)], default=0))
    yield f"step {step:,}/{total:,} ({step / total:.0%})"
    name, unit = run.score["name"], run.score["unit"]
    for frame, what in ((validation, "validation"), (tenth, "a tenth of it")):
        if len(frame) and name in frame:
            last = frame.iloc[-1]
            space = "" if unit == "%" else " "
            value = f"{run.score['scale'] * last[name]:.{run.score['digits']}f}{space}{unit}"
            yield f"{what} {name} {value} at step {int(last['step']):,}"
    took = validation["evaluation"].dropna() if "evaluation" in validation else []
    if len(took):
        yield f"{duration(statistics.median(took))} an evaluation"
    recent = train.tail(RECENT)
    if run.state == "unfinished" and len(recent) > 1 and step < total:
        seconds, steps = (recent[name].iloc[-1] - recent[name].iloc[0] for name in ("seconds", "step"))
        to_come = -(-(total - step) // int(run.config["trainer.val_every"]))
        left = (total - step) * seconds / steps + to_come * (statistics.median(took) if len(took) else 0)
        yield f"about {duration(left)} left"


def _last_sign(run: Run) -> float:
    files = [run.curves, *(run.path / name for name in _ALIVE)]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def _going(run: Run) -> bool:
    """Whether the launch that held the folder last still runs here; of another machine's launches nothing is known."""
    holder = run.path / ".holder"
    if run.state != "unfinished" or not holder.exists():
        return False
    said = re.fullmatch(r"process (\d+) on (.*)", holder.read_text(encoding="utf-8", errors="replace"))
    if said is None or said[2] != platform.node():
        return False
    try:
        os.kill(int(said[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
