r"""Label sequences of your own with a trained run.

python -m chela.predict run=runs/listops-mini/… input=expressions.txt       one sequence a line
printf '[MAX 2 [MIN 4 7 ] ]\n' | python -m chela.predict run=… input=-      from standard input

A line of JSON comes out for each: {"label": 4, "probabilities": [...]}; where each position has a label, lists of
them. What a line is, by task:
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from chela.config.compose import run_folder
from chela.config.groups import names
from chela.config.words import HELP, command, opened
from chela.core.errors import DataError, UsageError
from chela.core.options import option
from chela.evaluate import RunWords
from lra.tasks import get_task, task_class
from lra.tasks.base import sequences

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Words(RunWords):
    """The words of the command."""

    input: str = option("", "a file with one sequence a line, or - for standard input")
    batch: int = option(64, "sequences in a batch", ge=1, le=999_999_999)


def main(argv: list[str] | None = None) -> int:
    """Read the words, print a line of JSON for each input line, return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    tasks = names("task") if set(HELP) & set(words) else []  # each is loaded for it
    lines = "".join(f"    {name}: {task_class(name).input_help}\n" for name in tasks)
    return command(Words, f"{__doc__}{lines}")(predict)(words)


def predict(words: Words) -> int:
    """Label the sequences that ``words`` name."""
    if not words.input:
        raise UsageError("input: expected input=FILE or input=-; see --help")
    model, task = load_run(words)
    with opened(words.input) as file:
        lines = io.TextIOWrapper(file, "utf-8", "surrogateescape")  # bytes that are no UTF-8 pass through unchanged
        for label, probabilities in label_sequences(model, task, lines, batch=words.batch):
            sys.stdout.write(json.dumps({"label": label, "probabilities": probabilities}) + "\n")
    sys.stdout.flush()
    return 0


def load_run(words: RunWords | str) -> tuple[nn.Module, Any]:
    """Return the network of a run, on the CPU in eval mode, and its task.

    Args:
        words: The run's folder, or ``RunWords`` where more is to be said than that.

    Raises:
        UsageError: No run there, or weights that are torn or of another network.
    """
    from chela.models import build_model
    from chela.training.run import RunFolder

    words = RunWords(words) if isinstance(words, str) else words
    run = RunFolder(run_folder(words.run))
    config = words.load_config()
    task = get_task(config.task)
    model = build_model(config.model, task, config.seed)
    if config.trainer.precision == "64-true":
        model.double()
    run.load_into(model, config, words.checkpoint)
    return model.eval(), task


def label_sequences(model: nn.Module, task: Any, lines: Iterable[str], *, batch: int = 64) -> Iterator[tuple[Any, Any]]:
    """Yield the label and the probabilities of all classes of each line, in order; one batch is held at a time.

    Raises:
        DataError: A line that is no sequence of the task, with its number.
    """
    from chela.training.score import each
    from chela.training.step import scores_of
    from lra.batches import Batch, collate

    def batches() -> Iterator[Batch]:
        rows = enumerate(lines, 1)
        while chunk := list(islice(rows, batch)):
            encoded = [_encode(task, line, number) for number, line in chunk]
            lengths = [max(map(len, sequences(x))) for x in encoded]
            yield collate([(x, 0) for x in encoded], max(lengths), 0) | {"lengths": lengths}

    def probabilities(given: Batch) -> list[Any]:
        rows = scores_of(model, given).float().softmax(-1)
        return [row if row.ndim == 1 else row[:length] for row, length in zip(rows, given["lengths"], strict=True)]

    for rows in each(model, batches(), probabilities):
        for row in rows:
            yield row.argmax(-1).tolist(), row.tolist()


def _encode(task: Any, line: str, number: int) -> Any:
    try:
        encoded = task.read_line(line.rstrip("\r\n"))
        task.check(encoded)
    except ValueError as error:
        raise DataError(f"input line {number}: {error}") from None
    return encoded


if __name__ == "__main__":
    sys.exit(main())
