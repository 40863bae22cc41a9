"""Train a system on a Long Range Arena task.

python -m chela.train task=listops                        CHELA; mini without a GPU, full with one
python -m chela.train task=listops model=softmax seed=1   another system, another seed
python -m chela.train resume=runs/listops-mini/…          go on with a run that was stopped
"""

from __future__ import annotations

import sys
import time

from chela.cli import main
from chela.config import resolve_preset
from chela.schema import Config

STARTED = time.monotonic()  # before the heavy imports: trainer.max_time counts them


def train(config: Config) -> int:
    """Train as ``config`` says; return the exit status."""
    from chela.training import machine  # torch and lightning load here, after every check of the words

    tuned = config.allocator and config.trainer.accelerator != "gpu" and machine.tune_allocator()
    from chela.training.fit import fit
    from chela.training.hardware import stdout_console

    console = stdout_console()
    _, why = resolve_preset("auto", config.trainer.accelerator)
    console.print(f"task={config.task.name} model={config.model.name} preset={config.preset} seed={config.seed}")
    console.print(
        f"preset: full is the default with a CUDA GPU, mini without ({why}); choose with preset=full|mini|tiny"
    )
    console.print(
        "allocator: freed memory is kept (allocator=false leaves it alone)" if tuned else "allocator: left alone"
    )
    return fit(config, console, STARTED)


if __name__ == "__main__":
    sys.exit(main(train, __doc__ or ""))
