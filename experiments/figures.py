"""The figures: functions from runs to matplotlib figures, drawn without a display.

Colours belong to systems, not to positions in a list, so that a system has the same one in every figure. What is no
system of its own, such as a variant (``chela [model.mixer.gate=none]``), takes what they leave, and may have another
colour in another figure.
"""

from __future__ import annotations

import itertools
import re
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

    from experiments.probe import Kernel
    from experiments.summary import Part

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

_UNIT = re.compile(r"\[([^\]]+)\]$")
CURVES = ("loss", "accuracy")

# The files of configs/model in the order of their colours: those of the main table get the ten that differ most.
SYSTEMS = (
    "chela",
    "chela_conv_only",
    "hedgehog",
    "lightning",
    "linear",
    "lion_s",
    "s4d",
    "softmax",
    "mega",
    "lion_d",
    "chela_attention_only",
    "chela_short_only",
    "chela_long_only",
    "chela_no_gate",
    "chela_decay",
    "chela_no_reparam",
    "lion_lit",
    "mega_chunk",
)
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
    """Give each name a colour: to a system its own, whatever else is drawn, to another name one that is left."""
    import matplotlib

    strong_then_light = (*range(0, 20, 2), *range(1, 20, 2))
    palette = [matplotlib.colormaps["tab20"](index) for index in strong_then_light]
    own = {name: palette[index] for index, name in enumerate(SYSTEMS) if name in names}
    left = [colour for colour in palette if colour not in own.values()]
    others = sorted(set(names) - set(own))
    return own | {name: left[index % len(left)] for index, name in enumerate(others)}


def grouped(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return the runs by ``task-preset``, then by row name; each group's members differ by their seed alone."""
    names = labels(runs)
    groups: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (task_order(run.task), run.preset, names[run.path], run.seed)):
        groups[f"{run.task} {run.preset}"][names[run.path]].append(run)
    return {task: dict(rows) for task, rows in groups.items()}


def with_curves(runs: Sequence[Run], training: bool = True) -> tuple[list[Run], list[str]]:
    """Return the runs that have something to draw, and what is to be said of those that lack a column of it."""
    kept, left_out = [], []
    for run in runs:
        tables = [run.metrics(split) for split in ("train", "validation") if training or split == "validation"]
        tables = [table for table in tables if table]
        lacking = [column for column in ("step", *CURVES) if any(column not in table for table in tables)]
        if lacking:
            what = f"expected columns step, {', '.join(CURVES)} in its metrics.csv, got none of {', '.join(lacking)}"
            left_out.append(f"The curves of {run.task} {run.path.name} are left out: {what}.")
        elif tables:
            kept.append(run)
    return kept, left_out


