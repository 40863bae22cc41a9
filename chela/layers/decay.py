"""How fast linear attention forgets: fixed per head, learned per head, or read from each token.

Shapes: B batch, L length, D model width, H heads. Every decay is λ ∈ (0, 1], given as log λ ≤ 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes (arXiv 2108.12409, section 3): from steep to flat, 2^(−8h/H) for h = 1 … H.

    When H is no power of two, the next lower power's slopes come first, then every other one of twice that number.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


class HeadDecay(nn.Module):
    """A learned decay per head, log λ = −softplus(a) ≤ 0; heads start spread from near to far."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the reach 1 / (1 − λ) of the heads over about 4 … 1,000 tokens, on a log scale."""
        with torch.no_grad():
            self.raw.copy_(torch.log(torch.expm1(_spread(self.raw.numel()))))

    def forward(self) -> Tensor:
        """Return ``log_decay: (H,)``."""
        return -F.softplus(self.raw)


class TokenDecay(nn.Linear):
    """A decay per token and head, λ = σ(W x + b); the biases start spread as those of ``HeadDecay``, W ~ N(0, 0.1²)."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)

    def reset_parameters(self) -> None:
        """Draw W and set the biases."""
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.bias.copy_(-torch.log(torch.expm1(_spread(self.bias.numel()))))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., D)`` to log λ ``(..., H)``."""
        return F.logsigmoid(super().forward(x))


def from_previous(log_decay: Tensor, mask: Tensor | None = None) -> Tensor:
    """Give every token the value of the real token before it, so that the edge t−1 → t carries λ of token t−1.

    Args:
        log_decay: ``(B, L, H)``.
        mask: ``(B, L)`` bool, True = real token; padding is stepped over.

    Returns:
        ``(B, L, H)``; 0 where there is no token before.
    """
    if mask is None:
        return F.pad(log_decay[:, :-1], (0, 0, 1, 0))
    place = torch.arange(mask.shape[1], device=mask.device).masked_fill(~mask, -1)
    before = F.pad(place.cummax(1).values[:, :-1], (1, 0), value=-1)[..., None]
    found = log_decay.gather(1, before.clamp(min=0).expand_as(log_decay))
    return found.masked_fill(before < 0, 0.0)


def _spread(heads: int) -> Tensor:
    """Return −log λ from 10^−0.6 to 10^−3, log-spaced."""
    return torch.logspace(-0.6, -3, heads)
