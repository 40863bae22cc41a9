"""What a network costs before it is run: parameters, floating-point operations, state.

Nothing is allocated: networks are built and run with fake tensors, which have a shape and no values.
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
    """The cost of one network on one task."""

    parameters: int
    mixer_parameters: int  # of the mixers alone, which is where systems differ
    # Forward, at the task's longest sequence: matrix products, attention, convolutions, FFTs (2.5·n·log2 n a real
    # transform); element-wise work is not counted.
    flops_per_token: float
    state_size: int | None  # numbers that all layers' states have after the longest sequence; None: not known


def cost(config: ModelConfig, task: Any) -> Cost:
    """Work out the cost of the network that ``config`` describes; ``task`` as for ``build_model``."""
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
        parameters=_count(model),
        mixer_parameters=sum(map(_count, mixers)),
        flops_per_token=counter.get_total_flops() / (rows * task.l_max),
        state_size=sum(remembered) if remembered else None,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
