"""The first screen of the report: what was found, and every run as a dot, computed from the cells of a table."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chela.results import TITLES
from experiments.summary import ARENA, BASELINE, ResultTable
from experiments.table import score_heading, to_csv

ABLATIONS = {"chela": "chela_conv_only"}  # what a system is set against: itself, less what is its own
SHOWN = {"chela": "CHELA", "chela_conv_only": "its convolution alone"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LEFT, RIGHT, WIDTH, TOP, LINE = 124, 226, 268, 30, 16.4  # of a panel, in its own units


@dataclass(frozen=True)
class Row:
    """A line of a panel: the numbers that are drawn, and the one that is written."""

    name: str
    values: Sequence[float]
    mean: float
    kind: str = "c"  # the system that the page is about; "k" what it is set against, "g" any other


def panel(title: str, rows: Sequence[Row], digits: int, rules: Mapping[str, float], bars: bool = False) -> str:
    """Return SVG: a dot for each value of a row, or a bar from 0; ``rules``, by class, are lines across all rows."""
    rules = {kind: at for kind, at in rules.items() if not np.isnan(at)}
    known = [*(value for row in rows for value in row.values), *rules.values(), *([0.0] if bars else [])]
    low, high = min(known), max(known)
    pad = 0.0 if bars else 0.04 * (high - low)
    scale = (RIGHT - LEFT) / ((high - low + 2 * pad) or 1)
    bottom = TOP + LINE * len(rows)

    def x(value: float) -> float:
        return LEFT + (value - low + pad) * scale

    out = [f'<svg viewBox="0 0 {WIDTH} {bottom - 6:.0f}" role="img" aria-label="{html.escape(title)}">']
    out.append(f'<text x="0" y="13" class="t">{html.escape(title)}</text>')
    for kind, at in rules.items():
        out.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="22" y2="{bottom - 10:.0f}" class="{kind}"/>')
    for place, row in enumerate(rows):
        y = TOP + LINE * place
        short = re.sub(r"model\.(mixer\.)?", "", _shown(row.name))
        short = short if len(short) < 20 else f"{short[:18]}…"
        name = html.escape(short) + (f"<title>{html.escape(row.name)}</title>" if short != row.name else "")
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="n {row.kind}">{name}</text>')
        for value in row.values:
            start, end = sorted((x(0), x(value))) if bars else (0.0, 0.0)
            bar = f'<rect x="{start:.1f}" y="{y - 5:.1f}" width="{max(end - start, 1):.1f}" height="10" class="c"/>'
            out.append(bar if bars else f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3.6" class="{row.kind}"/>')
        out.append(f'<text x="{WIDTH}" y="{y + 4:.1f}" class="n {row.kind}">{row.mean:.{digits}f}</text>')
    return "".join([*out, "</svg>"])


class FirstScreen:
    """Title, sentence, boxes and panels, each left out where the results do not tell it.

    Args:
        table: The results, some of them finished.
        others: Further tables: those of LRA's own tasks get a word.
        beat: By task what a simple rule scores, as a number and in words.
    """

    def __init__(
        self, table: ResultTable, others: Sequence[ResultTable], beat: Mapping[str, tuple[float, str]]
    ) -> None:
        self.table, self.others, self.beat = table, others, beat
        self.cells = table.cells[table.cells["seeds"] > 0]
        self.tasks = [task for task in table.tasks if task in self.cells.index.unique("task")]
        self.titles = {task: next(run.title for run in table.runs_of(task)) for task in self.tasks}
        self.digits = {task: max(table.score(task)["digits"] - 1, 0) for task in self.tasks}
        self.percent = {task: table.score(task)["unit"] == "%" for task in self.tasks}
        self.rows = [str(row) for row in self.cells.index.unique("row")]
        self.firsts = {row: sum(row in table.leaders(task) for task in self.tasks) for row in self.rows}
        self.lead = "chela" if "chela" in self.rows else max(self.rows, key=self.firsts.__getitem__)
        self.other = next((row for row in self.rows if row == ABLATIONS.get(self.lead)), "")
        both = [task for task in self.tasks if {(self.lead, task), (self.other, task)} <= set(self.cells.index)]
        self.gaps = {task: self.gap(task) for task in both}
        points = {task: gap for task, gap in self.gaps.items() if self.percent[task]}
        self.most = max(points, key=points.__getitem__, default="")

    def gap(self, task: str) -> float:
        """Return how far the system is ahead of its ablation; 0 where two standard errors do not tell."""
        mean, errors = self.cells["mean"].xs(task, level="task"), self.table.errors(task)
        gap, error = float(mean[self.lead] - mean[self.other]), 2 * np.sqrt(errors[self.lead] + errors[self.other])
        better = gap if self.table.score(task)["best"] == "max" else -gap
        return better if error > 0 and abs(gap) > error else 0.0

    def size(self, task: str, gap: float) -> str:
        """Return a difference of scores with its unit."""
        return f"{gap:.{self.digits[task]}f} {'points' if self.percent[task] else self.table.score(task)['unit']}"

    def title(self) -> str:
        """Return the finding."""
        found = f"{_shown(self.lead)} on {_count(len(self.tasks), 'task')}"
        if self.gaps:
            ahead = sum(gap > 0 for gap in self.gaps.values())
            most = self.titles[self.most] if self.most and self.gaps[self.most] > 0 else ""
            where = f", {'most on ' if ahead > 1 else ''}{most}" if most else ""
            found = f"Attention pays on {_share(ahead, len(self.gaps))}{where}"
        elif len(self.rows) > 1:
            found = f"{_shown(self.lead)} is among the first on {_share(self.firsts[self.lead], len(self.tasks))}"
        return f"{found}: {_count(len(self.rows), 'system')}, every run a dot"

    def sentence(self) -> str:
        """Return who is ahead where."""
        if not self.gaps:
            return self.table.firsts() if len(self.rows) > 1 else ""
        parts: list[str] = []
        for word, sign in (("ahead of", 1), ("behind", -1)):
            sizes = {task: sign * gap for task, gap in self.gaps.items() if sign * gap > 0}
            if sizes:
                told = [f"{self.titles[task]} ({self.size(task, size)})" for task, size in sizes.items()]
                parts.append(f"{word} {'it' if parts else _shown(self.other)} on {', '.join(told)}")
        level = sum(gap == 0 for gap in self.gaps.values())
        apart = [f"on {_count(level, 'task')} the runs do not tell them apart"] if level else []
        text = "; ".join(([f"{_shown(self.lead)} is {' and '.join(parts)}"] if parts else []) + apart)
        return f"{text[0].upper()}{text[1:]}."

    def beside(self, key: str) -> dict[str, float]:
        """Return a column of the system's cells where it is known, by task, the largest first."""
        return dict(self.cells.xs(self.lead, level="row")[key].dropna().sort_values(ascending=False).items())

    def boxes(self) -> Iterator[tuple[str, str]]:
        """Yield a few words and what they mean, four at the most."""
        if self.most and (gap := self.gaps[self.most]) > 0:
            mean = self.cells["mean"].xs(self.most, level="task")
            against = f"({mean[self.lead]:.1f} against {mean[self.other]:.1f})"
            yield f"+{gap:.0f} points", f"on {self.titles[self.most]} over {_shown(self.other)} {against}"
        if self.lead != BASELINE and (speeds := self.beside("tokens_per_second ×")):
            ends = dict.fromkeys([min(speeds, key=speeds.__getitem__), *speeds][:2])  # the slowest and the fastest
            told = "; ".join(f"{speeds[task]:.1f}× on {self.titles[task]}" for task in ends)
            yield f"{np.exp(np.mean(np.log([*speeds.values()]))):.1f}× {BASELINE}", f"training speed; {told}"
        few, many = self.cells["seeds"].min(), self.cells["seeds"].max()
        sizes = self.cells["parameters"].groupby("task")
        wide = (sizes.max() / sizes.min()).max() - 1
        seeds = _count(few, "seed") if few == many else f"{few}–{many} seeds"
        finished = f"{self.cells['seeds'].sum()} of {len(self.table.runs)} runs"
        yield finished, f"finished; {seeds}" + (f"; sizes within {100 * wide:.0f} %" if wide >= 0 else "")
        if self.table.preset not in ARENA and any(task in TITLES for task in self.tasks):
            arena = [run for table in self.others for run in table.runs if run.result.get("lra") and run.result["test"]]
            best = ", ".join(f"{run.title} {run.value:.1f}" for run in arena if run.model == self.lead)
            told = f"{self.table.preset} tasks, made small"
            yield "Not LRA numbers", told + (f"; LRA to the letter: {best} %" if best else "")

    def panels(self) -> Iterator[str]:
        """Yield a drawing for each task, and for speed, memory and what the attention adds where they are known."""
        kinds = {self.lead: "c", self.other: "k"}
        for task in self.tasks:
            score, column = self.table.score(task), self.cells.xs(task, level="task")
            column = column.sort_values("mean", ascending=score["best"] == "min", kind="stable")
            heading = self.titles[task] + ("" if score["name"] == "accuracy" else f", {score_heading(score)} ←")
            rules = {"most": self.table.majority(task)} | ({"beat": self.beat[task][0]} if task in self.beat else {})
            rows = []
            for row, cell in column.iterrows():
                values = [run.value for run in cell["runs"] if run.state == "finished"]
                rows.append(Row(str(row), values, cell["mean"], kinds.get(str(row), "g")))
            yield panel(heading, rows, self.digits[task], rules)
        costs = {"Training speed": "tokens_per_second ×", "Memory of a step": "peak_memory_bytes ×"}
        for heading, key in costs.items() if self.lead != BASELINE else ():
            if rows := [Row(self.titles[task], [value], value) for task, value in self.beside(key).items()]:
                yield panel(f"{heading}, × {BASELINE}", rows, 1, {"most": 1.0}, bars=True)
        adds = {task: value for task, value in self.beside("adds").items() if self.percent[task]}
        if rows := [Row(self.titles[task], [value], value) for task, value in adds.items()]:
            yield panel("Attention adds, points (probe)", rows, 1, {}, bars=True)

    def foot(self) -> str:
        """Say what is drawn, and what it was computed on."""
        done = [run.result for run in self.table.runs if run.state == "finished"]
        told = ["Test accuracy in % unless a panel says another score; a dot is a run; dotted: the majority class."]
        if self.beat:
            rules = "; ".join(f"{self.titles[task]} {words}" for task, (_, words) in self.beat.items())
            told.append(f"Dashed: what a simple rule scores ({rules}).")
        machines = {f"{result.get('device')}, threads: {result.get('threads')}" for result in done}
        torch = {result.get("versions", {}).get("torch", "unknown") for result in done}
        hours = sum(result.get("wall_seconds", 0) for result in done) / 3600
        return " ".join(
            [*told, f"{hours:.1f} hours · {'; '.join(sorted(machines))} · torch {', '.join(sorted(torch))}"]
        )


