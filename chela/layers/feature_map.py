"""Feature maps φ of linear attention: non-negative features make the sum of the weights a safe divisor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.param_groups import mark


def elu_plus_one(x: Tensor) -> Tensor:
    """Return elu(x) + 1, positive (arXiv 2006.16236, equation 7)."""
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    """Return x; only without normalisation."""
    return x


def shifted_silu(x: Tensor) -> Tensor:
    """Return (SiLU(x) + 0.5) / ‖SiLU(x) + 0.5‖ over the last dimension, positive (arXiv 2502.16249)."""
    return F.normalize(F.silu(x) + 0.5, dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "silu": F.silu, "identity": identity}


class HedgehogFeatureMap(nn.Module):
    """Hedgehog's learned map, φ(x) = softmax([W x + b, −W x − b]) per head (arXiv 2402.04347, section 4.1).

    Starts at W = 1, b = 0. Weight decay would pull every token to the same features, so there is none here.

    Args:
        heads: Attention heads H.
        width: Width Z of one head.

    >>> phi = HedgehogFeatureMap(2, 4)(torch.randn(3, 10, 2, 4))
    >>> tuple(phi.shape), bool((phi > 0).all())
    ((3, 10, 2, 8), True)
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width))
        self.bias = nn.Parameter(torch.empty(heads, width))
        mark(self, "weight", "bias", weight_decay=0.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from the identity."""
        self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., H, Z)`` to positive features ``(..., H, 2Z)`` that sum to 1."""
        y = torch.einsum("...hz,hyz->...hy", x, self.weight) + self.bias
        return torch.cat([y, -y], dim=-1).softmax(-1)
