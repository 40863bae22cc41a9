"""Make the table of runs: mean ± standard deviation over seeds, and everything that qualifies it.

chela table runs/lra_mini                                          Markdown
chela table experiments/results/recall compact=true                without the tasks that were not run
chela table runs/lra_mini bench=experiments/results/bench/epyc/train_mini.json   speed and memory of one session
chela table experiments/results/recall probe=true                  with what the attention adds: see chela probe
chela table runs/lra_mini format=csv > table.csv                   one line for each task and system

Each preset has a table of its own. Published rows stand apart, with their sources; nothing of them was run here.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from chela.config.words import command
from chela.core.options import option
from chela.results import COLUMN_GROUPS, TITLES
from experiments.runs import Run, read_runs
from experiments.summary import ARENA, COSTS, STATES, ResultTable, published, result_tables

NONE = "–"  # the cell of what has not been run
BOLD = re.compile(r"\*\*(.*?)\*\*")  # a cell, as in Markdown
ADDS, MAJORITY = "attention of {} adds", "majority class"  # rows below the systems
LEGEND = (
    "Test accuracy in %{}, mean ± standard deviation (seeds). “at chance”: seeds whose training never left the "
    "majority class, counted in the mean. Bold: the best of a column, and all that two standard errors do not tell "
    "from it. ×: beside softmax, geometric mean over the tasks that both were run on. See docs/sweeps.md."
)
WORDS = ("task", "system", "mark", "source")  # columns of text, which go to the left as the first one does

Block: TypeAlias = "str | pd.DataFrame"
"""A paragraph or a heading, as in Markdown, or a table of texts, whose first column names its rows."""


def render(blocks: Sequence[Block], kind: str) -> str:
    """Return the blocks as ``md``, ``html`` (a part of a page) or ``latex``, where all but the tables is a comment."""
    text = {"md": "{}\n".format, "html": _tag, "latex": "% {}\n".format}[kind]
    table = {"md": _markdown, "html": _html, "latex": _latex}[kind]
    return "\n".join(text(block) if isinstance(block, str) else table(block) for block in blocks)


def _to_the_left(frame: pd.DataFrame) -> list[bool]:
    return [place == 0 or name in WORDS for place, name in enumerate(frame)]


def _markdown(frame: pd.DataFrame) -> str:
    # not pandas' own: it pads cells to the width of their column, so that one number changes every line
    rows = [[text.replace("|", "\\|") for text in row] for row in (frame.columns, *frame.to_numpy())]
    first, *lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([first, f"|{'|'.join('---' if left else '---:' for left in _to_the_left(frame))}|\n", *lines])


def _latex(frame: pd.DataFrame) -> str:
    columns = "".join("l" if left else "r" for left in _to_the_left(frame))
    return BOLD.sub(r"\\textbf{\1}", frame.to_latex(index=False, escape=True, column_format=columns))


def _tag(text: str) -> str:
    marks, _, heading = text.rpartition("# ") if text.startswith("#") else ("", "", text)
    tag = f"h{len(marks) + 1}" if text.startswith("#") else "p"
    return f"<{tag}>{html.escape(heading)}</{tag}>"


def _html(frame: pd.DataFrame) -> str:
    table = BOLD.sub(r"<b>\1</b>", frame.to_html(index=False, border=0, justify="left"))
    return f'<div class="wide">{table}</div>'


def measured(tables: Sequence[ResultTable], compact: bool = False, probe: bool = False) -> list[Block]:
    """Return what was measured here as headings, paragraphs and grids.

    ``compact`` leaves out columns without a run; ``probe`` adds a row with what the attention adds to the score.
    """
    out: list[Block] = []
    if len(tables) > 1:
        kinds = "; ".join(table.name for table in tables)
        out.append(f"The tables below must not be compared with one another: {kinds}.")
    for table in tables:
        grid = main_grid(table, probe)
        grid = grid.loc[:, (grid != NONE).any().to_numpy()] if compact else grid
        other = "" if _accuracy_only(table) else " (another score where a task's column names one)"
        out += [f"## Measured here: preset {table.name}", grid, LEGEND.format(other), "; ".join(table.notes()) + "."]
        out += ["### Each task and system", detail_grid(table, probe), *group_grids(table)]
    return out


def from_papers(tables: Sequence[ResultTable]) -> list[Block]:
    """Return the rows of papers under a heading of their own; nothing without a task of LRA's."""
    if not any(run.task in TITLES for table in tables for run in table.runs):
        return []
    presets = {table.preset for table in tables}
    full = presets <= set(ARENA)
    apart = "" if full else " They are of the full tasks: no number measured here may be set beside them."
    if "lite" in presets:
        apart += " Rows of preset lite are of smaller networks and shorter training: beside a paper's, say both."
    rows = []
    for row in published():
        values = ["fails" if value == "fail" else number(value) for value in row["values"]]
        rows.append([row["name"], *values, number(row["average"]), row["mark"], row["source"]])
    header = ["paper's row", *TITLES.values(), "average, as printed", "mark", "source"]
    return [
        "## Published, not measured here" + ("" if full else ", and on the full tasks"),
        "Accuracies as papers print them, each with its source." + apart,
        pd.DataFrame(rows, columns=header),
        "mark A: read in the primary source; B: read in another paper that cites it.",
    ]


