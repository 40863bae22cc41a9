"""List the systems with their size and cost on a task.

chela models                             on ListOps, at the preset of this machine
chela models task=listops preset=full    at another preset
chela models model=./mine.yaml           with a system of your own
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from chela.config.compose import resolve
from chela.config.groups import is_file, names
from chela.config.schema import ModelConfig
from chela.config.words import command
from chela.core.errors import UsageError
from chela.models import build_model
from lra.tasks import get_task

ROW = "{:<20} {:>12} {:>12} {:>9} {:>12}\n"
NOTE = (
    "MFLOPs: forward, a token, at the longest sequence; matrix products, attention, convolutions and FFTs. "
    "state: numbers that the causal form remembers of the longest sequence."
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one network on one task."""

    parameters: int
    mixer_parameters: int  # of the mixers alone, which is where systems differ
    # Forward, at the task's longest sequence: matrix products, attention, convolutions, FFTs (2.5·n·log2 n a real
    # transform); element-wise work is not counted.
    flops_per_token: float
    state_size: int | None  # numbers that all layers' states have after the longest sequence; None: not known


def cost(config: ModelConfig, task: Any) -> Cost:
    """Work out the cost of the network that ``config`` describes; ``task`` as for ``build_model``.

    Nothing is allocated: it is built and run with fake tensors, which have a shape and no values.
    """
    rows = 2 if task.pair else 1
    with FakeTensorMode():
        model = build_model(config, task, seed=0).eval()
        with FlopCounterMode(display=False) as counter:
            symbols = torch.zeros(rows, task.l_max, dtype=torch.long)
            features = torch.empty(rows, task.l_max, task.input_dim)
            model(features if task.vocab_size is None else symbols, symbols.bool())
    mixers: list[Any] = model.backbone.mixers()
    remembered = [mixer.state_size(task.l_max) for mixer in mixers if hasattr(mixer, "state_size")]
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mixer_parameters=sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters()),
        flops_per_token=counter.get_total_flops() / (rows * task.l_max),
        state_size=sum(remembered) if remembered else None,
    )


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
    sys.stdout.write(ROW.format("model", "parameters", "in mixers", "MFLOPs", "state"))
    for name in [*names("model"), *own]:
        chosen = resolve([*words, f"model={name}", f"preset={config.preset}"])
        found = cost(chosen.model, task)
        flops, state = (
            f"{found.flops_per_token / 1e6:.2f}",
            "–" if found.state_size is None else f"{found.state_size:,}",
        )
        sizes = f"{found.parameters:,}", f"{found.mixer_parameters:,}"
        sys.stdout.write(ROW.format(chosen.model.name, *sizes, flops, state))
    sys.stdout.write(f"\n{textwrap.fill(NOTE, 80)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
