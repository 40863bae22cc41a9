"""Write one self-contained HTML page: what was found first, tables and curves below it. It opens without a network.

chela report experiments/results/lra_mini out=report.html
chela report runs/lra_mini bench=experiments/results/bench/epyc/train_mini.json     with speed and memory
chela report runs/listops-mini out=curves.png                                       the learning curves alone
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from html import escape
from pathlib import Path

import numpy as np

from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.results import TITLES
from experiments import plot
from experiments.runs import Run, read_runs, write
from experiments.summary import ARENA, BASELINE, ResultTable, result_tables
from experiments.table import from_papers, measured, render, score_heading, to_csv

ABLATIONS = {"chela": "chela_conv_only"}  # each system's ablation, to which it is compared
SHOWN = {"chela": "CHELA", "chela_conv_only": "its convolution alone"}
LEFT, RIGHT, WIDTH, TOP, LINE = 124, 226, 268, 30, 16.4  # of a panel, in its own units

# ---- what is seen first ----


class FirstScreen:
    """Title, sentence, boxes and panels about one table; what the results do not show is left out."""

    def __init__(self, table: ResultTable) -> None:
        self.table = table
        self.cells = table.cells[table.cells["seeds"] > 0]
        self.tasks = [task for task in table.tasks if task in self.cells.index.unique("task")]
        self.titles = {task: table.runs_of(task)[0].title for task in self.tasks}
        self.digits = {task: max(table.score(task)["digits"] - 1, 0) for task in self.tasks}
        self.rows = [str(row) for row in self.cells.index.unique("row")]
        self.firsts = {row: sum(row in table.leaders(task) for task in self.tasks) for row in self.rows}
        self.lead = "chela" if "chela" in self.rows else max(self.rows, key=self.firsts.__getitem__)
        self.other = ABLATIONS.get(self.lead, "")
        both = [task for task in self.tasks if {(self.lead, task), (self.other, task)} <= set(self.cells.index)]
        self.gaps = {task: self.gap(task) for task in both}
        points = {task: gap for task, gap in self.gaps.items() if gap > 0 and table.score(task)["unit"] == "%"}
        self.most = max(points, key=points.__getitem__, default="")

    def gap(self, task: str) -> float:
        """Return how far the system is ahead of its ablation; 0 within two standard errors."""
        mean, errors = self.cells["mean"].xs(task, level="task"), self.table.errors(task)
        gap, error = float(mean[self.lead] - mean[self.other]), 2 * np.sqrt(errors[self.lead] + errors[self.other])
        better = gap if self.table.score(task)["best"] == "max" else -gap
        return better if error > 0 and abs(gap) > error else 0.0

    def title(self) -> str:
        """Return the finding."""
        first = f"among the first on {self.firsts[self.lead]} of " if len(self.rows) > 1 else "on "
        found = f"{_shown(self.lead)} {first}{_count(len(self.tasks), 'task')}"
        if self.gaps:
            ahead = f"{sum(gap > 0 for gap in self.gaps.values())} of {_count(len(self.gaps), 'task')}"
            found = f"Attention pays on {ahead}" + (f", most on {self.titles[self.most]}" if self.most else "")
        systems = {row.partition(" [")[0] for row in self.rows}  # without what sets its variants apart
        return f"{found}: {_count(len(systems), 'system')}, every run a dot"

    def sentence(self) -> str:
        """Return who is ahead where."""
        if not self.gaps:
            return ""
        tasks_by: dict[str, list[str]] = {"ahead": [], "behind": [], "not told apart": []}
        for task, gap in self.gaps.items():
            unit = self.table.score(task)["unit"].replace("%", "points")
            size = f" ({abs(gap):.{self.digits[task]}f} {unit})" if gap else ""
            tasks_by["ahead" if gap > 0 else "behind" if gap else "not told apart"].append(self.titles[task] + size)
        parts = [f"{how} on {', '.join(tasks)}" for how, tasks in tasks_by.items() if tasks]
        return f"{_shown(self.lead)} against {_shown(self.other)}: {'; '.join(parts)}."

    def beside(self, key: str) -> dict[str, float]:
        """Return a column of the system's cells where it is known, by task, the largest first."""
        known = self.cells.xs(self.lead, level="row")[key].dropna().sort_values(ascending=False)
        return {} if self.lead == BASELINE and "×" in key else dict(known.items())

    def boxes(self) -> Iterator[tuple[str, str]]:
        """Yield up to four boxes: a few words, and what they mean."""
        if self.most:
            mean = self.cells["mean"].xs(self.most, level="task")
            against = f"({mean[self.lead]:.1f} against {mean[self.other]:.1f})"
            over = f"on {self.titles[self.most]} over {_shown(self.other)} {against}"
            yield f"+{self.gaps[self.most]:.0f} points", over
        if speeds := self.beside("tokens_per_second ×"):
            (fastest, high), *_, (slowest, low) = [*speeds.items()] * 2
            meaning = f"training speed; {low:.1f}× on {self.titles[slowest]}, {high:.1f}× on {self.titles[fastest]}"
            yield f"{np.exp(np.mean(np.log([*speeds.values()]))):.1f}× {BASELINE}", meaning
        few, many = self.cells["seeds"].min(), self.cells["seeds"].max()
        seeds = _count(few, "seed") if few == many else f"{few}–{many} seeds"
        sizes = self.cells["parameters"].groupby("task")
        wide = 100 * ((sizes.max() / sizes.min()).max() - 1)
        meaning = f"finished; {seeds}" + (f"; sizes within {wide:.0f} %" if wide >= 0 else "")
        yield f"{self.cells['seeds'].sum()} of {len(self.table.runs)} runs", meaning
        if self.table.preset not in ARENA and any(task in TITLES for task in self.tasks):
            yield "Not LRA numbers", f"{self.table.preset} tasks, made small"

    def panels(self) -> Iterator[str]:
        """Yield a drawing for each task, and for speed, memory and what the attention adds where they are known."""
        kinds = {self.lead: "c", self.other: "k"}
        for task in self.tasks:
            score, column = self.table.score(task), self.cells.xs(task, level="task")
            column = column.sort_values("mean", ascending=score["best"] == "min", kind="stable")
            heading = self.titles[task] + ("" if score["name"] == "accuracy" else f", {score_heading(score)} ←")
            rows = []
            for row, runs in column["runs"].items():
                values = [run.value for run in runs if run.state == "finished"]
                rows.append((str(row), kinds.get(str(row), "g"), values))
            yield panel(heading, rows, self.digits[task], self.table.majority(task))
        speed, memory, adds = (self.beside(key) for key in ("tokens_per_second ×", "peak_memory_bytes ×", "adds"))
        adds = {task: value for task, value in adds.items() if self.table.score(task)["unit"] == "%"}
        costs = [(f"Training speed, × {BASELINE}", speed, 1.0), (f"Memory of a step, × {BASELINE}", memory, 1.0)]
        for heading, known, rule in [*costs, ("Attention adds, points (probe)", adds, 0.0)]:
            if rows := [(self.titles[task], "c", [value]) for task, value in known.items()]:
                yield panel(heading, rows, 1, rule)


