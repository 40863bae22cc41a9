"""Draw the learning curves of one or more runs.

python -m experiments.plot runs/listops-mini/chela-seed0-1a2b3c4d            curves.png in the run's folder
python -m experiments.plot runs/listops-mini --out listops.png               every run below a folder, seeds as bands
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chela.cli import guarded
from chela.errors import UsageError
from experiments.runs import read_runs


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="the figure; its ending (.png, .pdf, .svg) chooses the format")
    asked = parser.parse_args(argv)
    return guarded(lambda: plot(asked.runs, asked.out))


def plot(paths: list[str], out: Path | None) -> int:
    """Draw the runs below ``paths`` into ``out``; without it, beside the run, or here when there are several."""
    from experiments.figures import learning_curves, save, with_curves

    runs, left_out = with_curves(read_runs(paths))
    if not runs:
        none_yet = f"expected metrics.csv with at least one line in {', '.join(paths)}, there is none yet"
        raise UsageError(" ".join(left_out) or none_yet)
    target = out or (Path(paths[0]) if len(runs) == 1 else Path()) / "curves.png"
    save(learning_curves(runs), target)
    sys.stdout.write(f"{target}: learning curves of {len(runs)} run{'s' if len(runs) > 1 else ''}\n")
    sys.stdout.writelines(f"{line}\n" for line in left_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
