"""A task of your own, one file: ``chela train task=examples/my_task.yaml``."""

from dataclasses import dataclass

import numpy as np

from chela.core.options import option
from lra.tasks.base import InMemory, Task


@dataclass
class Echo(Task):
    """At each position, the symbol that came some positions before."""

    lag: int = option(2, "how many positions before", ge=1, le=16)
    train: int = option(2000, "training sequences", ge=1)

    objective = "tokens"
    num_classes, vocab_size, l_max = 9, 9, 32

    def dataset(self, split: str) -> InMemory:
        """Draw symbols 1 to 8; 0 is padding. The first positions have nothing to echo: −100, not counted."""
        splits = {"train": self.train, "validation": 200, "test": 200}
        rng = np.random.default_rng(list(splits).index(split))
        symbols = rng.integers(1, 9, (splits[split], self.l_max))
        labels = np.pad(symbols, ((0, 0), (self.lag, 0)), constant_values=-100)[:, : self.l_max]
        return InMemory(list(zip(symbols, labels, strict=True)))
