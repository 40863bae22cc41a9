"""A system of your own, one file: ``chela train model=examples/my_mixer.yaml``."""

from typing import Annotated

import torch
from torch import nn


class Shift(nn.Module):
    """Blend every token with one before it, a learned share per channel.

    Args:
        d_model: Width D.
        distance: How many tokens before.
    """

    def __init__(self, d_model: int, *, distance: Annotated[int, {"ge": 1, "le": 1000}] = 1) -> None:
        super().__init__()
        self.distance = distance
        self.share = nn.Parameter(torch.zeros(d_model))
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, L, D), which is normed, to its update."""
        before = nn.functional.pad(x, (0, 0, self.distance, 0))[:, : x.shape[1]]
        return self.out(torch.lerp(x, before, self.share.sigmoid()))
