"""Draw the learning curves of one or more runs; no display is needed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from chela.core.errors import UsageError
from chela.results import ACCURACY
from experiments.runs import Run
from experiments.summary import result_tables, row_order
from experiments.table import score_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_MEASURED = ("step", "split", "lr", "tokens_per_second", "seconds", "evaluation", "bits")  # the last is the loss
DASHED: dict[str, Any] = {"color": "0.5", "linestyle": "--", "linewidth": 0.8}  # the majority class; NaN draws nothing
SMOOTHING = 20  # logged lines in the running mean of the training curves


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Draw what was measured against the step: of one task everything, a panel each, of each of several its score.

    Thick lines are validation, seeds as a band from least to most, and thin ones, of one task, training (a running
    mean); the dashed line is the majority class. ``UsageError`` where no run has logged anything.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures need matplotlib: pip install matplotlib") from None
    runs = [run for run in runs if len(run.metrics("validation")) or len(run.metrics("train"))]
    if not runs:
        raise UsageError("expected a metrics.csv with a line in the runs, there is none yet")
    groups = [(table, task) for table in result_tables(runs) for task in table.tasks if table.runs_of(task)]
    panels = [(table, task, table.score(task)) for table, task in groups]
    if len(groups) == 1:
        known = {"accuracy": ACCURACY} | {run.score["name"]: run.score for run in runs}
        logged = pd.concat([run.metrics(split) for run in runs for split in ("validation", "train")])
        measured = [column for column in logged if column not in NOT_MEASURED]
        panels = [(*groups[0], known.get(name, {"name": name, "unit": "", "scale": 1})) for name in measured]
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    names = sorted({name for table, *_ in panels for name in table.rows}, key=row_order)
    colour = {name: colormaps["tab20"]((2 * place + place // 10) % 20) for place, name in enumerate(names)}
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
            top = max(filter(np.isfinite, tops), default=None)
            axis.set_ylim(top=top and 1.05 * top)  # above all validations, to tell these apart
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    named = {label: handle for pairs in found for handle, label in pairs}  # once, under all panels: it hides no point
    titles = sorted(named, key=row_order)
    handles = [named[title] for title in titles]
    figure.legend(handles, titles, loc="outside lower center", ncols=2 * columns, fontsize=8, frameon=False)
    return figure


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

    Each step counts the seeds that have reached it, so the mean may jump where an unfinished one ends.
    """
    seeds = [one.set_index("step")[column].rolling(window, min_periods=1).mean() for one in metrics if column in one]
    return pd.concat(seeds).groupby(level=0).agg(["mean", "min", "max"]) if seeds else None


def drawn(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as the content of a png, pdf or svg; the same figure gives the same bytes."""
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise UsageError(f"out: expected .html or the ending of a figure ({', '.join(sorted(known))}), got {kind!r}")
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=dpi, metadata={"Software": None} if kind == "png" else None)
    return out.getvalue()
