"""Make the table of runs: mean ± standard deviation over seeds, and everything that qualifies it.

python -m experiments.table runs/lra_mini                                      Markdown
python -m experiments.table experiments/results/ablation --compact             without the tasks that were not run
python -m experiments.table experiments/results/lra_mini --format html > table.html
python -m experiments.table runs/lra_mini --format csv > table.csv             one line for each task and system

Each preset has a table of its own. Published rows stand apart, with their sources; nothing of them was run here.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from chela.cli import guarded
from experiments.render import FORMATS, NONE, Block, Grid, Heading, Paragraph, render
from experiments.runs import TASKS, Run, read_runs
from experiments.summary import COSTS, Cell, Part, parts, published

TITLES = {"listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "image": "Image"}
TITLES |= {"pathfinder": "Pathfinder", "pathx": "Path-X"}
COST_TITLES = dict(zip(COSTS, ("parameters", "tokens/s", "memory"), strict=True))


def measured(found: Sequence[Part], compact: bool = False) -> list[Block]:
    """Return what was measured here as headings, paragraphs and grids; ``compact`` leaves out columns without a run."""
    out: list[Block] = []
    if len(found) > 1:
        kinds = ", ".join(f"{part.preset} (validation {part.policy})" for part in found)
        out.append(Paragraph(f"The tables below must not be compared with one another: {kinds}."))
    for part in found:
        out.append(Heading(f"Measured here: preset {part.preset}, validation {part.policy}"))
        out.append(main_grid(part).compact() if compact else main_grid(part))
        out.extend(Paragraph(note) for note in _legend(part))
        out.append(Heading("Each task and system", level=3))
        out.append(detail_grid(part))
    return out


def from_papers(found: Sequence[Part]) -> list[Block]:
    """Return the rows of papers, under a heading that tells them from ours."""
    full = all(part.preset == "full" for part in found)
    apart = "" if full else " They are of the full tasks: no number measured here may be set beside them."
    return [
        Heading("Published, not measured here" + ("" if full else ", and on the full tasks")),
        Paragraph("Accuracies as papers print them, each with its source." + apart),
        published_grid(),
    ]


def _legend(part: Part) -> list[str]:
    return [
        "Test accuracy in %, mean ± standard deviation (seeds). “at chance”: seeds whose training never left the "
        "majority class, counted in the mean. “failed”: runs without a result, counted in nothing.",
        "×: beside softmax on the same task, geometric mean over the tasks that both were run on; tokens/s is the "
        "median over the logged steps.",
        "; ".join(part.notes()) + ".",
    ]


def main_grid(part: Part) -> Grid:
    """Systems × tasks."""
    header = ["system", *(TITLES.get(task, task) for task in part.tasks), "average"]
    header += [f"{COST_TITLES[key]} ×" for key in COSTS]
    rows = []
    for name, row in part.cells.items():
        cells = [accuracy_text(row[task]) if task in row else NONE for task in part.tasks]
        rows.append(
            [name, *cells, number(part.average(name)), *(ratio(part.mean_relative(name, key)) for key in COSTS)]
        )
    majority = [number(part.majority(task)) for task in part.tasks]
    return Grid(header, [*rows, ["majority class", *majority, NONE, *(NONE for _ in COSTS)]])


def accuracy_text(cell: Cell) -> str:
    """Return a cell's words: ``51.23 ± 0.45 (3; 1 at chance)``."""
    counts = [(cell.at_chance, "at chance")] + [(cell.count(s), s) for s in ("failed", "unfinished", "untested")]
    remarks = [f"{count} {what}" for count, what in counts if count]
    if cell.mean is None:
        return f"{NONE} ({'; '.join(remarks)})"
    spread = "" if cell.sd is None else f" ± {cell.sd:.2f}"
    return f"{cell.mean:.2f}{spread} ({'; '.join([str(len(cell.finished)), *remarks])})"


def number(value: float | None) -> str:
    """Return two decimals, or a dash."""
    return NONE if value is None else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """Return a factor, or a dash."""
    return NONE if value is None else f"{value:.2f}×"


