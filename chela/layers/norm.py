"""Normalisation, with one signature: ``norm(x, mask)`` on ``x: (B, L, C)`` and ``mask: (B, L)``, True = real token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv 1607.06450); it looks at one token at a time, so the mask does not matter."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise each token of ``x: (B, L, C)``."""
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv 1910.07467)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise each token of ``x: (B, L, C)``."""
        return super().forward(x)


class ScaleNorm(nn.Module):
    """Root-mean-square norm with one gain for all channels (arXiv 1910.05895, section 3; MEGA's text tasks)."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise each token of ``x: (B, L, C)``."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class MaskedBatchNorm(nn.Module):
    """Batch norm whose statistics are those of the real tokens, over all processes.

    In training the mean and variance are summed over processes, so that N processes give what one gives on the whole
    batch (``torch.nn.SyncBatchNorm`` refuses CPU tensors and knows no mask). Padding is normalised too: whoever needs
    zeros there puts them there afterwards.

    Args:
        d_model: Channels C.
        momentum: Weight of the new batch in the running statistics.
        eps: Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d_model: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gain 1, bias 0 and forget the running statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x: (B, L, C)`` by the statistics of its real tokens (training) or the running ones (eval)."""
        if self.training:
            mean, var, count = _masked_moments(x, mask)
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias - mean * scale, x, scale).to(x.dtype)


def _masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean ``(C,)``, biased variance ``(C,)`` and count of the real tokens, over all processes.

    Two passes: the variance is taken about the mean, since E[x²] − E[x]² cancels when the mean is large.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    weight = torch.ones_like(wide[..., :1]) if mask is None else mask.unsqueeze(-1).to(wide.dtype)
    count = _sum_over_processes(weight.sum()).clamp(min=1)
    mean = _sum_over_processes((wide * weight).sum((0, 1))) / count
    var = _sum_over_processes(((wide - mean).square() * weight).sum((0, 1))) / count
    return mean, var, count


class _Sum(torch.autograd.Function):
    """Sum over the processes of a run; the loss of each depends on every term, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        torch.distributed.all_reduce(total)
        return total


def _sum_over_processes(value: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total


NORMS: dict[str, type[nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "scale": ScaleNorm,
    "batch": MaskedBatchNorm,
}


def make_norm(name: str, d_model: int) -> nn.Module:
    """Build the norm called ``name`` for ``d_model`` channels."""
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {sorted(NORMS)}, got {name!r}")
    return NORMS[name](d_model)
