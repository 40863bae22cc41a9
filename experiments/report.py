"""Write one self-contained HTML page: the table, and the figures that go with it. It opens without a network.

chela report experiments/results/lra_mini out=report.html
chela report runs/lra_mini figures=docs/figures              each figure as a PNG too
"""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from chela.config.words import command
from chela.core.options import option
from chela.results import TITLES
from experiments import plot
from experiments.runs import Run, read_runs, write
from experiments.summary import ResultTable, result_tables
from experiments.table import from_papers, measured, render

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } p { max-width: 60rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e5e5; white-space: nowrap; text-align: left; }
td { font-variant-numeric: tabular-nums; } thead th { border-bottom: 2px solid #888; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; font-size: 13px; }
"""


Drawn = tuple[str, Any, str]  # the name of its file, the figure, what is said under it


def result_figures(table: ResultTable) -> Iterator[Drawn | str]:
    """Draw what the results alone allow; a string says what is left out."""
    runs, left_out = plot.with_curves(table.runs, training=False)
    if runs:
        shown = " or ".join(dict.fromkeys(score["name"] for *_, score in plot.curve_panels(runs)))
        caption = (
            f"Validation {shown}; the band goes from the least to the most of the seeds that have reached the step "
            "(where an unfinished one ends, the curve goes on with the others), the dashed line is the majority "
            "class of the test set."
        )
        yield "curves", plot.learning_curves(runs, training=False), caption
    yield from left_out
    if table.cells["adds"].any():
        caption = "What the attention adds: the score, less that with its output replaced at every position by its mean"
        yield "attention-adds", plot.attention_adds(table), f"{caption} over the sequence."


def samples(tables: Sequence[ResultTable]) -> Iterator[str]:
    """Show what the language models write, of each cell its first run that kept a sample."""
    for table in tables:
        for (name, _), seeds in table.cells["runs"].items():
            if text := next((run.result["sample"] for run in seeds if run.result.get("sample")), ""):
                yield f"<h3>{html.escape(f'{name}, {table.preset}, writes')}</h3><pre>{html.escape(text)}</pre>"


def page(runs: Sequence[Run], title: str, folder: Path | None = None) -> str:
    """Return the page; with a folder, write each figure there as well."""
    tables = result_tables(runs)
    of_lra = any(run.task in TITLES for run in runs)
    several = len(tables) > 1
    firsts = [f"{table.name}: {told}" if several else told for table in tables if (told := table.firsts())]
    blocks = [*firsts, *measured(tables, compact=not of_lra)]
    body = [f"<h1>{html.escape(title)}</h1>", render(blocks, "html"), *samples(tables)]

    def add(heading: str, stem: str, all_drawn: Iterator[Drawn | str]) -> None:
        body.append(render([f"## {heading}"], "html"))
        for drawn in all_drawn:
            if isinstance(drawn, str):
                body.append(render([drawn], "html"))
                continue
            name, figure, caption = drawn
            if folder is not None:
                plot.save(figure, folder / f"{stem}-{name}.png")
            data, words = base64.b64encode(plot.drawn(figure, dpi=110)).decode(), html.escape(caption)
            image = f'<img src="data:image/png;base64,{data}" alt="{words}">'
            body.append(f"<figure>{image}<figcaption>{words}</figcaption></figure>")

    for table in tables:
        stem = f"{table.preset}-{table.policy}" + (f"-{table.edition}" if table.edition > 1 else "")
        add(f"Figures: preset {table.name}", stem, result_figures(table))
    body.append(render(from_papers(tables), "html"))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return "\n".join([f'<!doctype html>\n<html lang="en"><head>{head}{view}</head>\n<body>', *body, "</body></html>\n"])


@dataclass
class Options:
    """What the command is told."""

    runs: list[str] = option(MISSING, "run folders, or folders above them", positional=True)
    out: Path = option(Path("report.html"), "the page")
    figures: Path | None = option(None, "folder in which each figure is written as a PNG too")
    title: str = option("CHELA", "the page's title")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Write the page; return the exit status."""
    text = page(read_runs(options.runs), options.title, options.figures)
    write(options.out, text)
    sys.stdout.write(f"{options.out}: {len(text) / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