def detail_grid(part: Part) -> Grid:
    """Task by task: what was run and what it cost."""
    header = [
        "task",
        "system",
        "accuracy, %",
        "rate",
        "steps",
        "parameters",
        "tokens/s",
        "memory, MiB",
        "minutes a run",
    ]
    rows = []
    for task in part.tasks:
        for name, row in part.cells.items():
            if task not in row:
                continue
            cell = row[task]
            minutes = cell.cost("wall_seconds")
            rows.append(
                [
                    TITLES.get(task, task),
                    name,
                    accuracy_text(cell),
                    f"{cell.config('optimizer.lr'):g}",
                    str(cell.config("trainer.max_steps")),
                    *(_cost(part, name, task, key) for key in COSTS),
                    NONE if minutes is None else f"{minutes / 60:.1f}",
                ]
            )
    return Grid(header, rows, words=("system",))


def _cost(part: Part, name: str, task: str, key: str) -> str:
    value = part.cells[name][task].cost(key)
    if value is None:
        return NONE
    beside = part.relative(name, task, key)
    text = f"{value / 2**20:,.0f}" if key == "peak_memory_bytes" else f"{value:,.0f}"
    return text if beside is None else f"{text} ({ratio(beside)})"


def published_grid() -> Grid:
    """The rows of papers."""
    header = ["paper's row", *(TITLES[task] for task in TASKS), "average, as printed", "mark", "source"]
    rows = []
    for row in published():
        values = ["fails" if value == "fail" else number(value) for value in row.values.values()]  # type: ignore[arg-type]
        rows.append([row.name, *values, number(row.average), row.mark, row.source])
    note = "mark A: read in the primary source; B: read in another paper that cites it."
    return Grid(header, rows, note, words=("mark", "source"))


def to_csv(runs: Sequence[Run], with_published: bool = True) -> str:
    """Return one line for each task and system; ``kind`` tells ours from a paper's."""
    out = io.StringIO()
    costs = [*COSTS, *(f"{key}_beside_softmax" for key in COSTS)]
    columns = ["kind", "preset", "validation", "task", "system", "accuracy", "sd", "seeds", "at_chance", "failed"]
    columns += ["unfinished", "lr", "steps", *costs, "wall_seconds", "source"]
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for part in parts(runs):
        where = {"preset": part.preset, "validation": part.policy}
        for name, row in part.cells.items():
            for task, cell in row.items():
                writer.writerow({**where, "task": task, "system": name, **_csv_cell(part, name, task, cell)})
        for task in part.tasks:
            majority = part.majority(task)
            if majority is not None:
                writer.writerow({**where, "kind": "majority", "task": task, "accuracy": majority})
    for entry in published() if with_published else []:
        for task, value in entry.values.items():
            if isinstance(value, float | int):
                words = {"kind": f"published-{entry.mark}", "preset": "full", "task": task, "system": entry.name}
                writer.writerow({**words, "accuracy": value, "source": entry.source})
    return out.getvalue()


def _csv_cell(part: Part, name: str, task: str, cell: Cell) -> dict[str, object]:
    return {
        "kind": "measured",
        "accuracy": cell.mean,
        "sd": cell.sd,
        "seeds": len(cell.finished),
        "at_chance": cell.at_chance,
        "failed": cell.count("failed"),
        "unfinished": cell.count("unfinished"),
        "lr": cell.config("optimizer.lr"),
        "steps": cell.config("trainer.max_steps"),
        **{key: cell.cost(key) for key in COSTS},
        **{f"{key}_beside_softmax": part.relative(name, task, key) for key in COSTS},
        "wall_seconds": cell.cost("wall_seconds"),
        "source": ", ".join(sorted({str(run.result.get("git_commit")) for run in cell.finished})),
    }


@dataclass(frozen=True)
class _Asked:
    runs: list[str]
    format: str
    compact: bool
    published: bool


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders above them")
    parser.add_argument("--format", choices=(*FORMATS, "csv"), default="md")
    parser.add_argument("--compact", action="store_true", help="leave out columns without a run")
    parser.add_argument("--no-published", action="store_true", help="leave out the rows of papers")
    asked = parser.parse_args(argv)
    return guarded(lambda: _print(_Asked(asked.runs, asked.format, asked.compact, not asked.no_published)))


def _print(asked: _Asked) -> int:
    runs = read_runs(asked.runs)
    if asked.format == "csv":
        sys.stdout.write(to_csv(runs, asked.published))
    else:
        found = parts(runs)
        blocks = measured(found, asked.compact) + (from_papers(found) if asked.published else [])
        sys.stdout.write(render(blocks, asked.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
