"""Run one benchmark: print its values, write them as JSON, draw its plot.

chela bench list                                   what there is, and the words of each
chela bench layers                                 writes experiments/results/bench/layers.json
chela bench train task=text,image model=chela,softmax preset=full batch=4 out=FILE
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela.config.words import command, no_more, read_words
from chela.core.errors import UsageError
from chela.core.options import option
from experiments.bench import Row
from experiments.runs import write

BENCHMARKS = sorted({path.stem for path in Path(__file__).parent.glob("[!_]*.py")} - {"curves", "timing"})
RESULTS = Path("experiments/results/bench")


@dataclass
class Options:
    """What every benchmark can be told."""

    name: str = option(
        dataclasses.MISSING, "the benchmark; list tells of them all", choices=("list", *BENCHMARKS), positional=True
    )
    quick: bool = option(False, "smallest sizes only, to see that it works")
    cpu_time: bool = option(False, "count CPU seconds, not the wall clock: for a busy machine and one thread")
    out: Path | None = option(None, f"where the JSON goes; null is {RESULTS}/NAME.json. The plot goes beside it")


@command(Options, __doc__, others=True)
def main(asked: Options, words: list[str]) -> int:
    """Run one benchmark, or list them all; return the exit status."""
    if asked.name == "list":
        no_more(words, Options)
        for name in BENCHMARKS:
            module = find(name)
            known = dataclasses.fields(module.Options) if hasattr(module, "Options") else ()
            sys.stdout.write(f"{name}: {about(module)}\n")
            sys.stdout.writelines(f"    {field.name}=…  {field.metadata['help']}\n" for field in known)
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines stay away
    module, given = find(asked.name), []
    if hasattr(module, "Options"):
        options, words = read_words(module.Options, words)
        given.append(options)
    no_more(words, getattr(module, "Options", Options))

    from experiments.bench import timing

    path = asked.out or RESULTS / f"{asked.name}.json"
    check_writable(path)  # before minutes of measuring, not after
    if asked.cpu_time:
        timing.use_cpu_time()
    facts = timing.machine()
    rows = module.run(asked.quick, *given)
    result = {"name": asked.name, "machine": facts, "rows": [vars(row) for row in rows]}
    write(path, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(text(about(module), rows, facts, shutil.get_terminal_size().columns))
    if hasattr(module, "PLOT"):
        from experiments.bench.curves import bench_curves
        from experiments.plot import save

        try:
            save(bench_curves(result, module.PLOT), path.with_suffix(".png"))
        except UsageError as error:
            sys.stdout.write(f"no plot: {error}\n")
    sys.stdout.write(f"written: {path}\n")
    return 0


def find(name: str) -> Any:
    """Return the module of a benchmark."""
    return importlib.import_module(f"experiments.bench.{name}")


def about(module: Any) -> str:
    """Return the first line of a benchmark's docstring, without its backticks."""
    return (module.__doc__ or "").strip().partition("\n")[0].replace("``", "")


def check_writable(path: Path) -> None:
    """See that the JSON, and the plot beside it, can be written; UsageError where one cannot."""
    plot = path.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK) and not path.is_dir() and not plot.is_dir() and path != plot
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"out: expected a JSON file that can be written, and beside it {plot.name}, got {path}")


def text(title: str, rows: Sequence[Row], machine: dict[str, Any], width: int) -> str:
    """Return the whole screen: title, table, notes and machine, wrapped at ``width``."""
    facts = "; ".join(f"{key} {value}" for key, value in machine.items())
    notes = dict.fromkeys(row.note for row in rows if row.note)
    wrapped = [textwrap.fill(part, width, break_on_hyphens=False) for part in (*notes, f"machine: {facts}")]
    return "\n\n".join([textwrap.fill(title, width), table(rows, width), *wrapped]) + "\n"


def table(rows: Sequence[Row], width: int = 80) -> str:
    """Return a line for each value and a column for each row; columns that do not fit in follow in a second block.

    What is the same in the keys of all rows is said once, above the table. ``width`` is in characters.

    >>> print(table([Row({"H": 4, "L": L}, {"ours [ms]": L / 1e6, "ours / theirs": 0.5}) for L in (1024, 4096)]))
    H 4
    <BLANKLINE>
    L               1024   4096
    ours [ms]      1.024  4.096
    ours / theirs    0.5    0.5
    """
    import pandas as pd

    fixed = {key: row.key[key] for row in rows[:1] for key in row.key if len({str(r.key.get(key)) for r in rows}) == 1}
    parts = [textwrap.fill(", ".join(f"{key} {value}" for key, value in fixed.items()), width)] if fixed else []
    for _, alike in itertools.groupby(rows, key=lambda row: (list(row.key), list(row.values))):
        columns = [
            {key: str(value) for key, value in row.key.items() if key not in fixed}
            | {name: _cell(name, value) for name, value in row.values.items()}
            for row in alike
        ]
        parts.append(pd.DataFrame(columns).T.to_string(header=False, line_width=width))
    return "\n\n".join(parts)


def _cell(name: str, value: float) -> str:
    shown = value * 1e3 if name.endswith("[ms]") else value
    return f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:.{4 if name.endswith('[ms]') else 3}g}"


if __name__ == "__main__":
    sys.exit(main())
