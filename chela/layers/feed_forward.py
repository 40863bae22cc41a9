"""The position-wise half of every block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Two linear maps with SiLU between: ``(B, L, D)`` to ``(B, L, D)``; O(L·D·d_ff) time.

    Args:
        d_model: Width D.
        d_ff: Hidden width.
        dropout: On the hidden units.
    """

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of ``x: (B, L, D)``."""
        out: Tensor = self.down(self.dropout(F.silu(self.up(x))))
        return out