def _accuracy_only(table: ResultTable) -> bool:
    return all(table.score(task)["name"] == "accuracy" for task in table.tasks)


def task_heading(table: ResultTable, task: str) -> str:
    """Return the title of a task's column, with its score where that is no accuracy: ``Recall (loss, nats)``."""
    title = next((run.title for run in table.runs_of(task)), TITLES.get(task, task))
    score = table.score(task)
    return title if score["name"] == "accuracy" else f"{title} ({score_heading(score)})"


def score_heading(score: dict[str, Any]) -> str:
    """Return a score's name and unit: ``accuracy, %``."""
    return ", ".join(filter(None, (score["name"], score["unit"])))


def main_grid(table: ResultTable, probe: bool = False) -> pd.DataFrame:
    """Return systems × tasks in their groups; the first of a column, and who is level with it, bold.

    With ``probe``, what the attention adds to the score stands below the systems that were probed.
    """
    columns, below = [], [*(ADDS.format(row) for row in table.rows), MAJORITY]
    of = {task: name for name, tasks in COLUMN_GROUPS.items() for task in tasks}
    for group in (*COLUMN_GROUPS, ""):  # tasks without a group come last
        tasks = [task for task in table.tasks if of.get(task, "") == group]
        for task in tasks:
            column, digits = table.column(task), table.score(task)["digits"]
            texts = {row: cell_text(table, task, row) for row in column.index}
            texts |= {row: f"**{texts[row]}**" for row in table.leaders(task) if column["mean"].count() > 1}
            added = column["adds"] if probe else {}
            texts |= {ADDS.format(row): number(value, digits=digits) for row, value in added.items()}
            texts[MAJORITY] = number(table.majority(task), digits=digits)
            columns.append(pd.Series(texts, name=task_heading(table, task)))
        if group and len(tasks) > 1:
            means = table.cells["mean"].unstack("task").reindex(index=table.rows, columns=tasks)
            columns.append(means.mean(axis=1, skipna=False).map(number).rename(f"average of {group}"))
    for key, title in COSTS.items():
        means = np.exp(np.log(table.cells[f"{key} ×"]).groupby("row", sort=False).mean())  # geometric
        columns.append(means.map(lambda ratio: number(ratio, "×")).rename(f"{title} ×"))
    grid = pd.concat(columns, axis=1).reindex([*table.rows, *below]).fillna(NONE)
    grid = grid[(grid != NONE).any(axis=1) | ~grid.index.isin(below)]
    return grid.reset_index(names="system")


def cell_text(table: ResultTable, task: str, row: str) -> str:
    """Return a cell's words: ``51.23 ± 0.45 (3; 1 at chance)``; its digits are those of ``SCORES`` when it was run."""
    cell, digits = table.cells.loc[(row, task)], table.score(task)["digits"]
    remarks = [f"{cell[state]} {state}" for state in STATES if cell[state]]
    if not cell["seeds"]:
        return f"{NONE} ({'; '.join(remarks)})"
    spread = f" ± {cell['sd']:.{digits}f}" if cell["seeds"] > 1 else ""
    return f"{cell['mean']:.{digits}f}{spread} ({'; '.join([str(cell['seeds']), *remarks])})"


