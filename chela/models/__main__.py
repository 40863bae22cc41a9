"""List the systems with their size on a task.

chela models                             on ListOps, at the preset of this machine
chela models task=listops preset=full    at another preset
chela models model=./mine.yaml           with a system of your own
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode

from chela.config.compose import is_file, names, resolve
from chela.config.schema import ModelConfig
from chela.config.words import command
from chela.core.errors import UsageError
from chela.models import build_model
from lra.tasks import get_task

ROW = "{:<20} {:>12} {:>12} {:>12}\n"
NOTE = "state: numbers that the causal form remembers of the longest sequence."


class Cost(NamedTuple):
    """The cost of one network on one task."""

    parameters: int
    mixer_parameters: int  # of the mixers alone, which is where systems differ
    state_size: int | None  # numbers that all layers' states have after the longest sequence; None: not known


def cost(config: ModelConfig, task: Any) -> Cost:
    """Return the cost of the network that ``config`` describes; ``task`` as for ``build_model``.

    Nothing is allocated: it is built of fake tensors, which have a shape and no values.
    """
    with FakeTensorMode():
        model = build_model(config, task, seed=0)
    mixers: list[Any] = model.backbone.mixers()
    remembered = [mixer.state_size(task.l_max) for mixer in mixers if hasattr(mixer, "state_size")]
    in_mixers = sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return Cost(total, in_mixers, sum(remembered) if remembered else None)


@command(None, f"{(__doc__ or '').strip()}\n\n{NOTE}", others=True, sections=("task", "model"))
def main(words: list[str]) -> int:
    """Print a line for each system of ``configs/model``, and for a file of one's own; return the exit status."""
    own = [word.partition("=")[2] for word in words if word.startswith("model=")]
    if not all(map(is_file, own)):
        raise UsageError("model: expected the YAML file of a system of your own, since all others are listed anyway")
    words = [word for word in words if not word.startswith("model=")]
    config = resolve(words)
    task = get_task(config.task)
    sys.stdout.write(f"task={config.task.name} preset={config.preset}: sequences up to {task.l_max}\n\n")
    sys.stdout.write(ROW.format("model", "parameters", "in mixers", "state"))
    for name in [*names("model"), *own]:
        chosen = resolve([*words, f"model={name}", f"preset={config.preset}"])
        numbers = ("–" if number is None else f"{number:,}" for number in cost(chosen.model, task))
        sys.stdout.write(ROW.format(chosen.model.name, *numbers))
    sys.stdout.write(f"\n{NOTE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
