"""What a benchmark leaves behind: a table on the screen, a JSON file, a plot where matplotlib is installed."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chela.errors import UsageError
from experiments.bench.registry import Benchmark, Row


def read(path: Path) -> dict[str, Any]:
    """Read what ``write`` wrote.

    Raises:
        UsageError: The file cannot be read, or holds something else.
    """
    expected = f"--compare: expected the JSON of experiments.bench at {path}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{expected}, could not read it ({error})") from None
    if not (isinstance(found, dict) and isinstance(found.get("rows"), list) and all(map(_is_row, found["rows"]))):
        raise UsageError(f"{expected}, got JSON without its rows of key and values")
    return found


def _is_row(row: Any) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("key"), dict) and isinstance(row.get("values"), dict)):
        return False
    return all(isinstance(value, int | float | None) for value in row["values"].values())


def check_writable(path: Path) -> None:
    """See that the JSON, and the plot beside it, can be written; no file is left or changed.

    Raises:
        UsageError: One of them cannot.
    """
    if path.suffix == ".png":
        raise UsageError(f"--out: expected a name for the JSON, got {path}, the plot's; name it {path.stem}.json")
    for file in (path, path.parent / f"{path.stem}.png"):
        there = file.exists()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except OSError as error:
            raise UsageError(f"--out: expected a file that can be written, got {file} ({error.strerror})") from None
        if not there:
            file.unlink()


def table(benchmark: Benchmark, rows: list[Row], old: dict[str, Any] | None) -> Table:
    """Return the table, a column per row; with an older result, each value is followed by new / old."""
    keys = list(dict.fromkeys(k for row in rows for k in row.key))
    values = list(dict.fromkeys(v for row in rows for v in row.values))
    same = [k for k in keys if len({str(row.key.get(k)) for row in rows}) == 1]
    varying = [k for k in keys if k not in same] or keys[:1]
    before = {_identity(r["key"]): r["values"] for r in old["rows"]} if old else {}
    fixed = ", ".join(f"{k} {rows[0].key[k]}" for k in same if k not in varying)
    out = Table(title=benchmark.about, caption=fixed)
    out.add_column("")
    for row in rows:
        out.add_column(", ".join(f"{k} {row.key.get(k)}" for k in varying), justify="right")
    for v in values:
        out.add_row(
            escape(v), *(_cell(v, row.values.get(v), before.get(_identity(row.key), {}).get(v)) for row in rows)
        )
    for note in dict.fromkeys(row.note for row in rows if row.note):
        out.add_row("note", escape(note))
    return out


def _identity(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _cell(name: str, value: float | None, old: float | None) -> str:
    if value is None:
        return ""
    text = f"{value * 1e3:.4g}" if name.endswith("[ms]") else f"{value:.3g}"
    return text if not old else f"{text} (×{value / old:.2f})"


def write(benchmark: Benchmark, rows: list[Row], machine: dict[str, Any], path: Path) -> None:
    """Write the JSON file. Times under names that end in ``[ms]`` are kept in seconds, as measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "name": benchmark.name,
        "machine": machine,
        "rows": [{"key": r.key, "values": r.values, "note": r.note, "raw": r.raw} for r in rows],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def plot(benchmark: Benchmark, rows: list[Row], path: Path, console: Console) -> None:
    """Draw the benchmark's plot beside its JSON file, when it has one and matplotlib is installed."""
    if benchmark.plot is None:
        return
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'chela\\[plots]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, *ys = benchmark.plot
    memory = [y.replace("[ms]", "[MiB]") for y in ys]
    panels = {"seconds": ys, "peak memory beyond the inputs, MiB": [y for y in memory if _points(rows, x, y)]}
    panels = {label: names for label, names in panels.items() if names}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, (label, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            points = _points(rows, x, name)
            color = f"C{(ys if name in ys else memory).index(name)}"
            if points:
                panel.plot(list(points), list(points.values()), marker="o", color=color, label=name.rpartition(" [")[0])
        panel.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
        panel.legend(fontsize=8, frameon=False)
    # matplotlib breaks no line by itself
    figure.suptitle(textwrap.fill(benchmark.about, 60 * len(panels)), fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _points(rows: list[Row], x: str, y: str) -> dict[Any, float]:
    """Return the first value of y at each x."""
    points: dict[Any, float] = {}
    for row in rows:
        if y in row.values and x in row.key:
            points.setdefault(row.key[x], row.values[y])
    return points
