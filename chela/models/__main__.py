"""List the systems with their size and cost on a task.

chela models                             on ListOps, at the preset of this machine
chela models task=listops preset=full    at another preset
chela models model=./mine.yaml           with a system of your own
"""

from __future__ import annotations

import sys
import textwrap

from chela.config.compose import is_file, names, resolve
from chela.config.words import command
from chela.core.errors import UsageError

HEAD = ("model", "parameters", "in mixers", "MFLOPs", "state")
NOTE = (
    "MFLOPs: forward, a token, at the longest sequence; matrix products, attention, convolutions and FFTs. "
    "state: numbers that the causal form remembers of the longest sequence."
)


@command(None, f"{(__doc__ or '').strip()}\n\n{NOTE}", others=True, sections=("task", "model"))
def main(words: list[str]) -> int:
    """Print a line for each system of ``configs/model``, and for a file of one's own; return the exit status."""
    own = [word.partition("=")[2] for word in words if word.startswith("model=")]
    if not all(map(is_file, own)):
        raise UsageError("model: expected the YAML file of a system of your own, since all others are listed anyway")
    words = [word for word in words if not word.startswith("model=")]
    config = resolve(words)
    from chela.models.cost import cost
    from lra.tasks import get_task

    task = get_task(config.task)
    sys.stdout.write(f"task={config.task.name} preset={config.preset}: sequences up to {task.l_max}\n\n")
    rows = [HEAD]
    for name in [*names("model"), *own]:
        chosen = resolve([*words, f"model={name}", f"preset={config.preset}"])
        found = cost(chosen.model, task)
        flops = f"{found.flops_per_token / 1e6:.2f}"
        state = "–" if found.state_size is None else f"{found.state_size:,}"
        rows.append((chosen.model.name, f"{found.parameters:,}", f"{found.mixer_parameters:,}", flops, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        line = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        sys.stdout.write("  ".join([f"{name:<{widths[0]}}", *line]) + "\n")
    sys.stdout.write(f"\n{textwrap.fill(NOTE, 80)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