def learning_curves(runs: Sequence[Run], training: bool = True) -> Figure:
    """Draw loss and accuracy against the step, a row of panels for each task, seeds as a band from least to most.

    Thin lines are training (a running mean), thick ones validation; the dashed line is the majority class. Each step
    shows the seeds that have reached it: where an unfinished one ends, the curve goes on with the others.

    Args:
        runs: What is drawn, as ``with_curves`` returns it.
        training: Draw the training curves too.
    """
    groups = grouped(runs)
    figure, axes = new_figure(len(groups), 2, 5.2, 3.2)
    colour = colours([name for rows in groups.values() for name in rows])
    for (task, rows), (left, right) in zip(groups.items(), axes, strict=True):
        for name, members in rows.items():
            for axis, column in zip((left, right), CURVES, strict=True):
                scale = 100.0 if column == "accuracy" else 1.0
                if training:
                    _band(axis, [run.metrics("train") for run in members], column, scale, colour[name], SMOOTHING)
                label = name if len(members) > 1 else f"{name} seed {members[0].seed}"
                _band(axis, [run.metrics("validation") for run in members], column, scale, colour[name], 1, label)
        left.set(title=task, xlabel="step", ylabel="loss")
        right.set(title=task, xlabel="step", ylabel="accuracy, %")
        _majority_line(right, [run for members in rows.values() for run in members])
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Name what is drawn once, under all panels, so that no name hides a point."""
    from matplotlib.container import ErrorbarContainer

    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle)
    names = sorted(named, key=lambda name: (not name.startswith("chela"), name))
    handles, columns = [named[name] for name in names], max(1, round(figure.get_figwidth() / 2.2))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


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


def accuracy_against(part: Part, key: str, label: str) -> Figure:
    """Draw test accuracy (mean, ± deviation over seeds) against a number of ``result.json``, a panel for each task."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    tasks = [task for task in part.tasks if any(task in row for row in part.cells.values())]
    columns = min(3, len(tasks))
    figure, axes = new_figure(-(-len(tasks) // columns), columns, 4.0, 3.0)
    colour = colours(list(part.cells))
    for axis, task in itertools.zip_longest(axes.flat, tasks):
        if task is None:
            axis.set_visible(False)
            continue
        for name, row in part.cells.items():
            cost, mean = (row[task].cost(key), row[task].mean) if task in row else (None, None)
            if cost is None or mean is None:
                continue
            axis.errorbar(cost, mean, yerr=row[task].sd, fmt="o", color=colour[name], capsize=2, label=name)
        if (majority := part.majority(task)) is not None:
            axis.axhline(majority, color="0.5", linestyle="--", linewidth=0.8)
        axis.margins(x=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set(title=f"{task} {part.preset}", xlabel=label, ylabel="test accuracy, %")
    _legend(figure)
    return figure


def learned_kernels(layers: Sequence[Kernel], title: str) -> Figure:
    """Draw each layer's long kernel over the lag: median and 10-90 % of the channels' absolute values, both ways."""
    columns = min(4, len(layers))
    figure, axes = new_figure(-(-len(layers) // columns), columns, 3.2, 2.6)
    for axis, layer in itertools.zip_longest(axes.flat, layers):
        if layer is None:
            axis.set_visible(False)
            continue
        for values, name, style in ((layer.forward, "earlier", "-"), (layer.back, "later", "--")):
            if values is None or not values.size:
                continue
            first = 0 if name == "earlier" else 1  # lag 0 belongs to the forward kernel
            lags = 1 + np.arange(first, first + values.shape[1])  # from 1 on, for the log axis
            low, middle, high = np.quantile(np.abs(values), (0.1, 0.5, 0.9), axis=0)
            (line,) = axis.plot(lags, middle, style, linewidth=1, label=f"{name} tokens")
            axis.fill_between(lags, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", title=layer.name, xlabel="lag + 1", ylabel="|kernel|")
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def receptive_fields(fields: dict[str, NDArray[np.float64]], title: str) -> Figure:
    """Draw how strongly the middle position's output depends on the input at each distance, systems together."""
    figure, axes = new_figure(1, 1, 7.0, 3.6)
    axis, colour = axes[0, 0], colours(list(fields))
    for name, strength in fields.items():
        middle = len(strength) // 2
        offset = np.arange(len(strength)) - middle
        axis.plot(offset, strength / strength.max(), linewidth=1, color=colour[name], label=name)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(yscale="log", xlabel="distance of the input token", ylabel="gradient norm, largest = 1", title=title)
    axis.legend(fontsize=7, frameon=False)
    return figure


def bench_curves(result: dict[str, Any]) -> Figure | None:
    """Draw a benchmark's values against the length, a panel for each unit, both axes logarithmic.

    Args:
        result: The JSON of ``experiments.bench``; values without a unit are ratios and stay in its table.

    Returns:
        The figure; None when the benchmark has no length ``L`` or no value with a unit.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in result["rows"] if "L" in row["key"]]
    keys = dict.fromkeys(key for row in rows for key in row["key"] if key != "L")
    apart = [key for key in keys if len({str(row["key"].get(key)) for row in rows}) > 1]
    for row in rows:
        said = " ".join(str(row["key"].get(key)) for key in apart)
        for name, value in row["values"].items():
            unit = _UNIT.search(name)
            if unit and value is not None:
                scale = 1e3 if unit.group(1) == "ms" else 1.0  # stored in seconds
                label = f"{name[: unit.start()].strip()} {said}".strip()
                curves[unit.group(1)][label].append((row["key"]["L"], scale * value))
    if not curves:
        return None
    figure, axes = new_figure(1, len(curves), 5.2, 3.6)
    colour = colours([label for series in curves.values() for label in series])
    for axis, (unit_name, series) in zip(axes.flat, curves.items(), strict=True):
        for label, points in series.items():
            axis.plot(*zip(*sorted(points), strict=True), marker=".", color=colour[label], label=label)
        axis.set(xscale="log", yscale="log", xlabel="length", ylabel=unit_name, title=result["name"])
        axis.legend(fontsize=7, frameon=False)
    return figure


def mean_curve(series: list[tuple[list[float], list[float]]], window: int) -> Curve | None:
    """Return steps, mean, least and most, at each step over the seeds that have reached it; None without a step.

    A seed that is only begun thus takes nothing from the others, but the mean may jump where it ends.

    Args:
        series: Steps and values of each seed.
        window: Values in a trailing running mean.
    """
    reached: dict[float, list[float]] = defaultdict(list)
    for steps, values in series:
        for step, value in zip(steps, _running_mean(np.asarray(values, dtype=np.float64), window), strict=True):
            reached[step].append(float(value))
    if not reached:
        return None
    steps = sorted(reached)
    mean, low, high = (np.asarray([take(reached[step]) for step in steps]) for take in (np.mean, np.min, np.max))
    return np.asarray(steps, dtype=np.float64), mean, low, high


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
