r"""Label sequences of your own with a trained run.

python -m chela.predict run=runs/listops-mini/… input=expressions.txt       one sequence a line
printf '[MAX 2 [MIN 4 7 ] ]\n' | python -m chela.predict run=… input=-      from standard input

A line is, for listops, an expression; for text, a review; for retrieval, two documents with a tab between; for image,
32 × 32 pixels from 0 to 255 row by row, gray or RGB; for pathfinder and pathx, gray levels. A line of JSON comes out
for each: {"label": 4, "probabilities": [...]}. Further words: checkpoint=best|last, batch=64,
data.dir=FOLDER, data.root=FOLDER (as for chela.train; for encoding=s4, whose vocabulary comes from the data).
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from chela.cli import guarded
from chela.config import fingerprint, load
from chela.errors import UsageError
from lra.errors import DataError

if TYPE_CHECKING:
    from torch import nn

DEFAULTS = {"run": "", "input": "", "checkpoint": "best", "batch": "64", "data.dir": "", "data.root": ""}


def main(argv: list[str] | None = None) -> int:
    """Read the words, print a line of JSON for each input line, return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write((__doc__ or "").strip() + "\n")
        return 0
    return guarded(lambda: predict(words))


def predict(words: list[str]) -> int:
    """Label the sequences that ``words`` name."""
    asked = dict(DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in asked:
            raise UsageError(f"expected {'=…, '.join(asked)}=…, got {word[:80]!r}; see --help")
        asked[key] = value
    for key in ("run", "input"):
        if not asked[key]:
            raise UsageError(f"{key}: expected {key}={'FOLDER' if key == 'run' else 'FILE or input=-'}; see --help")
    if asked["checkpoint"] not in ("best", "last"):
        raise UsageError(f"checkpoint: expected best or last, got {asked['checkpoint'][:80]!r}")
    batch = int(asked["batch"]) if re.fullmatch("[0-9]{1,9}", asked["batch"]) else 0
    if batch < 1:
        raise UsageError(f"batch: expected a number from 1 to 999999999, got {asked['batch'][:80]!r}")
    model, task = load_run(asked["run"], asked["checkpoint"], asked["data.dir"], asked["data.root"])
    with _lines(asked["input"]) as lines:
        for label, probabilities in label_sequences(model, task, lines, batch=batch):
            sys.stdout.write(json.dumps({"label": label, "probabilities": probabilities}) + "\n")
    sys.stdout.flush()
    return 0


def load_run(folder: str, which: str = "best", data_dir: str = "", data_root: str = "") -> tuple[nn.Module, Any]:
    """Return the network of a run, on the CPU in eval mode, and its task.

    Args:
        folder: A run's folder.
        which: "best" (on validation) or "last" weights.
        data_dir: Where prepared records lie, when it is not where they lay in training.
        data_root: Where the data that these are made of lies, in the same case; "null": the records are enough.

    Raises:
        UsageError: No run there, or weights that are torn or of another network.
    """
    from chela.models import build_model
    from chela.training import checkpoint
    from chela.training.run import LAST_KEYS, open_run
    from lra.tasks import get_task

    run = open_run(folder)
    config = load(run.config)
    config.data.dir = data_dir or config.data.dir
    if data_root:
        config.data.root = None if data_root == "null" else data_root
    task = get_task(config.task)
    if getattr(config.task, "encoding", "") == "s4":
        task.prepare(config.data)
    identity = fingerprint(config)
    state = run.load_best(identity) if which == "best" else checkpoint.load(run.last, LAST_KEYS, identity)
    model = build_model(config.model, task, config.seed)
    if config.trainer.precision == "64-true":
        model.double()
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UsageError(f"expected weights of this run's network in {folder}, got others ({error})") from None
    return model.eval(), task


def label_sequences(
    model: nn.Module, task: Any, lines: Iterable[str], *, batch: int = 64
) -> Iterator[tuple[int, list[float]]]:
    """Yield the label and the probabilities of all classes of each line, in order; one batch is held at a time.

    Raises:
        DataError: A line that is no sequence of the task, with its number.
    """
    import torch

    from lra.datamodule import collate

    rows = iter(lines)
    number = 0
    while chunk := list(islice(rows, batch)):
        records = [(_encode(task, line, number + i), 0) for i, line in enumerate(chunk, 1)]
        number += len(chunk)
        longest = max(len(part) for x, _ in records for part in (x if isinstance(x, tuple) else (x,)))
        padded = collate(records, longest, 0)
        inputs = padded["inputs"]
        if inputs.is_floating_point():
            inputs = inputs.to(next(model.parameters()).dtype)
        with torch.inference_mode():
            scores = model(inputs, padded["mask"]).float().softmax(-1)
        yield from zip(scores.argmax(-1).tolist(), scores.tolist(), strict=True)


def _encode(task: Any, line: str, number: int) -> Any:
    line = line.rstrip("\r\n")
    try:
        encoded = _READERS.get(task.name, _numbers)(task, line)
        task.check(encoded)
    except ValueError as error:
        raise DataError(f"input line {number}: {error}") from None
    return encoded


def _expression(task: Any, line: str) -> Any:
    from lra.generators.listops import OOV
    from lra.tasks.listops import tokenize

    tokens = tokenize(line)
    if (tokens == OOV).any():
        raise ValueError("expected digits, [MIN, [MAX, [MED, [SM and ], with spaces between")
    return tokens


def _review(task: Any, line: str) -> Any:
    return task.encode({"text": _bytes(line)})


def _documents(task: Any, line: str) -> Any:
    first, tab, second = line.partition("\t")
    if not tab:
        raise ValueError("expected two documents with a tab between")
    return task.encode({"first": _bytes(first), "second": _bytes(second)})


def _pixels(task: Any, line: str) -> Any:
    import numpy as np

    values = _parsed(line)
    if (values < 0).any() or (values > 255).any() or (values % 1).any():
        raise ValueError("expected gray levels (for image also RGB values), whole numbers from 0 to 255")
    pixels = values.astype(np.uint8)
    if task.name == "image" and pixels.size == 1024:  # gray: all three channels alike
        pixels = np.repeat(pixels, 3)
    return task.encode({"pixels": pixels})


def _numbers(task: Any, line: str) -> Any:
    import numpy as np

    values = _parsed(line)
    if task.vocab_size is not None:
        if (values % 1).any():
            raise ValueError("expected whole numbers, the ids of tokens")
        return values.astype(np.int64)
    if values.size % task.input_dim:
        raise ValueError(f"expected a multiple of {task.input_dim} numbers, got {values.size:,}")
    return values.astype(np.float32).reshape(-1, task.input_dim)


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "listops": _expression,
    "text": _review,
    "retrieval": _documents,
    "image": _pixels,
    "pathfinder": _pixels,
    "pathx": _pixels,
}


def _parsed(line: str) -> Any:
    """Read numbers with spaces or commas between."""
    import numpy as np

    try:
        values = np.array([float(word) for word in line.replace(",", " ").split()])
    except ValueError as error:
        raise ValueError(f"expected numbers ({error})") from None
    if not np.isfinite(values).all():
        raise ValueError("expected finite numbers")
    return values


def _bytes(line: str) -> Any:
    import numpy as np

    return np.frombuffer(line.encode("utf-8", "surrogateescape"), np.uint8)


@contextlib.contextmanager
def _lines(name: str) -> Iterator[IO[str]]:
    """Open the input; bytes that are no UTF-8 pass through unchanged."""
    if name == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        yield sys.stdin
        return
    try:
        file = open(name, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"input: expected a file to read, got {name} ({error.strerror})") from None
    with file:
        yield file


if __name__ == "__main__":
    sys.exit(main())
