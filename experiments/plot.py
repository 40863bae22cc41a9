"""Draw figures, such as the learning curves of one or more runs; no display is needed.

chela plot runs/listops-mini/chela-seed0-1a2b3c4d            curves.png in the run's folder
chela plot runs/listops-mini out=listops.png                 every run below a folder, seeds as bands
chela plot experiments/results/recall against=state          the score against what the causal form remembers

Colours belong to systems, not to positions in a list, so that a system has the same one in every figure. What is no
system of its own, such as a variant (``chela [model.mixer.gate=none]``), takes what they leave, and may have another
colour in another figure.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chela.config.groups import names
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.results import ACCURACY
from experiments.rows import row_order
from experiments.runs import Run, read_runs, write
from experiments.summary import ResultTable, result_tables
from experiments.table import score_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Item = TypeVar("Item")
# The systems of the main table get the ten colours that differ most, in this order; all others share the light ones.
_MAIN = ("chela", "chela_conv_only", "hedgehog", "lightning", "linear", "lion_s", "s4d", "softmax", "mega", "lion_d")
BITS = "bits"  # a column that is drawn as a second axis of the loss
NOT_MEASURED = ("step", "split", "lr", "tokens_per_second", "seconds", "evaluation")  # columns of metrics.csv
SMOOTHING = 20  # logged lines in the running mean of the training curves


def new_figure(
    panels: int, most: int, width: float, height: float, heights: Sequence[float] | None = None
) -> tuple[Figure, NDArray[Any]]:
    """Make a figure of panels, at most so many side by side, of the given size in inches, which come as a 2-D array.

    ``heights`` are those of the rows beside one another; without it all rows are as high.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("expected matplotlib for figures, it is not installed: pip install 'chela[plots]'") from None
    columns = min(most, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colours(drawn: Sequence[str]) -> dict[str, Any]:
    """Give each name a colour: to a system its own, whatever else is drawn, to another name one that is left."""
    import matplotlib

    palette = [matplotlib.colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    systems = (*_MAIN, *(name for name in names("model") if name not in _MAIN))
    own = {name: colour for name, colour in zip(systems, itertools.cycle(palette), strict=False) if name in drawn}
    left = [colour for colour in palette if colour not in own.values()] or palette
    return own | dict(zip(sorted(set(drawn) - set(own)), itertools.cycle(left), strict=False))


def with_curves(runs: Sequence[Run], training: bool = True) -> tuple[list[Run], list[str]]:
    """Return the runs that have something to draw, and what is to be said of those that lack a column of it."""
    kept, left_out = [], []
    for run in runs:
        splits = ("train", "validation") if training else ("validation",)
        metrics = [frame for split in splits if len(frame := run.metrics(split))]
        needed = dict.fromkeys(("step", "loss", *([run.score["name"]] if run.result else [])))
        if lacking := [column for column in needed if any(column not in frame for frame in metrics)]:
            what = f"expected columns {', '.join(needed)} in its metrics.csv, got none of {', '.join(lacking)}"
            left_out.append(f"The curves of {run.task} {run.path.name} are left out: {what}.")
        elif metrics:
            kept.append(run)
    return kept, left_out


def curve_panels(runs: Sequence[Run]) -> list[tuple[ResultTable, str, dict[str, Any]]]:
    """Return the panels of ``learning_curves``: of one task all that was measured, of each of several its score."""
    groups = [(table, task) for table in result_tables(runs) for task in table.tasks if table.runs_of(task)]
    if len(groups) > 1:
        return [(table, task, table.score(task)) for table, task in groups]
    known = {"accuracy": ACCURACY} | {run.score["name"]: run.score for run in runs}
    columns = dict.fromkeys(
        column for run in runs for split in ("validation", "train") for column in run.metrics(split)
    )
    measured = [column for column in columns if column not in (*NOT_MEASURED, BITS)]
    return [(*groups[0], known.get(column, {"name": column, "unit": "", "scale": 1})) for column in measured]


def learning_curves(runs: Sequence[Run], training: bool = True) -> Figure:
    """Draw what was measured against the step, a panel for each of ``curve_panels``.

    Thin lines are training (a running mean), thick ones validation, seeds as a band from least to most; the dashed line
    is the majority class. What a loss is above all validations is cut off. Each step shows the seeds that have reached
    it: where an unfinished one ends, the curve goes on with the others. ``with_curves`` finds the runs that can be
    drawn; ``training=False`` leaves out training.
    """
    drawn = curve_panels(runs)
    figure, axes = new_figure(len(drawn), 3, 4.4, 3.2)
    colour = colours([name for table, *_ in drawn for name in table.rows])
    one_task = len({(table.name, task) for table, task, _ in drawn}) == 1  # of several, each may have other seeds
    for axis, (table, task, score) in _panels(axes, drawn):
        for name, seeds in table.column(task)["runs"].items():
            if training:
                _band(axis, [run.metrics("train") for run in seeds], score, colour[name], SMOOTHING)
            title = f"{name} seed {seeds[0].seed}" if one_task and len(seeds) == 1 else name
            _band(axis, [run.metrics("validation") for run in seeds], score, colour[name], 1, title)
        axis.set(title=f"{task} {table.preset}", xlabel="step", ylabel=score_heading(score))
        if score["name"] == "accuracy":
            _majority_line(axis, table.majority(task))
        _scale(axis, score)
    _legend(figure)
    return figure


def _panels(axes: NDArray[Any], items: Iterable[Item]) -> Iterator[tuple[Axes, Item]]:
    """Give each item a panel, and hide the panels that are left."""
    for axis, item in itertools.zip_longest(axes.flat, items):
        axis.set_visible(item is not None)
        if item is not None:
            yield axis, item


def _legend(figure: Figure) -> None:
    """Name what is drawn once, under all panels, so that no name hides a point."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    ordered, columns = sorted(named, key=row_order), max(1, round(figure.get_figwidth() / 2.2))
    handles = [named[name] for name in ordered]
    figure.legend(handles, ordered, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _majority_line(axis: Axes, value: float) -> None:
    if not math.isnan(value):
        axis.axhline(value, color="0.5", linestyle="--", linewidth=0.8)


def _scale(axis: Axes, score: dict[str, Any]) -> None:
    """Cut a loss off above all validations, so that these can be told apart; beside nats show bits."""
    validations = [line.get_ydata() for line in axis.lines if not str(line.get_label()).startswith("_")]
    highest, lowest = max(map(np.max, validations), default=math.inf), axis.get_ylim()[0]
    if score["name"] == "loss" and lowest < highest < math.inf:
        axis.set_ylim(top=highest + 0.05 * (highest - lowest))
    if score["unit"] == "nats":
        to_bits, to_nats = (lambda nats: nats / math.log(2)), (lambda bits: bits * math.log(2))
        axis.secondary_yaxis("right", functions=(to_bits, to_nats)).set_ylabel(BITS)


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


def score_against_state(table: ResultTable) -> Figure:
    """Draw the test score against the numbers that the causal form remembers of the longest sequence, a panel a task.

    Runs of one system at several sizes are joined by a line.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    from experiments.probe import state_size

    tasks = [task for task in table.tasks if len(table.column(task))]
    figure, axes = new_figure(len(tasks), 3, 4.8, 3.4)
    colour = colours([run.model for run in table.runs])
    for axis, task in _panels(axes, tasks):
        points: dict[str, list[tuple[int, float, float]]] = {}
        for _, cell in table.column(task).iterrows():
            done = [run for run in cell["runs"] if run.state == "finished"]
            if done and (size := state_size(done[0])):
                spread = cell["sd"] if len(done) > 1 else 0.0
                points.setdefault(done[0].model, []).append((size, cell["mean"], spread))
        for name, at in points.items():
            sizes, means, spreads = zip(*sorted(at), strict=True)
            axis.errorbar(sizes, means, yerr=spreads, fmt="o-", color=colour[name], capsize=2, label=name)
        _majority_line(axis, table.majority(task))
        score = score_heading(table.score(task))
        axis.set(title=f"{task} {table.preset}", xscale="log", xlabel="numbers in the state", ylabel=f"test {score}")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure)
    return figure


def attention_adds(table: ResultTable) -> Figure:
    """Draw what the attention adds where it was probed: a panel for each score, a bar for each task and system."""
    bars: dict[str, list[tuple[str, str, float]]] = {}
    for task in table.tasks:
        for name, adds in table.column(task)["adds"].dropna().items():
            label = f"{table.runs_of(task)[0].title}, {name}"
            bars.setdefault(score_heading(table.score(task)), []).append((label, str(name), adds))
    heights = [len(found) + 2 for found in bars.values()]
    figure, axes = new_figure(len(bars), 1, 7.0, 0.3 * sum(heights) / len(bars), heights)
    colour = colours(table.rows)
    for axis, (score, found) in _panels(axes, bars.items()):
        labels, systems, values = zip(*found, strict=True)
        axis.bar_label(axis.barh(labels, values, color=[colour[name] for name in systems]), fmt="%.3g", padding=3)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.margins(x=0.1)
        axis.invert_yaxis()
        axis.set(xlabel=f"what the attention adds: {score}")
    return figure


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


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the ending of ``path`` chooses the format."""
    try:
        write(path, drawn(figure, path.suffix.removeprefix(".") or "png"))
    except (UsageError, ValueError) as error:
        raise UsageError(f"out: expected a file that can be written, e.g. curves.png, got {path} ({error})") from None


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    against: str = option("step", "learning curves, or the score against the state's size", choices=("step", "state"))
    out: Path | None = option(None, "the figure; its ending (.png, .pdf, .svg) chooses the format")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Draw the runs into ``out``; without it, beside the run, or here when there are several."""
    if options.against == "state":
        for number, table in enumerate(result_tables(read_runs(options.runs)), 1):
            target = options.out or Path(f"state-{table.preset}.png")
            target = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
            save(score_against_state(table), target)
            sys.stdout.write(f"{target}: preset {table.preset}\n")
        return 0
    runs, left_out = with_curves(read_runs(options.runs))
    if not runs:
        none_yet = f"expected metrics.csv with at least one line in {', '.join(options.runs)}, there is none yet"
        raise UsageError(" ".join(left_out) or none_yet)
    target = options.out or (Path(options.runs[0]) if len(runs) == 1 else Path()) / "curves.png"
    save(learning_curves(runs), target)
    sys.stdout.write(f"{target}: learning curves of {len(runs)} run{'s' if len(runs) > 1 else ''}\n")
    sys.stdout.writelines(f"{line}\n" for line in left_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
