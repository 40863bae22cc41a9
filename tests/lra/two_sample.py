"""A small network that tries to tell two sets of 32×32 images apart: a two-sample test (arXiv 1610.06545).

Everything is fixed: architecture, seed, schedule, split. If both sets have one distribution, the held-out accuracy is
that of fair coin throws, 0.5 with a standard deviation of 0.5 / √(number held out).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

TRAIN_SHARE = 0.75
EPOCHS = 8
BATCH = 50


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )


def held_out_accuracy(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """Train on three quarters of both sets, `(N, 32, 32)` uint8, and score the rest.

    Returns:
        The accuracy and on how many images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        n = min(len(ours), len(theirs))
        x = torch.from_numpy(np.concatenate([ours[:n], theirs[:n]]))[:, None].float() / 255
        y = torch.arange(2).repeat_interleave(n)
        order = torch.randperm(2 * n)
        train, test = order[: int(TRAIN_SHARE * 2 * n)], order[int(TRAIN_SHARE * 2 * n) :]
        network = _network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = EPOCHS * (len(train) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for step in range(steps):
            if step % (len(train) // BATCH) == 0:
                shuffled = train[torch.randperm(len(train))]
            at = step % (len(train) // BATCH) * BATCH
            batch = shuffled[at : at + BATCH]
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = network(x[test]).argmax(1) == y[test]
        return float(right.float().mean()), len(test)
