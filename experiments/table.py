"""Make the table of runs: mean ± standard deviation over seeds, and everything that qualifies it.

chela table runs/lra_mini                                          Markdown
chela table experiments/results/v1/ablation compact=true              without the tasks that were not run
chela table runs/lra_mini bench=experiments/results/bench/train.json  speed and memory of one session of the benchmark
chela table experiments/results/recall probe=true                  with what the attention adds: see chela probe
chela table experiments/results/v1/lra_mini format=html > table.html
chela table runs/lra_mini format=csv > table.csv                   one line for each task and system

Each preset has a table of its own. Published rows stand apart, with their sources; nothing of them was run here.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from chela.config.words import command
from chela.core.options import option
from chela.results import TITLES
from experiments.runs import RATE, read_runs
from experiments.summary import ARENA, COSTS, STEPS, Cell, ResultTable, published, result_tables

NONE = "–"  # the cell of what has not been run
BOLD = "**"  # around a cell, as in Markdown

_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}"}
_LATEX |= {"±": r"$\pm$", "×": r"$\times$", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_IN_LATEX = str.maketrans(_LATEX | {"“": "``", "”": "''", "−": "$-$"})
COST_TITLES = dict(zip(COSTS, ("parameters", "tokens/s", "memory"), strict=True))


@dataclass(frozen=True)
class Text:
    """A paragraph, or a heading of a level."""

    text: str
    level: int = 0


@dataclass(frozen=True)
class Grid:
    """A table; the first column is its rows' names, ``words`` are the columns of text, which go to the left."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    words: tuple[str, ...] = ()

    @property
    def are_words(self) -> list[bool]:
        """Return of each column whether it holds text."""
        return [column == 0 or name in self.words for column, name in enumerate(self.header)]

    def compact(self) -> Grid:
        """Return it without the columns that hold nothing."""
        kept = [place for place in range(len(self.header)) if any(row[place] != NONE for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Grid([self.header[place] for place in kept], rows, self.note, self.words)


Block = Text | Grid


def render(blocks: Sequence[Block], kind: str) -> str:
    """Return the blocks as ``md``, ``latex`` or ``html`` (a part of a page)."""
    draw = {"md": _markdown, "latex": _latex, "html": _html}[kind]
    return "\n".join(draw(block) for block in blocks)


def _markdown(block: Block) -> str:
    if isinstance(block, Text):
        return f"{'#' * block.level} {block.text}\n".lstrip(" ")
    cells = [[text.replace("|", "\\|") for text in row] for row in (block.header, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    rule = f"|{'|'.join('---' if words else '---:' for words in block.are_words)}|"
    return "\n".join([lines[0], rule, *lines[1:], *(["", block.note] if block.note else []), ""])


def _marked(text: str, begin: str, end: str) -> str:
    """Put a cell's bold into another language."""
    return f"{begin}{text.removeprefix(BOLD).removesuffix(BOLD)}{end}" if text.startswith(BOLD) else text


def _latex(block: Block) -> str:
    if isinstance(block, Text):
        text = block.text.translate(_IN_LATEX)
        return f"\\{'sub' * (block.level - 2)}section*{{{text}}}\n" if block.level else f"{text}\n"
    rows = [
        " & ".join(_marked(text.translate(_IN_LATEX), r"\textbf{", "}") for text in row) + r" \\"
        for row in (block.header, *block.rows)
    ]
    columns = "".join("l" if words else "r" for words in block.are_words)
    lines = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", block.note.translate(_IN_LATEX), ""])


def _html(block: Block) -> str:
    if isinstance(block, Text):
        tag = f"h{block.level}" if block.level else "p"
        return f"<{tag}>{html.escape(block.text)}</{tag}>"
    kinds = [" class=words" if words else "" for words in block.are_words]
    heads = zip(kinds, block.header, strict=True)
    head = "".join(f'<th scope="col"{kind}>{html.escape(text)}</th>' for kind, text in heads)
    body = ""
    for first, *rest in block.rows:
        texts = [_marked(html.escape(text), "<b>", "</b>") for text in rest]
        cells = (f"<td{kind}>{text}</td>" for kind, text in zip(kinds[1:], texts, strict=True))
        body += f'<tr><th scope="row">{html.escape(first)}</th>{"".join(cells)}</tr>'
    note = f"<p>{html.escape(block.note)}</p>" if block.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def measured(tables: Sequence[ResultTable], compact: bool = False, probe: bool = False) -> list[Block]:
    """Return what was measured here as headings, paragraphs and grids.

    ``compact`` leaves out columns without a run, ``probe`` adds what the attention adds to the score.
    """
    out: list[Block] = []
    if len(tables) > 1:
        kinds = "; ".join(table.name for table in tables)
        out.append(Text(f"The tables below must not be compared with one another: {kinds}."))
    for table in tables:
        out.append(Text(f"Measured here: preset {table.name}", level=2))
        grid = main_grid(table, probe)
        out.append(grid.compact() if compact else grid)
        out += [*map(Text, _legend(table)), Text("Each task and system", level=3), detail_grid(table, probe)]
        out += group_grids(table)
    return out


def from_papers(tables: Sequence[ResultTable]) -> list[Block]:
    """Return the rows of papers, under a heading that tells them from ours; nothing without a task of LRA's."""
    if not any(table.runs_of(task) for table in tables for task in table.tasks if task in TITLES):
        return []
    presets = {table.preset for table in tables}
    full = presets <= set(ARENA)
    apart = "" if full else " They are of the full tasks: no number measured here may be set beside them."
    if "lite" in presets:
        apart += " Rows of preset lite are of smaller networks and shorter training: beside a paper's, say both."
    rows = []
    for row in published():
        values = ["fails" if value == "fail" else number(value) for value in row["values"].values()]
        rows.append([row["name"], *values, number(row["average"]), row["mark"], row["source"]])
    header = ["paper's row", *TITLES.values(), "average, as printed", "mark", "source"]
    note = "mark A: read in the primary source; B: read in another paper that cites it."
    return [
        Text("Published, not measured here" + ("" if full else ", and on the full tasks"), level=2),
        Text("Accuracies as papers print them, each with its source." + apart),
        Grid(header, rows, note, words=("mark", "source")),
    ]


def _legend(table: ResultTable) -> list[str]:
    other = "" if _accuracy_only(table) else " (another score where a task's column names one)"
    return [
        f"Test accuracy in %{other}, mean ± standard deviation (seeds). “at chance”: seeds whose training never left "
        "the majority class, counted in the mean. “failed”: runs without a result, counted in nothing.",
        "Bold: the best of a column, and all that two standard errors of the difference do not tell from it (by the "
        "deviation over seeds of what learned in the column, pooled; where each has one seed, by that of an accuracy "
        "on so many test records).",
        "×: beside softmax on the same task, geometric mean over the tasks that both were run on; tokens/s is the "
        "median over the logged steps.",
        "; ".join(table.notes()) + ".",
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


def main_grid(table: ResultTable, probe: bool = False) -> Grid:
    """Return systems × tasks in their groups; the first of a column, and who is level with it, bold.

    With ``probe``, what the attention adds to the score stands below the systems that were probed.
    """
    groups = table.groups()
    averaged = [name for name, tasks in groups.items() if name and len(tasks) > 1]
    header = ["system"]
    for group, tasks in groups.items():
        header += [task_heading(table, task) for task in tasks]
        header += [f"average of {group}"] if group in averaged else []
    header += [f"{title} ×" for title in COST_TITLES.values()]
    ran = {task: sum(cell.mean is not None for cell in table.column(task).values()) for task in table.tasks}
    first = {task: table.leaders(task) if ran[task] > 1 else [] for task in table.tasks}
    rows = []
    for name, row in table.cells.items():
        cells = [name]
        for group, tasks in groups.items():
            texts = [cell_text(row[task]) if task in row else NONE for task in tasks]
            bold = [name in first[task] for task in tasks]
            cells += [f"{BOLD}{text}{BOLD}" if is_bold else text for text, is_bold in zip(texts, bold, strict=True)]
            cells += [number(table.average(name, tasks))] if group in averaged else []
        rows.append([*cells, *(number(table.mean_relative(name, key), "×") for key in COSTS)])
    below = [("majority class", {task: table.majority(task) for task in table.tasks})]
    if probe:
        adds = [(name, {task: cell.adds for task, cell in row.items()}) for name, row in table.cells.items()]
        below = [*((f"attention of {name} adds", values) for name, values in adds), *below]
    for name, values in below:
        cells = [name]
        for group, tasks in groups.items():
            digits = {task: table.score(task)["digits"] for task in tasks}
            cells += [number(values.get(task), digits=digits[task]) for task in tasks]
            cells += [NONE] if group in averaged else []
        rows += [[*cells, *(NONE for _ in COSTS)]] if set(cells[1:]) != {NONE} else []
    return Grid(header, rows)


def cell_text(cell: Cell) -> str:
    """Return a cell's words: ``51.23 ± 0.45 (3; 1 at chance)``."""
    states = ("at chance", "failed", "unfinished", "untested")
    remarks = [f"{count} {state}" for state in states if (count := cell.count(state))]
    if cell.mean is None:
        return f"{NONE} ({'; '.join(remarks)})"
    digits = cell.finished[0].score["digits"]
    spread = "" if cell.sd is None else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread} ({'; '.join([str(len(cell.finished)), *remarks])})"


def number(value: float | None, unit: str = "", *, digits: int = 2) -> str:
    """Return so many decimals, or a dash."""
    return NONE if value is None else f"{value:.{digits}f}{unit}"


def detail_grid(table: ResultTable, probe: bool = False) -> Grid:
    """Return what was run and what it cost, task by task; with ``probe``, what the attention adds to the score."""
    score = "accuracy, %" if _accuracy_only(table) else "score"
    header = ["task", "system", score, "rate", "steps", "parameters", "tokens/s", "memory, MiB", "minutes a run"]
    header += ["epochs"] if (epochs := table.preset in ARENA) else []
    header += ["attention adds"] if probe else []
    rows = []
    for task, name in ((task, name) for task in table.tasks for name, row in table.cells.items() if task in row):
        cell = table.cells[name][task]
        told = [task_heading(table, task), name, cell_text(cell), f"{cell.config[RATE]:g}", str(cell.config[STEPS])]
        for key in COSTS:
            value, beside = cell.cost(key), table.relative(name, task, key)
            text = NONE if value is None else f"{value / (2**20 if key == 'peak_memory_bytes' else 1):,.0f}"
            told.append(text if beside is None else f"{text} ({number(beside, '×')})")
        took = cell.cost("wall_seconds")
        told.append(NONE if took is None else f"{took / 60:.1f}")
        told += [number(cell.cost("epochs"))] if epochs else []
        adds = [number(cell.adds, digits=table.score(task)["digits"])] if probe else []
        rows.append([*told, *adds])
    return Grid(header, rows, words=("system",))


def group_grids(table: ResultTable) -> list[Block]:
    """Return, of each task whose results tell records apart, the scores by group, the mean over the seeds."""
    out: list[Block] = []
    for task in table.tasks:
        found = {name: cell.by_group for name, cell in table.column(task).items() if cell.by_group}
        if found:
            columns = list(dict.fromkeys(heading for values in found.values() for heading in values))
            rows = [[name, *(number(values.get(heading)) for heading in columns)] for name, values in found.items()]
            out += [Text(f"{task_heading(table, task)} by group", level=3), Grid(["system", *columns], rows)]
    return out


def to_csv(tables: Sequence[ResultTable], with_published: bool = True) -> str:
    """Return one line for each task and system; ``kind`` tells ours from a paper's.

    Where a task is not scored by accuracy, the columns ``score``, ``unit`` and ``value`` are added for all.
    """
    import pandas as pd

    plain = all(map(_accuracy_only, tables))
    lines: list[dict[str, object]] = []
    for table in tables:
        where = {"preset": table.preset, "validation": table.policy}
        for name, task, cell in ((name, task, cell) for name, row in table.cells.items() for task, cell in row.items()):
            score, commits = table.score(task), {str(run.result.get("git_commit")) for run in cell.finished}
            line: dict[str, object] = {"kind": "measured", **where, "task": task, "system": name}
            line |= {"accuracy": cell.mean if score["name"] == "accuracy" else None, "sd": cell.sd}
            line |= {"seeds": len(cell.finished), "at_chance": cell.count("at chance")}
            line |= {state: cell.count(state) for state in ("failed", "unfinished")}
            line |= {"lr": cell.config[RATE], "steps": cell.config[STEPS]} | {key: cell.cost(key) for key in COSTS}
            line |= {f"{key}_beside_softmax": table.relative(name, task, key) for key in COSTS}
            line |= {"wall_seconds": cell.cost("wall_seconds"), "source": ", ".join(sorted(commits))}
            lines.append(line if plain else line | {"score": score["name"], "unit": score["unit"], "value": cell.mean})
        for task in table.tasks:
            if (majority := table.majority(task)) is not None:
                lines.append({**where, "kind": "majority", "task": task, "accuracy": majority})
    for paper in published() if with_published else []:
        same = {"kind": f"published-{paper['mark']}", "preset": "full", "system": paper["name"]}
        for task, value in paper["values"].items():
            if isinstance(value, float | int):
                lines.append({**same, "task": task, "accuracy": value, "source": paper["source"]})
    return pd.DataFrame(lines, dtype=object).to_csv(index=False)


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    format: str = option("md", "what is printed", choices=("md", "latex", "html", "csv"))
    compact: bool = option(False, "leave out columns without a run")
    bench: Path | None = option(None, "JSON of one session of chela bench train: speed and memory are taken from it")
    probe: bool = option(False, "add what the attention adds to the score, where chela probe measured it")
    published: bool = option(True, "print the rows of papers too")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Print the table; return the exit status."""
    tables = result_tables(read_runs(options.runs), options.bench)
    if options.format == "csv":
        sys.stdout.write(to_csv(tables, options.published))
        return 0
    blocks = measured(tables, options.compact, options.probe) + (from_papers(tables) if options.published else [])
    sys.stdout.write(render(blocks, options.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
