"""Pure functions on tensors, one folder per op."""

from chela.ops.backend import backends
from chela.ops.fft_conv import FFTConvState, StepKernel, fft_conv, fft_conv_prefill, fft_conv_step
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.sequence_parallel import sequence_parallel
from chela.ops.short_conv import short_conv, short_conv_step

__all__ = [
    "FFTConvState",
    "LinearAttentionState",
    "StepKernel",
    "backends",
    "fft_conv",
    "fft_conv_prefill",
    "fft_conv_step",
    "linear_attention",
    "linear_attention_step",
    "sequence_parallel",
    "short_conv",
    "short_conv_step",
]
