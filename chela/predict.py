r"""Label sequences of your own with a trained run, or with weights that have a name.

chela predict run=runs/listops-mini/… input=expressions.txt        one sequence a line
echo 'A dull plot, wooden acting.' | chela predict weights=text-lite input=-

A line of JSON comes out for each: {"label": 0, "name": "negative", "probabilities": [...]}; where each position has a
label, lists of them. What a line is, by task:
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from chela.config.compose import names, run_folder
from chela.config.words import command
from chela.core.errors import DataError, UsageError
from chela.core.files import expect_trusted
from chela.core.options import option
from chela.evaluate import RunOptions
from lra.tasks import get_task, task_class, task_options
from lra.tasks.base import sequences

if TYPE_CHECKING:
    from torch import nn

    from chela.models.heads import Network
    from lra.tasks.base import Task


@dataclass
class NetworkOptions(RunOptions):
    """What names a network: a run, or weights."""

    weights: str = option("", "in place of a run: text-lite or another name of docs/weights.md, a folder or a Hub id")

    def network(self) -> Network:
        """Return the network, on the CPU in eval mode; UsageError where there is none."""
        from chela.models.pretrained import from_pretrained
        from chela.training.machine import choose_matmul

        choose_matmul("auto")
        if self.weights and self.run != "last":
            raise UsageError("run: expected run=FOLDER or weights=NAME, got both")
        return from_pretrained(self.weights, self.trust.split(",")) if self.weights else load_run(self)[0]


@dataclass(kw_only=True)
class Options(NetworkOptions):
    """The words of the command."""

    input: str = option(MISSING, "a file with one sequence a line, or - for standard input")
    batch: int = option(64, "sequences in a batch", ge=1, le=999_999_999)


def about() -> str:
    """Return the docstring, with what a line is for each task."""
    return f"{__doc__}" + "".join(f"    {name}: {task_class(name).input_help}\n" for name in names("task"))


@command(Options, about)
def main(options: Options) -> int:
    """Label the sequences that the words name; return the exit status."""
    from chela.models.pretrained import read_options

    model, where = options.network(), options.weights or options.run
    if not model.encoding:
        raise UsageError(f"weights: expected an encoding in {where}/config.json, by which a line is read, got none")
    name = str(model.encoding.get("name"))
    expect_trusted([name], options.trust.split(","), where)
    try:
        task = get_task(read_options(task_options(name), model.encoding, where, "task."))
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    try:
        file = sys.stdin.buffer if options.input == "-" else open(os.path.expanduser(options.input), "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"input: expected a file to read, got {options.input} ({error.strerror})") from None
    lines = io.TextIOWrapper(file, "utf-8", "surrogateescape")  # bytes that are no UTF-8 pass through unchanged
    for label, probabilities in label_sequences(model, task, lines, batch=options.batch):
        named = {"name": model.labels[label]} if model.labels and isinstance(label, int) else {}
        sys.stdout.write(json.dumps({"label": label, **named, "probabilities": probabilities}) + "\n")
    sys.stdout.flush()
    return 0


def load_run(options: RunOptions | str) -> tuple[Network, Task]:
    """Return the network of a run, on the CPU in eval mode, and its task; ``options`` may be the run's folder alone.

    UsageError where there is no run, or its weights are torn or of another network.
    """
    from chela.training.run import RunFolder

    options = RunOptions(options) if isinstance(options, str) else options
    run = RunFolder(run_folder(options.run))
    config = options.load_config()
    task = get_task(config.task)
    return run.network(config, task, options.checkpoint).eval(), task


def label_sequences(model: nn.Module, task: Any, lines: Iterable[str], *, batch: int = 64) -> Iterator[tuple[Any, Any]]:
    """Yield the label and the probabilities of all classes of each line, in order; one batch is held at a time.

    Raises:
        DataError: A line that is no sequence of the task, with its number.
    """
    from chela.training.score import over_batches
    from chela.training.step import scores_of
    from lra.batches import Batch, collate

    def read(number: int, line: str) -> Any:
        try:
            encoded = task.read_line(line.rstrip("\r\n"))
            task.check(encoded)
        except ValueError as error:
            raise DataError(f"input line {number}: {error}") from None
        return encoded

    def batches() -> Iterator[Batch]:
        rows = enumerate(lines, 1)
        while chunk := list(islice(rows, batch)):
            encoded = [read(number, line) for number, line in chunk]
            lengths = [max(map(len, sequences(x))) for x in encoded]
            yield collate([(x, 0) for x in encoded], max(lengths), 0) | {"lengths": lengths}

    def probabilities(given: Batch) -> list[Any]:
        rows = scores_of(model, given).float().softmax(-1)
        return [row if row.ndim == 1 else row[:length] for row, length in zip(rows, given["lengths"], strict=True)]

    for rows in over_batches(model, batches(), probabilities):
        for row in rows:
            yield row.argmax(-1).tolist(), row.double().round(decimals=6).tolist()


if __name__ == "__main__":
    sys.exit(main())
