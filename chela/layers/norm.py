"""Normalisation, with one signature: ``norm(x, mask)`` on ``x: (B, L, C)`` and ``mask: (B, L)``, True = real token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chela.layers.stages import is_recomputed
from chela.ops.backend import accumulation_dtype
from chela.ops.padding import check_mask, may_look, zero_padding


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv 1607.06450); each token by itself, so the mask does not matter."""

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
        square = x.to(accumulation_dtype(x.dtype)).square()  # one in fp16 overflows from 256 on
        return (x * torch.rsqrt(square.mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class MaskedBatchNorm(nn.Module):
    """Batch norm whose statistics are those of the real tokens, over all processes.

    N processes give what one gives on the whole batch (``torch.nn.SyncBatchNorm`` refuses CPU tensors and knows no
    mask). Statistics are kept in at least float32, under autocast too; ``momentum`` is the weight of the new batch in
    the running ones. What padding holds changes nothing on real tokens. The output at padding means nothing.
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
        if mask is not None:
            check_mask(x, mask)
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(self.bias - self.running_mean * scale, x, scale).to(x.dtype)
        if mask is None and x.numel() > len(self.weight) and x.dtype == self.weight.dtype and not _several_processes():
            return self._by_torch(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, mask, self.eps)  # type: ignore[no-untyped-call]
        if is_recomputed():
            return y  # type: ignore[no-any-return]
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y  # type: ignore[no-any-return]

    def _by_torch(self, x: Tensor) -> Tensor:
        """Normalise by PyTorch's own batch norm: it takes half the time, but knows no padding and no other process."""
        moments = (self.running_mean, self.running_var)
        if is_recomputed():
            moments = (self.running_mean.clone(), self.running_var.clone())  # autograd keeps as many as the first time
        tokens, on = x.flatten(0, -2), torch.backends.cudnn.enabled
        y = torch.batch_norm(tokens, self.weight, self.bias, *moments, True, self.momentum, self.eps, on)
        return y.view_as(x)


class _Normalise(torch.autograd.Function):
    """Batch norm by the moments of the real tokens of all processes; every token, real or not, is normalised.

    By autograd's own operations it would pass over ``(B, L, C)`` three times as often. The variance takes a second
    pass, about the mean: E[x²] − E[x]² loses its digits when the mean is large.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y like x, mean ``(C,)``, biased variance ``(C,)`` and the count of real tokens."""
        tokens = x.to(accumulation_dtype(x.dtype)).flatten(0, -2)
        real = None if mask is None else mask.flatten().to(tokens.dtype)
        tokens, total = _summed(tokens, real)
        count = tokens.new_tensor([len(tokens)]) if real is None else real.sum().view(1)
        sums = _over_processes(torch.cat([total, count]))
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        centred = tokens - mean
        var = _over_processes(_summed(centred.square(), real)[1]) / count
        deviation = torch.rsqrt(var + eps)
        ctx.save_for_backward(centred, weight, deviation, real, count)
        ctx.mark_non_differentiable(mean, var, count)
        return torch.addcmul(bias, centred, weight * deviation).view_as(x).to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        centred, weight, deviation, real, count = ctx.saved_tensors
        grad = d_y.flatten(0, -2).to(centred.dtype)
        d_bias, d_scale = grad.sum(0), (grad * centred).sum(0)
        scale = weight * deviation
        # every process's loss depends on the moments
        of_mean, of_scale = _over_processes(torch.stack([d_bias, d_scale])) * (-scale / count)
        d_x = torch.addcmul(of_mean, centred, of_scale * deviation.square())  # through the moments
        if real is not None:
            d_x *= real[:, None]
        d_x = d_x.addcmul_(grad, scale).view_as(d_y).to(d_y.dtype)
        return d_x, (d_scale * deviation).to(weight.dtype), d_bias.to(weight.dtype), None, None


def _summed(tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens ``(N, C)`` with finite padding, and their sum over the real ones, in their dtype.

    ``real: (N,)`` is 1 at real tokens and 0 at padding. The product with it takes a tenth of the time of a copy with
    zeros there, but 0·NaN is NaN: the copy is made if the sum is not finite, or on a GPU, where to look costs more.
    """
    if real is None:
        return tokens, tokens.sum(0)
    with torch.autocast(tokens.device.type, enabled=False):  # it would round the factors to bf16 or fp16
        if may_look(tokens):
            total = real @ tokens
            if math.isfinite(total.sum()):
                return tokens, total
        tokens = zero_padding(tokens, real > 0)
        return tokens, real @ tokens


def _over_processes(value: Tensor) -> Tensor:
    if _several_processes():
        torch.distributed.all_reduce(value)
    return value


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm, "scale": ScaleNorm, "batch": MaskedBatchNorm}
