"""Write one self-contained HTML page: what was found first, tables and curves below it. It opens without a network.

chela report experiments/results/lra_mini out=report.html
chela report runs/lra_mini bench=experiments/results/bench/epyc/train_mini.json     with speed and memory
chela report experiments/results/lra_mini rules=true                                and with what simple rules score
"""

from __future__ import annotations

import base64
import html
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.results import TITLES
from experiments import plot
from experiments.first_screen import first_screen
from experiments.runs import Run, read_runs, write
from experiments.summary import ResultTable, result_tables
from experiments.table import from_papers, measured, render

STYLE = """
:root { color-scheme: light dark; --fg: #1a1a1a; --bg: #fff; --soft: #666; --line: #ddd; --c: #0969da; --k: #a85f00;
  --g: #8a8f98; --beat: #c33; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e6e6; --bg: #14161a; --soft: #9aa; --line: #333; --c: #58a6ff;
  --k: #f0a030; --g: #7d848d; --beat: #f77; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 18px auto; max-width: 1180px; padding: 0 16px; color: var(--fg);
  background: var(--bg); }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 6px; } p { margin: 4px 0 10px; } a { color: var(--c); }
.soft { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 10px; margin: 8px 0 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; } .card b { font-size: 21px;
  display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(268px, 1fr)); gap: 12px 26px; }
svg { width: 100%; height: auto; overflow: visible; } text { fill: var(--fg); font: 11px system-ui, sans-serif; }
text.t { font-size: 13px; font-weight: 600; } text.n { text-anchor: end; } text.g { fill: var(--soft); }
text.c { fill: var(--c); font-weight: 700; } text.k { fill: var(--k); } circle.c, rect.c { fill: var(--c); }
circle.k { fill: var(--k); } circle.g { fill: var(--g); } line { stroke: var(--soft); stroke-dasharray: 2 3; }
line.beat { stroke: var(--beat); stroke-dasharray: 5 3; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; } pre { overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; height: auto; background: #fff; }
"""


def simple_rules(tables: Sequence[ResultTable]) -> dict[str, tuple[float, str]]:
    """Return by task what a simple rule scores (``Task.baseline``); data that is not there is made for it."""
    from lra.tasks import get_task

    found = {}
    for task, run in {run.task: run for table in reversed(tables) for run in reversed(table.runs)}.items():
        if ":" in run.record["config"]["task"]["name"]:  # somebody's own code, which nobody has said to trust
            continue
        config = run.load_config()
        made = get_task(config.task)
        made.prepare(config.data)
        if percent := re.match(r"([\d.]+) ?%", words := made.baseline()):
            found[task] = float(percent[1]), words
    return found


def curves(tables: Sequence[ResultTable]) -> Iterator[str]:
    """Yield the learning curves of each table, or what stands in their way."""
    for table in tables:
        yield f"<h2>Preset {html.escape(table.name)}</h2>"
        try:
            data = base64.b64encode(plot.drawn(plot.learning_curves(table.runs), dpi=110)).decode()
            yield f'<img src="data:image/png;base64,{data}" alt="learning curves">'
        except UsageError as error:
            yield f"<p>{html.escape(str(error))}</p>"


def samples(tables: Sequence[ResultTable]) -> Iterator[str]:
    """Show what the language models write, of each cell its first run that kept a sample."""
    for table in tables:
        for (name, _), seeds in table.cells["runs"].items():
            if text := next((run.result["sample"] for run in seeds if run.result.get("sample")), ""):
                yield f"<h3>{html.escape(f'{name}, {table.preset}, writes')}</h3><pre>{html.escape(text)}</pre>"


def page(runs: Sequence[Run], title: str = "", bench: Path | None = None, rules: bool = False) -> str:
    """Return the page; ``title`` and the others are as the command's options."""
    tables = result_tables(runs, bench)
    firsts = [f"{table.name}: {told}" for table in tables if (told := table.firsts())]
    blocks = [*firsts, *measured(tables, compact=not any(run.task in TITLES for run in runs), probe=True)]
    folded = {
        "The table, with deviations, costs and groups": f'<a id="table"></a>{render(blocks, "html")}',
        "Learning curves": "".join(curves(tables)),
        "What the language models write": "".join(samples(tables)),
        "Rows of papers": render(from_papers(tables), "html"),
    }
    body = [first_screen(tables, title, simple_rules(tables) if rules else {})]
    body += [f"<details><summary>{name}</summary>{text}</details>" for name, text in folded.items() if text]
    heading = html.escape(title or "CHELA: results")
    head = f'<meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    return "\n".join([f'<!doctype html>\n<html lang="en"><head>{head}{view}</head>\n<body>', *body, "</body></html>\n"])


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    out: Path = option(Path("report.html"), "the page")
    bench: Path | None = option(None, "JSON of one session of chela bench train: speed and memory are taken from it")
    rules: bool = option(False, "draw what simple rules score too; the data is made where it is not there")
    title: str = option("", "the page's title; without it, what was found")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Write the page; return the exit status."""
    text = page(read_runs(options.runs), options.title, options.bench, options.rules)
    write(options.out, text)
    sys.stdout.write(f"{options.out}: {len(text) / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
