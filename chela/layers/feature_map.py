"""Feature maps φ of linear attention: non-negative features make the sum of the weights a safe divisor."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def elu_plus_one(x: Tensor) -> Tensor:
    """Return elu(x) + 1, positive (arXiv 2006.16236, equation 7)."""
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    """Return x; only without normalisation."""
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "silu": F.silu, "identity": identity}
