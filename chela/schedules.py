"""Learning-rate schedules: a new one is a line in ``SCHEDULES``, and the option's choices follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chela.schema import OptimizerConfig

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "cosine_tenth": lambda left: 0.1 + 0.45 * (1 - math.cos(math.pi * left)),
    "constant": lambda left: 1.0,
}
"""Share of the peak rate, given the share of the steps after the warm-up that is left."""


def lr_factor(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Return the share of the peak rate at ``step`` (from 0): a pure function, so that nothing has to be restored.

    >>> from chela.schema import OptimizerConfig
    >>> config = OptimizerConfig(warmup_steps=10, schedule="linear")
    >>> [round(lr_factor(config, step, 110), 2) for step in (0, 9, 10, 60, 109)]
    [0.1, 1.0, 1.0, 0.5, 0.01]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return SCHEDULES[config.schedule]((max_steps - step) / max(1, max_steps - config.warmup_steps))
