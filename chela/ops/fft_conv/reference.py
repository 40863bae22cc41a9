"""The definition of the long convolution, as a direct sum: O(L·K), for tests and for reading."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def fft_conv_reference(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Add up the shifted inputs one lag at a time, in float64.

    Args:
        u: ``(B, L, C)``.
        kernel: ``(C, K)``, lag s ≥ 0 in ``kernel[:, s]``.
        kernel_back: ``(C, K_back)``, lag −(s + 1) in ``kernel_back[:, s]``; K_back = 0 for a causal convolution.
        skip: ``(C,)`` or None.

    Returns:
        ``(B, L, C)`` in the dtype of u.
    """
    length = u.shape[1]
    x, forward, back = u.double(), kernel.double(), kernel_back.double()
    y = x * 0 if skip is None else x * skip.double()
    for lag in range(min(kernel.shape[1], length)):
        y = y + F.pad(x[:, : length - lag] * forward[:, lag], (0, 0, lag, 0))
    for lag in range(1, min(kernel_back.shape[1], length - 1) + 1):
        y = y + F.pad(x[:, lag:] * back[:, lag - 1], (0, 0, 0, lag))
    return y.to(u.dtype)
