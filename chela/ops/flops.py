"""FLOP formulas of operators, for ``torch.utils.flop_counter``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

Shape = Sequence[int]


def count_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Count an operator by a formula of its arguments, tensors given as shapes, unless it is counted already."""
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)


# Of the forms that ``scaled_dot_product_attention`` takes, torch counts those on a GPU.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
count_flops(_ON_CPU, lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]
