"""Train a system on a task.

chela train task=listops                        CHELA; mini without a GPU, full with one
chela train task=listops model=softmax seed=1   another system, another seed
chela train resume=runs/listops-mini/…          go on with a run that was stopped
chela train config=runs.jsonl:RUN seed=1        as that run was (or a config.yaml), but for the seed
chela train model=./mine.yaml                   a system of your own (docs/extend.md)
"""

from __future__ import annotations

import sys
import time

from chela.config.schema import Config
from chela.config.words import SECTIONS, command

STARTED = time.monotonic()  # before the heavy imports: trainer.max_time counts them


@command(None, __doc__, sections=SECTIONS)
def main(config: Config) -> int:
    """Train what the words configure; return the exit status."""
    from chela.training import machine  # torch and lightning load here, after every check of the words

    if config.allocator and config.trainer.accelerator != "gpu":
        machine.tune_allocator()
    from chela.training.loop import fit

    console = machine.stdout_console()
    console.print(f"task={config.task.name} model={config.model.name} preset={config.preset} seed={config.seed}")
    return fit(config, console, STARTED)


if __name__ == "__main__":
    sys.exit(main())
