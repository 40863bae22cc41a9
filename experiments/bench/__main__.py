"""Run one benchmark: print its values, and write them as JSON.

chela bench layers                                 writes experiments/results/bench/layers.json
chela bench train task=text,image model=chela,softmax preset=full batch=4 out=FILE

convolution: the long convolution. generate: one token more, after a context. layers: the whole CHELA layer.
linear_attention: the op. products: MKL beside oneDNN, in matrices, layers and a step of the main job. train: whole
training steps of every system. tune: the tiles of its Triton kernels, on a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

import pandas as pd

from chela.config.words import command
from chela.core.errors import UsageError
from experiments.bench import BENCHMARKS, RESULTS, Options, Row
from experiments.runs import write


@command(Options, __doc__)
def main(options: Options) -> int:
    """Run the benchmark; return the exit status."""
    if options.name != "train" and (options.task or options.model or options.preset or options.batch):
        raise UsageError(f"expected task, model, preset and batch for train alone, got some for {options.name}")
    path = options.out or RESULTS / f"{options.name}.json"
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"out: expected a JSON file that can be written, got {path}")  # before measuring
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler
    run = getattr(importlib.import_module(f"experiments.bench.{BENCHMARKS[options.name]}"), options.name)
    from chela.training.machine import choose_matmul
    from experiments.bench import timing

    choose_matmul(options.matmul)
    facts, rows = timing.machine(), run(options)
    result = {"name": options.name, "machine": facts, "rows": [vars(row) for row in rows]}
    write(path, json.dumps(result, indent=1) + "\n")
    width = shutil.get_terminal_size().columns
    notes = dict.fromkeys(row.note for row in rows if row.note)
    host = "; ".join(f"{key} {value}" for key, value in facts.items())
    for part in (run.__doc__.partition("\n")[0], table(rows, width), *notes, f"machine: {host}", f"written: {path}"):
        print(part if "\n" in part else textwrap.fill(part, width, break_on_hyphens=False), end="\n\n")
    return 0


def table(rows: Sequence[Row], width: int = 80) -> str:
    """Return a line for each value and a column for each row; columns that do not fit in follow in a second block.

    >>> print(table([Row({"L": L}, {"ours [ms]": L / 1e6, "ours / theirs": 0.5}) for L in (1024, 4096)]))
    L               1024   4096
    ours [ms]      1.024  4.096
    ours / theirs    0.5    0.5
    """
    columns = [row.key | {name: _cell(name, value) for name, value in row.values.items()} for row in rows]
    return str(pd.DataFrame(columns).T.fillna("").to_string(header=False, line_width=width))


def _cell(name: str, value: float) -> str:
    shown = value * 1e3 if name.endswith("[ms]") else value
    return f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:.{4 if name.endswith('[ms]') else 3}g}"


if __name__ == "__main__":
    sys.exit(main())
