"""Pure functions on tensors, one folder per op."""

from chela.ops.backend import backends
from chela.ops.fft_conv import fft_conv
from chela.ops.short_conv import short_conv

__all__ = ["backends", "fft_conv", "short_conv"]