def _shown(row: str) -> str:
    """Return a row's name as the first screen has it."""
    return SHOWN.get(row, row)


def _count(number: int, what: str = "") -> str:
    """Return a number, a small one as a word, of something."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {what}{'' if number == 1 else 's'}" if what else word


def _share(some: int, of: int) -> str:
    """Return so many of all tasks."""
    if of == 1:
        return "one task" if some else "no task"
    return f"{_count(some) if some else 'none'} of {_count(of, 'task')}"


def first_screen(tables: Sequence[ResultTable], title: str, beat: Mapping[str, tuple[float, str]]) -> str:
    """Return the part of the page that is seen first, about the table with most finished runs."""
    table = max(tables, key=lambda table: table.cells["seeds"].sum())
    if not table.cells["seeds"].sum():
        return f"<main><h1>{html.escape(title or 'No run is finished yet')}</h1></main>"
    found = FirstScreen(table, [other for other in tables if other is not table], beat)
    data = base64.b64encode(to_csv(tables).encode()).decode()
    cells = f'<a download="cells.csv" href="data:text/csv;base64,{data}">CSV of all cells</a>'
    cards = [f'<div class="card"><b>{html.escape(big)}</b>{html.escape(small)}</div>' for big, small in found.boxes()]
    parts = [
        f"<h1>{html.escape(title or found.title())}</h1>",
        f"<p>{html.escape(found.sentence())}</p>",
        f'<div class="cards">{"".join(cards)}</div>',
        f'<div class="grid">{"".join(found.panels())}</div>',
        f'<p class="soft">{html.escape(found.foot())} · {cells} · <a href="#table">table</a></p>',
    ]
    return f"<main>{''.join(parts)}</main>"
