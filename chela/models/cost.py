"""What a network costs before it is run: parameters, floating-point operations, and what it remembers.

Nothing is allocated: networks are built and traced with fake tensors, which have a shape and no values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from chela.config.schema import ModelConfig
from chela.models import build_model


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one network on one task.

    Attributes:
        parameters: Of the whole network.
        mixer_parameters: Of the mixers alone, which is where systems differ.
        flops_per_token: Forward, at the task's longest sequence: matrix products, attention, convolutions, FFTs
            (2.5·n·log2 n a real transform); element-wise work is not counted.
        state_size: Numbers that the causal form remembers of the longest sequence, all layers together; None when the
            system does not say.
    """

    parameters: int
    mixer_parameters: int
    flops_per_token: float
    state_size: int | None


def cost(config: ModelConfig, task: Any) -> Cost:
    """Work out the cost of the network that ``config`` describes; ``task`` as for ``build_model``."""
    built = config.depth if ":" in config.mixer.name else 1  # the blocks of a system of this package cost alike
    with FakeTensorMode():
        model = build_model(dataclasses.replace(config, depth=built), task, seed=0).eval()
        sequences = 2 if task.pair else 1
        shape = (sequences, task.l_max)
        symbols = torch.empty(shape, dtype=torch.long)
        inputs = torch.empty(*shape, task.input_dim) if task.vocab_size is None else symbols
        with FlopCounterMode(display=False) as counter:
            model(inputs, symbols.bool())
    mixers: list[Any] = model.backbone.mixers()
    remembered = [mixer.state_size(task.l_max) for mixer in mixers if hasattr(mixer, "state_size")]
    more, times = config.depth - built, config.depth // built
    of_a_block = counter.get_flop_counts()[f"{type(model).__name__}.backbone.blocks.0"]
    flops = counter.get_total_flops() + more * sum(of_a_block.values())
    return Cost(
        parameters=_count(model) + more * _count(model.backbone.blocks[0]),
        mixer_parameters=times * sum(map(_count, mixers)),
        flops_per_token=flops / (sequences * task.l_max),
        state_size=times * sum(remembered) if remembered else None,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
