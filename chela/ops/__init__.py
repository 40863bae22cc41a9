"""Pure functions on tensors, one folder per op."""

from chela.ops.backend import backends
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step

__all__ = ["LinearAttentionState", "backends", "linear_attention", "linear_attention_step"]
