"""Make the records of a task, or check those that are there.

chela prepare task=listops                        generate the trees (preset=full|mini|tiny)
chela prepare task=text data.root=~/downloads     from an extracted or packed aclImdb of your own
chela prepare task=image show=6                   and write a page with six records, beside the data
chela prepare task=retrieval check=true           and compare every file's SHA-256
"""

from __future__ import annotations

import base64
import html
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chela.config.schema import Config
from chela.config.words import command
from chela.core.options import option
from lra.batches import permutation
from lra.builder import check
from lra.source import DataConfig
from lra.tasks import get_task
from lra.tasks.base import SPLITS, Records, Task, sequences
from lra.tasks.stored import StoredTask

_STYLE = "pre { white-space: pre-wrap; overflow-wrap: anywhere } img { image-rendering: pixelated; width: 256px }"


@dataclass
class Options:
    """What the command can be told beside the words of the configuration."""

    show: int = option(0, "write a page that shows so many records", ge=0, le=1000)
    check: bool = option(False, "compare every file's SHA-256")


@command(Options, __doc__, sections=("task", "data"))
def main(options: Options, config: Config) -> int:
    """Make the records that the words ask for, say what there is, and return the exit status."""
    task = get_task(config.task)
    task.prepare(config.data)
    sys.stdout.write("\n".join(_summary(task, config.data, options.check)) + "\n")
    if options.show:
        path = config.data.folder() / f"{task.name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)  # of a task that stores no records
        path.write_text(page(task, task.dataset("test"), "test", options.show), encoding="utf-8")
        sys.stdout.write(f"page: {path}\n")
    return 0


def _summary(task: Task, data: DataConfig, full_check: bool) -> Iterator[str]:
    yield f"{task.name}: {task.folder}" if isinstance(task, StoredTask) else task.name
    if isinstance(task, StoredTask):
        yield f"origin: {check(task.folder, full=full_check)['about'].get('origin', 'unknown')}"
        if full_check:
            yield "every file has its SHA-256"
    if task.note:
        yield f"note: {task.note}"
    for split in SPLITS:
        records = task.dataset(data.split(split))
        lengths = records.lengths()
        policy = f" (data.validation={data.validation})" if split == "validation" else ""
        yield (
            f"{split}: {len(records):,} records, length {lengths.min():,} … {lengths.max():,}, "
            f"mean {lengths.mean():,.0f}, most frequent class {records.majority_accuracy():.2%}{policy}"
        )
    if told := task.baseline():
        yield f"to beat: {told}"
    yield f"classes: {task.num_classes}; ids: {task.vocab_size or 'none, values'}; l_max: {task.l_max:,}"


def page(task: Task, records: Records, split: str, number: int) -> str:
    """Return HTML of so many records of a split, a fixed random choice, as the model gets them; no script."""
    chosen = permutation(len(records), "show")[:number].tolist()
    title = f"{task.name}: {len(chosen)} of {len(records):,} records of {split}"
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    parts += [f"<p><strong>{html.escape(task.note)}</strong></p>"] if task.note else []
    for i, (encoded, label) in zip(chosen, records.read(chosen), strict=True):
        named = f"{task.classes[int(label)]} ({label})" if task.classes else f"label {np.asarray(label).tolist()}"
        parts.append(f"<h2>record {i}: {html.escape(named)}</h2>")
        for sequence in sequences(encoded):
            text = html.escape(task.text(sequence))
            parts.append(f"<p>{len(sequence):,} positions of at most {task.l_max:,}</p>")
            parts.append(f"<pre>{text}</pre>" if text else _drawn(sequence))
    return "\n".join(parts) + "\n"


def _drawn(encoded: np.ndarray) -> str:
    """Return HTML of ids ``(L,)`` or values ``(L, F)``: a picture, lowest value black, where they may be one."""
    side = math.isqrt(len(encoded))
    if encoded.shape != (side**2, 1):
        return f"<pre>{np.round(encoded, 3).tolist()}</pre>"
    from PIL import Image

    low, high, buffer = float(encoded.min()), float(encoded.max()), io.BytesIO()
    levels = np.rint((encoded - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    Image.fromarray(levels.reshape(side, side)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt=""><p>values {low:.3g} … {high:.3g}</p>'


if __name__ == "__main__":
    sys.exit(main())
