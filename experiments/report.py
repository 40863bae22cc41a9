"""Write one self-contained HTML page: the table, and the figures that go with it. It opens without a network.

python -m experiments.report experiments/results/lra_mini --out report.html
python -m experiments.report runs/lra_mini --figures docs/figures              each figure as a PNG too
python -m experiments.report runs/lra_mini --bench experiments/results/bench/layers.json

The learned kernels and the receptive fields need the runs' checkpoints; committed results have none, and the page
then says so.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chela.cli import guarded
from chela.errors import UsageError
from experiments import figures
from experiments.render import Heading, Paragraph, render
from experiments.runs import Run, read_runs
from experiments.summary import Part, parts
from experiments.table import from_papers, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } p { max-width: 60rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e5e5; white-space: nowrap; text-align: right; }
th[scope=row], td.words { text-align: left; }
td.words { white-space: normal; min-width: 6rem; } thead th { border-bottom: 2px solid #888; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; font-size: 13px; }
"""


@dataclass(frozen=True)
class Drawn:
    """A figure with its name (of its file) and what is said under it."""

    name: str
    figure: Figure
    caption: str


def part_figures(part: Part) -> Iterator[Drawn | str]:
    """Draw what the results alone allow; a string says what is left out."""
    runs, left_out = figures.with_curves(part.runs, training=False)
    stem = f"{part.preset}-{part.policy}"
    if runs:
        yield Drawn(
            f"{stem}-curves",
            figures.learning_curves(runs, training=False),
            "Validation loss and accuracy; the band goes from the least to the most of the seeds that have reached the "
            "step (where an unfinished one ends, the curve goes on with the others), the dashed line is the majority "
            "class of the test set.",
        )
    yield from left_out
    if any(run.state == "finished" for run in part.runs):
        for key, label in (("training_seconds", "seconds of training"), ("parameters", "parameters")):
            yield Drawn(
                f"{stem}-{key}",
                figures.accuracy_against(part, key, label),
                f"Test accuracy (mean and standard deviation over seeds) against {label}.",
            )
            yield from (
                f"{run.task} {run.path.name}: its {label} are left out, its result.json does not tell them."
                for row in part.cells.values()
                for cell in row.values()
                for run in cell.lacking(key)
            )


def probed_figures(part: Part) -> Iterator[Drawn | str]:
    """Draw what needs the weights, of each task's first seed of each system; a string says what is left out."""
    from experiments.probe import has_weights, long_kernels, receptive_field, trained_model

    stem = f"{part.preset}-{part.policy}"
    lacking = 0
    for task in part.tasks:
        fields = {}
        for name, row in part.cells.items():
            run = next((run for run in row[task].finished if has_weights(run)), None) if task in row else None
            if run is None:
                lacking += task in row
                continue
            try:
                model = trained_model(run)
            except UsageError as error:
                yield f"The kernels and receptive field of {run.task} {run.path.name} are left out: {error}."
                continue
            fields[name] = receptive_field(model)
            kernels = long_kernels(model) if run.model.startswith("chela") else []
            if kernels:
                title = f"{task} {part.preset}, {name}, seed {run.seed}"
                caption = "The long kernels that were learned: median and 10-90 % of the channels."
                yield Drawn(
                    f"{stem}-{task}-{run.model}-{run.fingerprint}-kernels",
                    figures.learned_kernels(kernels, title),
                    caption,
                )
        if fields:
            yield Drawn(
                f"{stem}-{task}-receptive-field",
                figures.receptive_fields(fields, f"{task} {part.preset}"),
                "How strongly the middle position's output depends on the input at each distance (gradient norm on "
                "random sequences, first seed).",
            )
    if lacking:
        yield (
            f"Learned kernels and receptive fields are left out for {lacking} of the cells: they need checkpoints, "
            "which committed results do not have."
        )


def bench_figure(path: Path) -> Drawn | str:
    """Draw a benchmark's result against the length."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        figure = figures.bench_curves(result)
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--bench: expected the JSON of experiments.bench at {path}, got {reason}") from None
    if figure is None:
        return f"{result['name']}: no length L or no value with a unit to draw"
    return Drawn(f"bench-{result['name']}", figure, f"Benchmark {result['name']} against the length, on {machine}.")


def page(runs: Sequence[Run], title: str, figures_folder: Path | None = None, benches: Sequence[Path] = ()) -> str:
    """Return the page; with a folder, write each figure there as well."""

    def add(drawn: Drawn | str) -> None:
        if isinstance(drawn, str):
            body.append(render([Paragraph(drawn)], "html"))
            return
        if figures_folder is not None:
            figures.save(drawn.figure, figures_folder / f"{drawn.name}.png")
        body.append(_figure(drawn))

    body: list[str] = [f"<h1>{html.escape(title)}</h1>"]
    found = parts(runs)
    body.append(render(measured(found), "html"))
    for part in found:
        body.append(render([Heading(f"Figures: preset {part.preset}, validation {part.policy}")], "html"))
        for drawn in itertools.chain(part_figures(part), probed_figures(part)):
            add(drawn)
    if benches:
        body.append(render([Heading("Speed and memory against length")], "html"))
        for path in benches:
            add(bench_figure(path))
    body.append(render(from_papers(found), "html"))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{view}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def _figure(drawn: Drawn) -> str:
    out = io.BytesIO()
    drawn.figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    data = base64.b64encode(out.getvalue()).decode()
    caption = html.escape(drawn.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def main(argv: list[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write each figure there as a PNG too")
    parser.add_argument("--bench", type=Path, nargs="+", default=[], metavar="FILE", help="JSON of experiments.bench")
    parser.add_argument("--title", default="CHELA on the Long Range Arena")
    asked = parser.parse_args(argv)
    return guarded(lambda: write(asked.runs, asked.out, asked.figures, asked.bench, asked.title))


def write(paths: list[str], out: Path, figures_folder: Path | None, benches: list[Path], title: str) -> int:
    """Write the page of the runs below ``paths``."""
    text = page(read_runs(paths), title, figures_folder, benches)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out: expected a file that can be written, got {out} ({error.strerror})") from None
    sys.stdout.write(f"{out}: {len(text) / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
