"""List the systems with their size and cost on a task.

python -m chela.models                                   on ListOps, at the preset of this machine
python -m chela.models task=listops preset=full model.depth=2
"""

from __future__ import annotations

import sys

from chela.cli import guarded
from chela.config import names, resolve
from chela.errors import UsageError

HEAD = ("model", "parameters", "in mixers", "MFLOPs/token", "state")
NOTE = (
    "MFLOPs/token: forward, at the longest sequence; matrix products, attention, convolutions and FFTs. "
    "state: numbers that the causal form remembers of the longest sequence."
)


def main(argv: list[str] | None = None) -> int:
    """Read the words, print the table, return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        sys.stdout.write(f"{(__doc__ or '').strip()}\n\nFurther key=value words as for chela.train.\n\n{NOTE}\n")
        return 0
    return guarded(lambda: listing(words))


def listing(words: list[str]) -> int:
    """Print a line for each file in ``configs/model``."""
    if any(word.split("=")[0] == "model" for word in words):
        raise UsageError("model: expected no such word, all systems are listed; to choose one: chela.train model=NAME")
    config = resolve(words)
    from chela.models.cost import cost
    from lra.tasks import get_task

    task = get_task(config.task)
    sys.stdout.write(f"task={config.task.name} preset={config.preset}: sequences up to {task.l_max}\n\n")
    sys.stdout.write(_line(HEAD))
    for name in names("model"):
        found = cost(resolve([*words, f"model={name}", f"preset={config.preset}"]).model, task)
        flops = f"{found.flops_per_token / 1e6:.2f}"
        sys.stdout.write(
            _line((name, f"{found.parameters:,}", f"{found.mixer_parameters:,}", flops, f"{found.state_size:,}"))
        )
    sys.stdout.write(f"\n{NOTE}\n")
    return 0


def _line(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<22}" + "".join(f"{cell:>14}" for cell in cells[1:]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
