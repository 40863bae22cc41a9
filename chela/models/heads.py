"""From encoded sequences to class scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.models.backbone import Backbone


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average ``x: (B, L, D)`` over the real tokens of ``mask: (B, L)``: ``(B, D)``; a row with none gives zeros."""
    if mask is None:
        return x.mean(1)
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class ClassifierHead(nn.Module):
    """``(B, D)`` to class scores ``(B, classes)``, through one hidden layer (none when ``d_head`` is 0)."""

    def __init__(self, d_in: int, d_head: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_in, d_head) if d_head else None
        self.out = nn.Linear(d_head or d_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score ``x: (B, D)``."""
        scores: Tensor = self.out(x if self.hidden is None else F.silu(self.hidden(x)))
        return scores


class Classifier(nn.Module):
    """Mean over real tokens, then a head: inputs ``(B, L)`` or ``(B, L, F)`` to scores ``(B, classes)``."""

    def __init__(self, backbone: Backbone, d_model: int, d_head: int, num_classes: int) -> None:
        super().__init__()
        self.built_from: Any = None
        self.backbone = backbone
        self.head = ClassifierHead(d_model, d_head, num_classes)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score each sequence."""
        scores: Tensor = self.head(masked_mean(self.backbone(inputs, mask), mask))
        return scores


class PairClassifier(nn.Module):
    """One tower for both documents: inputs ``(2B, L)``, first all the first ones, to scores ``(B, classes)``.

    Args:
        backbone: The tower.
        d_model: Width D.
        d_head: Hidden width of the head.
        num_classes: Classes.
        features: "nli" gives the head [a, b, a−b, a⊙b] (S4's), "concat" [a, b] (MEGA's).
    """

    def __init__(self, backbone: Backbone, d_model: int, d_head: int, num_classes: int, features: str = "nli") -> None:
        super().__init__()
        if features not in ("nli", "concat"):
            raise ValueError(f"features: expected 'nli' or 'concat', got {features!r}")
        self.built_from: Any = None
        self.backbone = backbone
        self.features = features
        self.head = ClassifierHead(d_model * (4 if features == "nli" else 2), d_head, num_classes)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score each pair."""
        a, b = masked_mean(self.backbone(inputs, mask), mask).chunk(2)
        pair = [a, b, a - b, a * b] if self.features == "nli" else [a, b]
        scores: Tensor = self.head(torch.cat(pair, dim=-1))
        return scores
