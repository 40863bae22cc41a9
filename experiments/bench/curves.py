"""Draw what a benchmark measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from chela.core.errors import UsageError
from experiments.plot import colours, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bench_curves(result: dict[str, Any], only: Sequence[str] = ()) -> Figure:
    """Draw a benchmark's values against the length, a panel for each unit, both axes logarithmic.

    ``result`` is the JSON of ``experiments.bench``; values without a unit are ratios and stay in its table. ``only``
    names the candidates that are drawn; all when it names none. UsageError where there is nothing to draw.
    """
    rows = [row for row in result["rows"] if "L" in row["key"]]
    keys = dict.fromkeys(key for row in rows for key in row["key"] if key != "L")
    apart = [key for key in keys if len({str(row["key"].get(key)) for row in rows}) > 1]
    points = []
    for row in rows:
        said = " ".join(str(row["key"].get(key)) for key in apart)
        for value_name, value in row["values"].items():
            name, _, unit = value_name.rpartition(" [")
            if unit.endswith("]") and value is not None and (not only or name in only):
                points.append((unit[:-1], f"{name} {said}".strip(), row["key"]["L"], value))
    if not points:
        raise UsageError(f"{result['name']}: expected a length L and a value with a unit to draw, there is none")
    frame = pd.DataFrame(points, columns=["unit", "name", "L", "value"])
    frame.loc[frame["unit"] == "ms", "value"] *= 1e3  # stored in seconds
    units = frame["unit"].nunique()
    figure, axes = new_figure(units, units, 5.2, 3.6)
    colour = colours(list(frame["name"]))
    for axis, (unit, panel) in zip(axes.flat, frame.groupby("unit", sort=False), strict=True):
        for name, curve in panel.groupby("name", sort=False):
            curve = curve.sort_values(["L", "value"])
            axis.plot(curve["L"], curve["value"], marker=".", color=colour[str(name)], label=name)
        axis.set(xscale="log", yscale="log", xlabel="length", ylabel=unit, title=result["name"])
        axis.legend(fontsize=7, frameon=False)
    return figure
