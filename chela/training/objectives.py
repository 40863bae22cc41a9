"""What is learned and how it is scored: a label for a sequence, or a label for each position.

An objective owns the loss, what is counted, the columns of ``metrics.csv``, and the score that picks the best
checkpoint and stands in a table. Which head a network gets for it stands in ``chela.models``. Shapes: B batch, L
length, K classes or symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from chela.ops.sequence_parallel import current
from lra.tasks.base import IGNORED


@dataclass(frozen=True)
class Score:
    """A column that picks the best checkpoint, and how a table shows it."""

    name: str
    unit: str
    scale: float  # what it is multiplied by for that
    digits: int  # after the point
    best: str  # "max" or "min"

    def better(self, new: dict[str, Any], old: dict[str, Any] | None) -> bool:
        """Whether the values of a validation beat those of another; equal ones do not."""
        sign = 1 if self.best == "max" else -1
        return old is None or sign * new[self.name] > sign * old[self.name]

    def text(self, values: dict[str, Any]) -> str:
        """Write the score with its unit.

        >>> SCORES["accuracy"].text({"accuracy": 0.5036}), SCORES["loss"].text({"loss": 1.5})
        ('accuracy 50.36%', 'loss 1.5000 nats')
        """
        unit = self.unit if self.unit == "%" else f" {self.unit}"
        return f"{self.name} {self.scale * values[self.name]:.{self.digits}f}{unit}"


SCORES = {"accuracy": Score("accuracy", "%", 100, 2, "max"), "loss": Score("loss", "nats", 1, 4, "min")}
# Where each position has a label, the loss in bits stands beside that in nats.
COLUMNS = {"classification": ("loss", "accuracy"), "tokens": ("loss", "bits", "accuracy")}


class Objective:
    """Cross-entropy over the targets that count, as a task names it: one a sequence, or one a position.

    ``columns`` are logged; ``score``, one of ``SCORES``, picks the best checkpoint.
    """

    def __init__(self, task: Any) -> None:
        self.columns, self.score = COLUMNS[task.objective], SCORES[task.score]

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Average over the targets of ``scores: (B, K)`` or ``(B, L, K)`` and ``labels: (B,)`` or ``(B, L)``.

        Where P processes have a piece of each sequence, the average of their P losses is that over all targets, as that
        of their gradients is.
        """
        total = _sum_of_losses(scores, labels)
        return total / _targets_of_share(labels).clamp(min=1).to(total.dtype)

    @torch.no_grad()
    def count(self, scores: Tensor, labels: Tensor, loss: Tensor | None = None) -> Tensor:
        """Return the sum of the losses, the targets hit and the targets, as ``(3,)`` float64."""
        piece = current()
        if piece is not None and labels.ndim == 1 and piece.rank:
            return labels.new_zeros(3, dtype=torch.float64)  # the first of those that share a sequence counts it
        total = _sum_of_losses(scores.float(), labels) if loss is None else loss * _targets_of_share(labels)
        found = (scores.argmax(-1) == labels).sum().double()
        return torch.stack([total.double(), found, (labels != IGNORED).sum().double()])

    def values(self, counts: Sequence[float]) -> dict[str, float]:
        """Return the columns, and the number of targets as "count", from what was counted."""
        total, correct, targets = counts
        loss = total / max(targets, 1.0)
        found = {"loss": loss, "bits": loss / math.log(2), "accuracy": correct / max(targets, 1.0)}
        return {name: found[name] for name in self.columns} | {"count": targets}


class Counts(Metric):
    """Sums of what ``Objective.count`` gives, of one batch after the other; ``compute`` adds those of all processes."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add counts of any one shape, the same in every call."""
        self.sums = self.sums.to(counts.device) + counts

    def compute(self) -> Tensor:
        """Return the sums."""
        return self.sums


def above_majority(values: dict[str, float], majority: float) -> bool:
    """Whether an accuracy over "count" targets is more than luck with the most frequent class, of share ``majority``.

    It is when it is ahead by more than one point and by more than three standard errors.
    """
    error = math.sqrt(majority * (1 - majority) / max(values["count"], 1.0))
    return values["accuracy"] > majority + max(0.01, 3 * error)


def _sum_of_losses(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _targets_of_share(labels: Tensor) -> Tensor:
    """Count the targets of ``labels``; of a piece of sequences, an equal share of all the pieces' targets."""
    piece, targets = current(), (labels != IGNORED).sum().double()
    return targets if piece is None or labels.ndim == 1 else piece.gather(targets).sum() / piece.count
