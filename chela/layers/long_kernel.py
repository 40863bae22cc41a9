"""Long convolution kernels behind one interface: ``kernel(L) -> (forward (C, L), back (C, L-1) | None)``.

All are built for ``l_max`` and cropped to the length asked for. Lag 0 belongs to the forward kernel. The back kernel
starts at lag −1; a causal one has none. Shapes: C channels, L length, D directions (1 or 2), S scales of k parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.layers.kept import Keeping, Kept
from chela.layers.param_groups import mark

ALL = slice(None)
ONE_PRODUCT = 128
"""Up to this length all pieces of a kernel are made by one product."""
KERNEL_LR = 1e-3
"""The learning rate of long kernels and state matrices, smaller than the model's (arXiv 2210.09298, section 4)."""


class LongKernel(Keeping):
    """What the variants share: the crop, the length check and the cache.

    A variant marks the learning rate and weight decay of its parameters for ``chela.param_groups``. In eval mode
    without gradients the kernel is built once and kept; see ``Keeping``.

    Args:
        d_model: Number of channels C.
        l_max: Length the kernel is built for.
        causal: Without the back kernel.
    """

    extends_beyond_l_max = False
    """Whether a longer kernel than ``l_max`` is defined; else asking for one is an error."""

    def __init__(self, d_model: int, l_max: int, *, causal: bool = False) -> None:
        super().__init__()
        if l_max < 1:
            raise ValueError(f"{type(self).__name__}: expected l_max >= 1, got {l_max}")
        self.d_model, self.l_max, self.directions = d_model, l_max, 1 if causal else 2
        self._kept = Kept()

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.directions, self.d_model, *shape))

    def expect_length(self, length: int) -> None:
        """Refuse a length beyond ``l_max``, unless the variant declares an extension."""
        if length > self.l_max and not self.extends_beyond_l_max:
            raise ValueError(
                f"{type(self).__name__}: expected a length up to l_max={self.l_max}, got {length}; "
                "build the layer with a larger l_max or cut the sequence"
            )

    def build(self, length: int, channels: slice = ALL) -> Sequence[Tensor] | Tensor:
        """Return the kernels of all directions, each ``(C, length)``; the back one, from lag −1 on, may be shorter."""
        raise NotImplementedError

    def forward(self, length: int, channels: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """Return the forward kernel ``(C, length)`` and the back one ``(C, length - 1)``, or None when causal.

        Of the ``channels`` alone, if not of all: one process's, where a sequence is spread over several.

        Raises:
            ValueError: ``length`` is beyond ``l_max`` and the variant declares no extension.
        """
        self.expect_length(length)
        fresh = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if fresh or channels != ALL:
            self.renew()
            kernels = self.build(length, channels)
        else:
            longest = max(length, self.l_max)
            kernels = self._kept.of(self, lambda: self.build(longest), lambda kept: kept[0].shape[1] >= length)
        return _crop(kernels[0], length), _crop(kernels[1], max(length - 1, 0)) if self.directions == 2 else None

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.d_model}, l_max={self.l_max}, directions={self.directions}"


