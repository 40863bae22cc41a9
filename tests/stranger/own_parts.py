"""A mixer and a task from outside the package, as a stranger would write them; see ``docs/extend.md``."""

import dataclasses

import numpy as np
import torch
from torch import nn

from chela.core.options import option
from lra.tasks.base import InMemory, Task


class Average(nn.Module):
    """Mix each position with a decaying mean of what came before it.

    Args:
        d_model: Width of the stream.
        width: Width of the values.
        decay: What a step back costs.
    """

    def __init__(self, d_model: int, *, width: int = 8, decay: float = 0.5) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(d_model, width), nn.Linear(width, d_model)
        self.scale = nn.Parameter(torch.ones(width))
        self.decay = decay

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        place = torch.arange(x.shape[1])
        weights = (self.decay ** (place[:, None] - place).clamp(min=0)).tril()
        v = self.value(x) if mask is None else self.value(x) * mask.unsqueeze(-1)
        return self.out(weights.to(v) @ v * self.scale)


@dataclasses.dataclass
class Repeat(Task):
    """Name the symbol that stood here some positions ago; a label for each position."""

    length: int = option(16, "tokens of the longest sequence", ge=5)
    symbols: int = option(6, "symbols", ge=2)
    train: int = option(48, "sequences to train on", ge=1)

    name = title = "Repeat"
    version = "1"
    objective = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.l_max, self.num_classes, self.vocab_size = self.length, self.symbols, self.symbols + 1

    def dataset(self, split: str) -> InMemory:
        draw = np.random.default_rng(["train", "validation", "test"].index(split))
        records = []
        for _ in range(self.train if split == "train" else 29):
            sequence = draw.integers(1, self.symbols + 1, draw.integers(5, self.length + 1))
            records.append((sequence, np.concatenate([np.full(2, -100), sequence[:-2] - 1])))
        return InMemory(records)
