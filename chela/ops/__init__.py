"""Pure functions on tensors, one folder per op."""

from chela.ops.backend import backends
from chela.ops.fft_conv import fft_conv
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.short_conv import short_conv

__all__ = ["LinearAttentionState", "backends", "fft_conv", "linear_attention", "linear_attention_step", "short_conv"]
