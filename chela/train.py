"""Train a system on a task.

python -m chela.train task=listops                        CHELA; mini without a GPU, full with one
python -m chela.train task=listops model=softmax seed=1   another system, another seed
python -m chela.train resume=runs/listops-mini/…          go on with a run that was stopped
python -m chela.train model=./mine.yaml                   a system of your own (docs/extend.md)
"""

from __future__ import annotations

import sys
import time

from chela.config.compose import resolve_preset
from chela.config.schema import Config
from chela.config.words import configured

STARTED = time.monotonic()  # before the heavy imports: trainer.max_time counts them


def train(config: Config, automatic: bool = False) -> int:
    """Train as ``config`` says; return the exit status.

    Args:
        config: The resolved configuration.
        automatic: Whether the preset was chosen by what this machine has.
    """
    from chela.training import machine  # torch and lightning load here, after every check of the words

    tuned = config.allocator and config.trainer.accelerator != "gpu" and machine.tune_allocator()
    from chela.training.loop import fit

    console = machine.stdout_console()
    console.print(f"task={config.task.name} model={config.model.name} preset={config.preset} seed={config.seed}")
    if automatic:
        _, why = resolve_preset("auto", config.trainer.accelerator)
        console.print(
            f"preset: full is the default with a CUDA GPU, mini without ({why}); choose with preset=full|mini|tiny"
        )
    console.print(
        "allocator: freed memory is kept (allocator=false leaves it alone)" if tuned else "allocator: left alone"
    )
    return fit(config, console, STARTED)


def main(argv: list[str] | None = None) -> int:
    """Read the words and train; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    chosen = dict(word.partition("=")[::2] for word in words)
    automatic = chosen.get("preset", "auto") == "auto" and chosen.get("resume", "auto") in ("auto", "none")
    return configured(lambda config: train(config, automatic), __doc__ or "", words)


if __name__ == "__main__":
    sys.exit(main())
