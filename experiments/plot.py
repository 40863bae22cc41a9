"""Draw figures, such as the learning curves of one or more runs; no display is needed.

chela plot runs/listops-mini/chela-seed0-1a2b3c4d            curves.png in the run's folder
chela plot runs/listops-mini out=listops.png                 every run below a folder, seeds as bands

A system has the same colour in every figure; a variant (``chela [model.mixer.gate=none]``) takes one that is left.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.results import ACCURACY
from experiments.runs import Run, read_runs, write
from experiments.summary import result_tables, row_order
from experiments.table import score_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The systems of the main table get the ten colours that differ most, in this order.
MAIN = ("chela", "chela_conv_only", "hedgehog", "lightning", "linear", "lion_s", "s4d", "softmax", "mega", "lion_d")
NOT_MEASURED = ("step", "split", "lr", "tokens_per_second", "seconds", "evaluation", "bits")  # the last is the loss
DASHED: dict[str, Any] = {"color": "0.5", "linestyle": "--", "linewidth": 0.8}  # the majority class; NaN draws nothing
SMOOTHING = 20  # logged lines in the running mean of the training curves


def colours(drawn: Sequence[str]) -> dict[str, Any]:
    """Give each name a colour: to a main system its own, whatever else is drawn, to another name one that is left."""
    import matplotlib

    palette = [matplotlib.colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    own = {name: colour for name, colour in zip(MAIN, palette, strict=False) if name in drawn}
    left = [colour for colour in palette if colour not in own.values()]
    return own | dict(zip(sorted(set(drawn) - set(own)), itertools.cycle(left), strict=False))


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Draw what was measured against the step: of one task everything, a panel each, of each of several its score.

    Thick lines are validation, seeds as a band from least to most, and thin ones, of one task, training (a running
    mean); the dashed line is the majority class. ``UsageError`` where no run has logged anything.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'chela-attention[plots]'") from None
    runs = [run for run in runs if len(run.metrics("validation")) or len(run.metrics("train"))]
    if not runs:
        raise UsageError("expected a metrics.csv with a line in the runs, there is none yet")
    groups = [(table, task) for table in result_tables(runs) for task in table.tasks if table.runs_of(task)]
    panels = [(table, task, table.score(task)) for table, task in groups]
    if len(groups) == 1:
        known = {"accuracy": ACCURACY} | {run.score["name"]: run.score for run in runs}
        logged = pd.concat([run.metrics(split) for run in runs for split in ("validation", "train")])
        names = [column for column in logged if column not in NOT_MEASURED]
        panels = [(*groups[0], known.get(name, {"name": name, "unit": "", "scale": 1})) for name in names]
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    colour = colours([name for table, *_ in panels for name in table.rows])
    for axis, (table, task, score) in zip(axes, panels, strict=False):
        for name, seeds in table.column(task)["runs"].items():
            if len(groups) == 1:
                _band(axis, [run.metrics("train") for run in seeds], score, colour[name], SMOOTHING)
            title = f"{name} seed {seeds[0].seed}" if len(groups) == len(seeds) == 1 else name
            _band(axis, [run.metrics("validation") for run in seeds], score, colour[name], 1, title)
        axis.set(title=f"{task} {table.preset}", xlabel="step", ylabel=score_heading(score))
        axis.grid(alpha=0.25, linewidth=0.6)
        if score["name"] == "accuracy":
            axis.axhline(table.majority(task), **DASHED)
        elif score["name"] == "loss":
            tops = [np.max(line.get_ydata()) for line in axis.lines if not str(line.get_label()).startswith("_")]
            axis.set_ylim(top=1.05 * np.nanmax([*tops, 0.0]) or None)  # above all validations, to tell these apart
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Name what is drawn once, under all panels, so that no name hides a point."""
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    named = {label: handle for pairs in found for handle, label in pairs}
    ordered, columns = sorted(named, key=row_order), max(1, round(figure.get_figwidth() / 2.2))
    handles = [named[name] for name in ordered]
    figure.legend(handles, ordered, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _band(
    axis: Axes, metrics: Sequence[pd.DataFrame], score: dict[str, Any], colour: Any, window: int, title: str = ""
) -> None:
    """Draw the mean of the seeds; of those that are not smoothed also what lies between the least and the most."""
    if (curve := mean_curve(metrics, score["name"], window)) is None:
        return
    curve, thick = curve * score["scale"], window == 1
    look = {"linewidth": 1.6, "marker": "." if len(curve) < 30 else None} if thick else {"linewidth": 0.6, "alpha": 0.5}
    axis.plot(curve["mean"], color=colour, label=title or None, **look)
    if thick and len(metrics) > 1:
        axis.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.2, linewidth=0)


def mean_curve(metrics: Sequence[pd.DataFrame], column: str, window: int) -> pd.DataFrame | None:
    """Return mean, min and max by step of each seed's trailing mean over ``window`` lines; None without a step.

    At each step they are of the seeds that have reached it. One that is only begun takes nothing from the others, but
    the mean may jump where it ends.
    """
    seeds = [one.set_index("step")[column].rolling(window, min_periods=1).mean() for one in metrics if column in one]
    return pd.concat(seeds).groupby(level=0).agg(["mean", "min", "max"]) if seeds else None


def drawn(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as a file's content; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=dpi, metadata={"Software": None} if kind == "png" else None)
    return out.getvalue()


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    out: Path | None = option(None, "the figure; its ending (.png, .pdf, .svg) chooses the format")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Draw the runs into ``out``; without it, beside the run, or here when there are several."""
    runs = read_runs(options.runs)
    target = options.out or (Path(options.runs[0]) if len(runs) == 1 else Path()) / "curves.png"
    figure = learning_curves(runs)
    try:
        write(target, drawn(figure, target.suffix.removeprefix(".") or "png"))
    except ValueError as error:  # matplotlib's, of the ending
        raise UsageError(f"out: expected a figure's file such as curves.png, got {target} ({error})") from None
    sys.stdout.write(f"{target}: curves of {len(runs)} run{'s' if len(runs) > 1 else ''}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
