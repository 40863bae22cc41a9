"""The figures: functions from runs to matplotlib figures, drawn without a display.

Colours belong to systems, not to positions in a list, so that a system has the same one in every figure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chela.errors import UsageError
from experiments.runs import Run, labels, task_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

SMOOTHING = 20  # logged lines in the running mean of the training curves


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """Make a figure of ``rows × columns`` panels of the given size in inches; the panels come as a 2-D array."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("expected matplotlib for figures, it is not installed: pip install 'chela[plots]'") from None
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colours(names: Sequence[str]) -> dict[str, Any]:
    """Give each name a colour; ``chela`` comes first and is always the same."""
    import matplotlib

    palette = [matplotlib.colormaps[name](index) for name in ("tab10", "Dark2") for index in range(8)]
    ordered = sorted(set(names), key=lambda name: (name != "chela", name))
    return {name: palette[index % len(palette)] for index, name in enumerate(ordered)}


def grouped(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return the runs by ``task-preset``, then by row name; each group's members differ by their seed alone."""
    names = labels(runs)
    groups: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (task_order(run.task), run.preset, names[run.path], run.seed)):
        groups[f"{run.task} {run.preset}"][names[run.path]].append(run)
    return {task: dict(rows) for task, rows in groups.items()}


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Draw loss and accuracy against the step, a row of panels for each task, seeds as a band from least to most.

    Thin lines are training (a running mean), thick ones validation; the dashed line is the majority class.
    """
    groups = grouped(runs)
    figure, axes = new_figure(len(groups), 2, 5.2, 3.2)
    colour = colours([name for rows in groups.values() for name in rows])
    for (task, rows), (left, right) in zip(groups.items(), axes, strict=True):
        for name, members in rows.items():
            for axis, column in ((left, "loss"), (right, "accuracy")):
                scale = 100.0 if column == "accuracy" else 1.0
                _band(axis, [run.metrics("train") for run in members], column, scale, colour[name], SMOOTHING)
                seeds = f"{name} ({len(members)} seeds)" if len(members) > 1 else f"{name} seed {members[0].seed}"
                _band(axis, [run.metrics("validation") for run in members], column, scale, colour[name], 1, seeds)
        left.set(title=task, xlabel="step", ylabel="loss")
        right.set(title=task, xlabel="step", ylabel="accuracy, %")
        _majority_line(right, [run for members in rows.values() for run in members])
        right.legend(fontsize=7, frameon=False)
    return figure


def _majority_line(axis: Axes, runs: Sequence[Run]) -> None:
    known = {run.result["majority_accuracy"] for run in runs if run.state == "finished"}
    for value in sorted(known):
        axis.axhline(100 * value, color="0.5", linestyle="--", linewidth=0.8)


def _band(
    axis: Axes,
    metrics: list[dict[str, list[float]]],
    column: str,
    scale: float,
    colour: Any,
    window: int,
    label: str = "",
) -> None:
    """Draw the mean of the seeds and what lies between the least and the most of them."""
    curve = mean_curve([(table["step"], table[column]) for table in metrics if table], window)
    if curve is None:
        return
    steps, mean, low, high = curve
    thick = window == 1
    axis.plot(
        steps,
        mean * scale,
        color=colour,
        linewidth=1.6 if thick else 0.6,
        alpha=1.0 if thick else 0.5,
        marker="." if thick and len(steps) < 30 else None,
        label=label or None,
    )
    if thick and len(metrics) > 1:
        axis.fill_between(steps, low * scale, high * scale, color=colour, alpha=0.2, linewidth=0)


def mean_curve(series: list[tuple[list[float], list[float]]], window: int) -> Curve | None:
    """Return steps, mean, least and most over the seeds at the steps that all of them have; None when there is none.

    Args:
        series: Steps and values of each seed.
        window: Values in a trailing running mean.
    """
    if not series:
        return None
    common = sorted(set.intersection(*(set(steps) for steps, _ in series)))
    if not common:
        return None
    rows = [
        np.interp(common, np.asarray(steps), _running_mean(np.asarray(values, dtype=np.float64), window))
        for steps, values in series
    ]
    table = np.stack(rows)
    return np.asarray(common, dtype=np.float64), table.mean(0), table.min(0), table.max(0)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    means: NDArray[np.float64] = (sums[index] - sums[start]) / (index - start)
    return means


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the ending of ``path`` chooses the format."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--out: expected a file that can be written, such as curves.png, got {path} ({error})"
        ) from None
