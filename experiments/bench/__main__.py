"""``python -m experiments.bench NAME [key=value …] [--compare OLD.json] [--out FILE] [--quick] [--cpu-time]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chela.errors import UsageError

RESULTS = Path("experiments/results/bench")


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; print its table, write its JSON and its plot."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description="Run one benchmark.")
    parser.add_argument("name", help="which one; 'list' names them all")
    parser.add_argument("words", nargs="*", metavar="key=value", help="what to measure of it, such as task=text")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show new / old beside each value")
    parser.add_argument("--out", type=Path, help=f"where the JSON goes ({RESULTS}/NAME.json)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes only, to see that it works")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds, not the wall clock (busy machine, one thread)"
    )
    given = parser.parse_intermixed_args(arguments)

    from rich.console import Console

    from experiments.bench import registry, report, timing

    console = Console()
    if given.name == "list":
        for name in registry.names():
            console.print(f"{name}: {registry.find(name).about}")
        return 0
    try:
        benchmark = registry.find(given.name)
        options = benchmark.options(given.words)
        old = None if given.compare is None else report.read(given.compare)
        path = given.out or RESULTS / f"{given.name}.json"
        report.check_writable(path)  # before minutes of measuring, not after
    except (ValueError, UsageError) as error:
        return _refused(error)
    if given.cpu_time:
        timing.use_cpu_time()
    facts = timing.machine()
    try:
        rows = benchmark.run(given.quick, **options)
    except ValueError as error:
        return _refused(error)
    console.print(report.table(benchmark, rows, old))
    console.print(facts)
    report.write(benchmark, rows, facts, path)
    report.plot(benchmark, rows, path.with_suffix(".png"), console)
    console.print(f"written: {path}")
    return 0


def _refused(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return UsageError.status


if __name__ == "__main__":
    sys.exit(main())