def number(value: float | None, unit: str = "", *, digits: int = 2) -> str:
    """Return so many decimals, or a dash for None and NaN."""
    return NONE if pd.isna(value) else f"{value:.{digits}f}{unit}"


def detail_grid(table: ResultTable, probe: bool = False) -> pd.DataFrame:
    """Return what was run and what it cost, task by task; with ``probe``, what the attention adds to the score."""
    score = "accuracy, %" if _accuracy_only(table) else "score"
    rows = []
    for task in table.tasks:
        for row, cell in table.column(task).iterrows():
            line = {"task": task_heading(table, task), "system": row, score: cell_text(table, task, str(row))}
            line |= {"rate": f"{cell['lr']:g}", "steps": str(cell["steps"])}
            for key, title in (COSTS | {"peak_memory_bytes": "memory, MiB"}).items():
                value, beside = cell[key] / (2**20 if title == "memory, MiB" else 1), cell[f"{key} ×"]
                text = NONE if pd.isna(value) else f"{value:,.0f}"
                line[title] = text if pd.isna(beside) else f"{text} ({number(beside, '×')})"
            line["minutes a run"] = number(cell["wall_seconds"] / 60, digits=1)
            line |= {"epochs": number(cell["epochs"])} if table.preset in ARENA else {}
            line |= {"attention adds": number(cell["adds"], digits=table.score(task)["digits"])} if probe else {}
            rows.append(line)
    return pd.DataFrame(rows)


def group_grids(table: ResultTable) -> list[Block]:
    """Return, of each task whose results tell records apart, the scores by group, the mean over the seeds."""
    out: list[Block] = []
    for task in table.tasks:
        means = {row: pd.DataFrame(map(_by_group, runs)).mean() for row, runs in table.column(task)["runs"].items()}
        grid = pd.DataFrame(means).T.dropna(how="all")
        if len(grid):
            out += [f"### {task_heading(table, task)} by group", grid.map(number).reset_index(names="system")]
    return out


def _by_group(run: Run) -> dict[str, float]:
    """Return the score of each group of test records and of each further test set: ``{"dashes 2": 91.2, …}``."""
    parts: dict[str, Any] = {}
    for key, value in run.result.items():
        if key.startswith("test_by_"):
            parts |= {f"{key.removeprefix('test_by_')} {group}": part for group, part in value.items()}
        elif key.startswith("test_") and isinstance(value, dict):
            parts[key.removeprefix("test_")] = value
    return {heading: run.score["scale"] * part[run.score["name"]] for heading, part in parts.items()}


def to_csv(tables: Sequence[ResultTable]) -> str:
    """Return a line for each task and system, the cells as they are: means over seeds, costs beside softmax."""
    frames = []
    for table in tables:
        cells = table.cells.drop(columns=["runs", "machines", "test variance"]).reset_index()
        scores = pd.DataFrame([table.score(task) for task in cells["task"]])
        cells = cells.assign(score=scores["name"], unit=scores["unit"])
        frames.append(cells.assign(preset=table.preset, validation=table.policy, edition=table.edition))
    return str(pd.concat(frames).rename(columns={"row": "system"}).to_csv(index=False))


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    format: str = option(
        "auto", "what is printed; auto: drawn on a terminal, else md", choices=("auto", "md", "latex", "html", "csv")
    )
    compact: bool = option(False, "leave out columns without a run")
    bench: Path | None = option(None, "JSON of one session of chela bench train: speed and memory are taken from it")
    probe: bool = option(False, "add what the attention adds to the score, where chela probe measured it")
    published: bool = option(True, "print the rows of papers too")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Print the table; return the exit status."""
    tables = result_tables(read_runs(options.runs), options.bench)
    if options.format == "csv":
        sys.stdout.write(to_csv(tables))
        return 0
    blocks = measured(tables, options.compact, options.probe) + (from_papers(tables) if options.published else [])
    text = render(blocks, "md" if options.format == "auto" else options.format)
    if options.format == "auto" and sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
