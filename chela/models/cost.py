"""What a network costs before it is run: parameters, floating-point operations, and what it remembers.

Nothing is allocated: networks are built and traced with fake tensors, which have a shape and no values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from chela.models import build_model
from chela.schema import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of one network on one task.

    Attributes:
        parameters: Of the whole network.
        mixer_parameters: Of the mixers alone, where systems differ.
        flops_per_token: Forward, at the task's longest sequence: matrix products, attention, convolutions, FFTs
            (2.5·n·log2 n a real transform); element-wise work is not counted.
        state_size: Numbers that the causal form remembers of the longest sequence, all layers together.
    """

    parameters: int
    mixer_parameters: int
    flops_per_token: float
    state_size: int


def cost(config: ModelConfig, task: Any) -> Cost:
    """Work out the cost of the network that ``config`` describes; ``task`` as for ``build_model``."""
    with FakeTensorMode():
        model = build_model(config, task, seed=0).eval()
        sequences = 2 if task.pair else 1
        shape = (sequences, task.l_max)
        if task.vocab_size is None:
            inputs = torch.empty(*shape, task.input_dim)
        else:
            inputs = torch.empty(shape, dtype=torch.long)
        mask = torch.empty(shape, dtype=torch.bool)
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            model(inputs, mask)
    mixers: list[Any] = [block.mixer.layer for block in model.backbone.blocks]  # type: ignore[union-attr]
    return Cost(
        parameters=_count(model),
        mixer_parameters=sum(map(_count, mixers)),
        flops_per_token=counter.get_total_flops() / (sequences * task.l_max),
        state_size=sum(mixer.state_size(task.l_max) for mixer in mixers),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _formulas() -> dict[Any, Any]:
    """Say what is not registered with torch: linear attention is, in ``chela.ops.linear_attention.flops``."""
    return {
        torch.ops.chela.fft_conv: _fft_conv,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_attention,  # torch counts the GPU's only
    }


def _softmax_attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Two products with the L² weights."""
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (width + v[3])


def _fft_conv(u: Shape, kernel: Shape, kernel_back: Shape, skip: Shape | None = None, **_: Any) -> int:
    """Transform every channel of every sequence there and back, and every kernel once."""
    batch, length, channels = u
    n = length + max(kernel[1], kernel_back[1])
    transforms = 2 * batch + 1 + (kernel_back[1] > 0)
    return int(channels * (transforms * 2.5 * n * math.log2(n) + 3 * n * batch))
