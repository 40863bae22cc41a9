"""Long convolution kernels behind one interface: ``kernel(L) -> (forward (C, L), back (C, L-1) | None)``.

All are built for ``l_max`` and cropped to the length asked for. Lag 0 belongs to the forward kernel. The back kernel
starts at lag −1; a causal one has none. Shapes: C channels, L length, D directions (1 or 2), S scales of k parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.param_groups import mark

ALL = slice(None)
KERNEL_LR = 1e-3
"""The learning rate of long kernels and state matrices, smaller than the model's (arXiv 2210.09298, section 4)."""


T = TypeVar("T")


class Kept:
    """A cache of something that is made of a module's parameters, for as long as these are not written to."""

    value: Any = None
    made_of: Any = None

    def of(self, module: nn.Module, make: Callable[[], T], fits: Callable[[T], bool] = lambda value: True) -> T:
        """Return what ``make`` gave; in eval mode without gradients it is made anew only if it no longer fits."""
        if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        tensors = itertools.chain(module.parameters(), module.buffers())
        made_of = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
        if self.value is None or self.made_of != made_of or not fits(self.value):
            self.value, self.made_of = make(), made_of
        return self.value  # type: ignore[no-any-return]


class Keeping(nn.Module):
    """A module with ``Kept`` among its attributes; ``train()`` and ``eval()`` drop it, as after a write to ``data``."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what is kept."""
        for value in vars(self).values():
            if isinstance(value, Kept):
                value.value = None
        return super().train(mode)


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
    mirrored: Tensor

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
        unit, first = torch.eye(scale_size)[None], 1 << initial_scale
        factors = [first, *(first << i for i in range(scales - 1))]
        stretch = [F.interpolate(unit, scale_factor=float(factor), mode="linear")[0] for factor in factors]
        self.register_buffer("stretch", torch.cat(stretch, dim=1), persistent=False)  # (k, L): lags side by side
        self.register_buffer("mirrored", self.stretch.flip(1), persistent=False)
        self.ends = [scale_size * total for total in itertools.accumulate(factors)]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the pieces from N(0, 1) and take the norm of the kernel they make."""
        nn.init.normal_(self.weight)
        self.norm.fill_(1.0)
        self.norm.copy_(torch.stack([whole.norm(dim=1) for whole in self._all()])[..., None, None])

    def build(self, length: int, channels: slice = ALL) -> list[Tensor]:
        """Join the stretched pieces."""
        return [whole[channels, : max(length - direction, 0)] for direction, whole in enumerate(self._all())]

    def _all(self) -> list[Tensor]:
        with torch.autocast(self.weight.device.type, enabled=False):
            spans = list(itertools.pairwise([0, *self.ends]))
            pieces = [zip(of_one.unbind(1), spans, strict=True) for of_one in self.scaled()]
            return [torch.cat([p @ self.stretch[:, a:b] for p, (a, b) in of_one], dim=1) for of_one in pieces]

    def scaled(self, channels: slice = ALL) -> Tensor:
        """Return the parameters ``(D, C, S, k)`` of the channels, divided by the norm, each piece as weak as it is."""
        if channels == ALL:
            return self.weight * (self.weaker / self.norm)
        return self.weight[:, channels] * (self.weaker[channels] / self.norm[:, channels])

    def near(self, lags: int) -> Tensor:
        """Return the constant matrix ``(S·k, lags)`` that makes the first lags of a direction of all its parameters."""
        ends = [min(end, lags) for end in (0, *self.ends)]
        pieces = (self.stretch[:, a:b] for a, b in itertools.pairwise(ends))
        matrix: Tensor = torch.block_diag(*pieces)  # type: ignore[no-untyped-call]
        return F.pad(matrix, (0, lags - matrix.shape[1]))

    def far(self, direction: int, length: int, beyond: int) -> Iterator[tuple[slice, Tensor, int]]:
        """Yield what makes the lags of a direction from ``beyond`` on, below ``length``, in the order of lags.

        Columns of all parameters ``(C, D·S·k)``, the matrix that makes lags of them, and the first of these.
        """
        scales, size = self.weight.shape[2:]
        for i in reversed(range(scales)) if direction else range(scales):
            start = max(self.ends[i - 1] if i else 0, beyond - direction)
            stop = min(self.ends[i], length - direction)
            if start < stop:
                first = (direction * scales + i) * size
                matrix = self.mirrored[:, -stop : -start or None] if direction else self.stretch[:, start:stop]
                yield slice(first, first + size), matrix, -stop if direction else start


def _crop(kernel: Tensor, length: int) -> Tensor:
    return kernel if kernel.shape[1] == length else kernel[:, :length]
