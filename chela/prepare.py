"""Make the records of a task, or check those that are there.

chela prepare task=listops                        generate the trees (preset=full|mini|tiny)
chela prepare task=text data.root=~/downloads     from an extracted or packed aclImdb of your own
chela prepare task=retrieval check=true           and compare every file's SHA-256
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from chela.config.schema import Config
from chela.config.words import command
from chela.core.options import option
from lra.builder import check
from lra.source import DataConfig
from lra.tasks import get_task
from lra.tasks.base import SPLITS, Task
from lra.tasks.stored import StoredTask


@dataclass
class Options:
    """What the command can be told beside the words of the configuration."""

    check: bool = option(False, "compare every file's SHA-256")


@command(Options, __doc__, sections=("task", "data"))
def main(options: Options, config: Config) -> int:
    """Make the records that the words ask for, say what there is, and return the exit status."""
    task = get_task(config.task)
    task.prepare(config.data)
    sys.stdout.write("\n".join(_summary(task, config.data, options.check)) + "\n")
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
    if rule := task.baseline():
        yield f"to beat: {rule}"
    yield f"classes: {task.num_classes}; ids: {task.vocab_size or 'none, values'}; l_max: {task.l_max:,}"


if __name__ == "__main__":
    sys.exit(main())
