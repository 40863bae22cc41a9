"""Make the records of a task, or check those that are there.

python -m lra.prepare task=listops                        generate the trees (preset=full|mini|tiny)
python -m lra.prepare task=text data.root=~/downloads     from an extracted or packed aclImdb of your own
python -m lra.prepare task=image --show 6                 and write a page with six records as the model sees them
python -m lra.prepare task=retrieval --check              and compare every file's SHA-256
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lra.errors import DataError

if TYPE_CHECKING:
    from chela.schema import Config
    from lra.tasks.base import Task


def prepare(config: Config, show: int = 0, full_check: bool = False) -> int:
    """Make the records that a configuration asks for, and say what there is; returns the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from lra.builder import check
    from lra.tasks import get_task

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = get_task(config.task)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bar.add_task(what, total=total or None)
            bar.update(shown[what], completed=done)

        task.prepare(config.data, progress=progress)
    check(task.folder, full=full_check)
    sys.stdout.write(_summary(task, config.data.validation, full_check))
    if show:
        sys.stdout.write(f"page: {_write_page(task, show)}\n")
    return 0


def _summary(task: Task, policy: str, checked: bool) -> str:
    about = task.records("train").about
    lines = [f"{task.name}: {task.folder}", f"origin: {about.get('origin', 'unknown')}"]
    if task.note:
        lines.append(f"note: {task.note}")
    for split in ("train", "validation", "test"):
        records = task.dataset(split)
        lengths = records.lengths()
        policy_ = f" (data.validation={policy})" if split == "validation" else ""
        lines.append(
            f"{split}: {len(records):,} records, length {lengths.min():,} … {lengths.max():,}, "
            f"mean {lengths.mean():,.0f}, most frequent class {records.majority_accuracy():.2%}{policy_}"
        )
    lines.append(f"classes: {task.num_classes}; ids: {task.vocab_size or 'none, values'}; l_max: {task.l_max:,}")
    if checked:
        lines.append("every file has its SHA-256")
    return "\n".join(lines) + "\n"


def _write_page(task: Task, number: int) -> Path:
    from lra.show import page

    path = Path(f"{task.name}.html")
    path.write_text(page(task, task.dataset("test"), "test", number), encoding="utf-8")
    return path.resolve()


def _own_flags(words: list[str]) -> tuple[list[str], int, bool]:
    """Take `--show N` and `--check` out of the words; the rest is the configuration's."""
    rest, show = [word for word in words if word != "--check"], 0
    if "--show" in rest:
        at = rest.index("--show")
        number = rest[at + 1] if at + 1 < len(rest) else ""
        if not number.isascii() or not number.isdigit() or not 0 < int(number) <= 1000:
            raise DataError(f"--show: expected a number of records from 1 to 1000, got {number!r}")
        show = int(number)
        del rest[at : at + 2]
    return rest, show, "--check" in words


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from chela.cli import guarded
    from chela.cli import main as command

    def run() -> int:
        words, show, full_check = _own_flags(sys.argv[1:] if argv is None else argv)
        return command(lambda config: prepare(config, show, full_check), __doc__ or "", words)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
