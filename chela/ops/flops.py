"""FLOP formulas of operators, for ``torch.utils.flop_counter``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


def count_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Count an operator by a formula of its arguments, tensors given as shapes, unless it is counted already."""
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)


def softmax_attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of softmax attention ``(B, H, L, ·)``: two products with the L² weights.

    >>> softmax_attention_flops((1, 1, 10, 4), (1, 1, 10, 4), (1, 1, 10, 6))
    2000
    """
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (width + v[3])


# Of the forms that ``scaled_dot_product_attention`` takes, torch counts those on a GPU.
count_flops(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, softmax_attention_flops)