def _shown(row: str) -> str:
    return SHOWN.get(row, row)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def panel(title: str, rows: Sequence[tuple[str, str, Sequence[float]]], digits: int, rule: float) -> str:
    """Return SVG: for each row (name, class, values) a dot a value, and their mean written.

    Classes: "c" the system that the page is about, "k" what it is compared to, "g" any other. ``rule`` is a line across
    all rows; NaN draws none.
    """
    known = [*(value for *_, values in rows for value in values), *([] if np.isnan(rule) else [rule])]
    low, high = min(known), max(known)
    pad = 0.04 * (high - low)
    scale = (RIGHT - LEFT) / ((high - low + 2 * pad) or 1)
    bottom = TOP + LINE * len(rows)

    def x(value: float) -> float:
        return LEFT + (value - low + pad) * scale

    out = [f'<svg viewBox="0 0 {WIDTH} {bottom - 6:.0f}" role="img" aria-label="{escape(title)}">']
    out.append(f'<text x="0" y="13" class="t">{escape(title)}</text>')
    if not np.isnan(rule):
        out.append(f'<line x1="{x(rule):.1f}" x2="{x(rule):.1f}" y1="22" y2="{bottom - 10:.0f}"/>')
    for place, (name, kind, values) in enumerate(rows):
        y = TOP + LINE * place
        short = re.sub(r"model\.(mixer\.)?", "", _shown(name))
        short = short if len(short) < 20 else f"{short[:18]}…"
        named = escape(short) + (f"<title>{escape(name)}</title>" if short != name else "")
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="n {kind}">{named}</text>')
        out += [f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3.6" class="{kind}"/>' for value in values]
        out.append(f'<text x="{WIDTH}" y="{y + 4:.1f}" class="n {kind}">{np.mean(values):.{digits}f}</text>')
    return "".join([*out, "</svg>"])


def first_screen(tables: Sequence[ResultTable], title: str) -> str:
    """Return the part of the page that is seen first, about the table with most finished runs."""
    table = max(tables, key=lambda table: table.cells["seeds"].sum())
    if not table.cells["seeds"].sum():
        return f"<h1>{escape(title or 'No run is finished yet')}</h1>"
    found = FirstScreen(table)
    csv = f"data:text/csv;base64,{base64.b64encode(to_csv(tables).encode()).decode()}"
    cards = [f'<div class="card"><b>{escape(big)}</b>{escape(small)}</div>' for big, small in found.boxes()]
    return f"""<h1>{escape(title or found.title())}</h1>
<p>{escape(found.sentence())}</p>
<div class="cards">{"".join(cards)}</div>
<div class="grid">{"".join(found.panels())}</div>
<p class="soft">Test accuracy in % or as said; a dot is a run. Dotted: the majority class, or no difference.
{escape("; ".join(table.notes()[3:]))} ·
<a download="cells.csv" href="{csv}">CSV of all cells</a> · <a href="#table">table</a></p>"""


# ---- what is folded below it ----


def curves(tables: Sequence[ResultTable]) -> Iterator[str]:
    """Yield the learning curves of each table, or why there are none."""
    for table in tables:
        yield f"<h2>Preset {escape(table.name)}</h2>"
        try:
            data = base64.b64encode(plot.drawn(plot.learning_curves(table.runs), dpi=110)).decode()
            yield f'<img src="data:image/png;base64,{data}" alt="learning curves">'
        except UsageError as error:
            yield f"<p>{escape(str(error))}</p>"


def samples(tables: Sequence[ResultTable]) -> Iterator[str]:
    """Show what the language models write, of each cell its first run that kept a sample."""
    for table in tables:
        for (name, _), seeds in table.cells["runs"].items():
            if text := next((run.result["sample"] for run in seeds if run.result.get("sample")), ""):
                yield f"<h3>{escape(f'{name}, {table.preset}, writes')}</h3><pre>{escape(text)}</pre>"


def page(runs: Sequence[Run], title: str = "", bench: Path | None = None) -> str:
    """Return the page; ``title`` and the others are as the command's options."""
    tables = result_tables(runs, bench)
    blocks = measured(tables, compact=not any(run.task in TITLES for run in runs), probe=True)
    folded = {
        "The table, with deviations, costs and groups": f'<a id="table"></a>{render(blocks, "html")}',
        "Learning curves": "".join(curves(tables)),
        "What the language models write": "".join(samples(tables)),
        "Rows of papers": render(from_papers(tables), "html"),
    }
    body = [f"<main>{first_screen(tables, title)}</main>"]
    body += [f"<details><summary>{name}</summary>{text}</details>" for name, text in folded.items() if text]
    heading, style = escape(title or "CHELA: results"), Path(__file__).with_name("report.css").read_text()
    head = f'<meta charset="utf-8"><title>{heading}</title><style>{style}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    return "\n".join([f'<!doctype html>\n<html lang="en"><head>{head}{view}</head>\n<body>', *body, "</body></html>\n"])


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    out: Path = option(Path("report.html"), "the page, or by .png, .pdf or .svg a figure of the learning curves")
    bench: Path | None = option(None, "JSON of one session of chela bench train: speed and memory are taken from it")
    title: str = option("", "the page's title; without it, what was found")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Write the page or the figure; return the exit status."""
    runs, kind = read_runs(options.runs), options.out.suffix.removeprefix(".")
    if kind == "html":
        data: str | bytes = page(runs, options.title, options.bench)
    else:
        data = plot.drawn(plot.learning_curves(runs), kind)
    write(options.out, data)
    sys.stdout.write(f"{options.out}: {len(data) / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