class MultiscaleKernel(LongKernel):
    """SGConv's kernel: few parameters near, the same number stretched over twice the length further out, and weaker.

    S = 1 + ⌈log2(l_max/k)⌉ pieces of k free parameters from N(0, 1); piece i is stretched ×1, 1, 2, 4 … by linear
    interpolation, scaled by 2^−i, and follows piece i − 1. The whole is divided by the L2 norm, per channel, that the
    uncropped kernel had at construction: a buffer, saved with the weights, not a function of them.

    Args:
        d_model: Number of channels C.
        l_max: Length the kernel is built for.
        causal: Without the back kernel.
        scale_size: Parameters k of a piece.
        initial_scale: Stretch all pieces 2^n times more, and have n fewer.
        decay_min: A piece is so many times weaker than the one before it, in the first channel.
        decay_max: The same in the last channel; between them evenly spaced.

    Source: arXiv 2210.09298, section 3.2. Stretching is a product with a constant ``(k, length)`` matrix, several times
    faster forward and backward than calling the interpolation.

    >>> forward, back = MultiscaleKernel(8, 100)(50)
    >>> tuple(forward.shape), tuple(back.shape)
    ((8, 50), (8, 49))
    """

    norm: Tensor
    weaker: Tensor
    stretch: Tensor

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        causal: bool = False,
        scale_size: int = 16,
        initial_scale: int = 0,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
    ) -> None:
        super().__init__(d_model, l_max, causal=causal)
        scales = 1 + max(0, math.ceil(math.log2(l_max / scale_size)) - initial_scale)
        self.weight = self._parameter(scales, scale_size)
        mark(self, lr=KERNEL_LR)
        self.register_buffer("norm", torch.ones(self.directions, d_model, 1, 1))
        weaker = torch.linspace(decay_min, decay_max, d_model)[:, None] ** -torch.arange(scales)
        self.register_buffer("weaker", weaker[..., None], persistent=False)
        stretched = _stretched(scales, scale_size, initial_scale)
        joined = torch.block_diag if l_max <= ONE_PRODUCT else lambda *matrices: torch.cat(matrices, dim=1)
        self.register_buffer("stretch", joined(*stretched), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the pieces from N(0, 1) and take the norm of the kernel they make."""
        nn.init.normal_(self.weight)
        self.norm.fill_(1.0)
        whole = self.stretch.shape[1]
        of_both = [self.build(whole + direction)[direction].norm(dim=1) for direction in range(self.directions)]
        self.norm.copy_(torch.stack(of_both)[..., None, None])

    def build(
        self, length: int, channels: slice = ALL, gain: Tensor | None = None, near: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Build each direction at its own length: cutting the last lag off would copy the whole gradient.

        The kernels are multiplied by ``gain: (C,)``; taps ``near``, ``(C, m)`` a direction, are added to their first
        lags.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            scale = self.weaker[channels] / self.norm[:, channels]
            scale = scale if gain is None else scale * gain[:, None, None]
            weight = self.weight[:, channels] * scale
            if self.l_max <= ONE_PRODUCT:
                weight = weight.flatten(2)[:, :, None]
            taps = [None] * self.directions if near is None else near
            join = _joined if torch.compiler.is_compiling() else _Joined.apply
            return [
                join(of_one, tap, self.stretch, self._lags(length - direction))
                for direction, (of_one, tap) in enumerate(zip(weight.unbind(), taps, strict=True))
            ]

    def _lags(self, length: int) -> list[int]:
        """Return how many lags each product gives, of those that a kernel of that length needs."""
        whole = self.stretch.shape[1]
        if self.l_max <= ONE_PRODUCT:
            return [min(length, whole)]
        scales = self.weight.shape[2]
        bounds = [0, *(min(whole >> (scales - 1 - i), length) for i in range(scales))]
        return [stop - start for start, stop in itertools.pairwise(bounds) if stop > start]


def _joined(weight: Tensor, near: Tensor | None, stretch: Tensor, lags: list[int]) -> Tensor:
    """Stretch and join n pieces ``weight: (C, n, k)`` to so many ``lags`` each, and add ``near: (C, m)`` to the first.

    ``stretch`` has the matrices of all pieces side by side.
    """
    matrices = torch.split(stretch[:, : sum(lags)], lags, dim=1)
    kernel = torch.cat([piece @ matrix for piece, matrix in zip(weight.unbind(1), matrices, strict=False)], dim=1)
    return kernel if near is None else added(kernel, near)


class _Joined(torch.autograd.Function):
    """``_joined``, with each product written where its lags lie."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, near: Tensor | None, stretch: Tensor, lags: list[int]) -> Tensor:
        kernel = weight.new_empty(len(weight), sum(lags))
        ctx.lags, ctx.matrices = lags, torch.split(stretch[:, : sum(lags)], lags, dim=1)
        ctx.shape, ctx.near = weight.shape, 0 if near is None else near.shape[1]
        for piece, matrix, out in zip(weight.unbind(1), ctx.matrices, torch.split(kernel, lags, dim=1), strict=False):
            torch.mm(piece, matrix, out=out)
        if near is not None:
            kernel[:, : ctx.near].add_(near[:, : kernel.shape[1]])
        return kernel

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        d_weight = grad.new_zeros(ctx.shape)
        for part, matrix, out in zip(
            torch.split(grad, ctx.lags, dim=1), ctx.matrices, d_weight.unbind(1), strict=False
        ):
            torch.mm(part, matrix.T, out=out)
        d_near = F.pad(grad[:, : ctx.near], (0, max(0, ctx.near - grad.shape[1]))) if ctx.near else None
        return d_weight, d_near, None, None


def added(kernel: Tensor, taps: Tensor) -> Tensor:
    """Add a short kernel ``(C, K)`` to the first lags of ``(C, L)``; lags beyond the sequence never occur."""
    taps = taps[:, : kernel.shape[1]]
    return kernel + F.pad(taps, (0, kernel.shape[1] - taps.shape[1]))


def _crop(kernel: Tensor, length: int) -> Tensor:
    return kernel if kernel.shape[1] == length else kernel[:, :length]


def _stretched(scales: int, size: int, initial_scale: int) -> list[Tensor]:
    """Make the constant matrices ``(k, k·2^…)`` that interpolate the pieces."""
    unit = torch.eye(size)[None]
    factors = [float(1 << (max(0, i - 1) + initial_scale)) for i in range(scales)]
    return [F.interpolate(unit, scale_factor=factor, mode="linear")[0] for factor in factors]
