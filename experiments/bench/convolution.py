"""The long convolution, forward + backward, against autograd through rfft and irfft.

CPU, float32, causal, K = L, with glibc's default allocator and with one that keeps its memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops import fft_conv
from experiments.bench import Options, Row, timing
from experiments.bench.timing import Step, interleaved, peak_memory, training_step

SIZES = ((4, 128, 1024), (2, 128, 4096), (1, 128, 16384))


def run(options: Options) -> list[Row]:
    """Measure with both allocators."""
    sizes = SIZES[:1] if options.quick else SIZES
    first = timing.allocator(keep=False)
    rows = [whole_row(*size, first) for size in sizes]
    second = timing.allocator(keep=True)
    if second != first:
        rows += [whole_row(*size, second) for size in sizes]
    return rows


def plain(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve u ``(B, L, C)`` with kernel ``(C, L)`` as one writes it down."""
    length = u.shape[1]
    n = 2 * length
    product: Tensor = torch.fft.rfft(u.transpose(1, 2), n=n) * torch.fft.rfft(kernel, n=n)
    y: Tensor = torch.fft.irfft(product, n=n)[..., :length]
    return y.transpose(1, 2)


def transforms_and_products(batch: int, channels: int, length: int) -> Step:
    """Return the transforms and products of forward and backward, and nothing else."""
    n = 2 * length
    rows, kernel = torch.randn(batch, channels, n), torch.randn(channels, n)
    spectrum, of_kernel = torch.fft.rfft(rows), torch.fft.rfft(kernel)

    def work() -> None:
        for _ in range(3):  # u in the forward, u and the output's gradient in the backward
            torch.fft.rfft(rows)
        for _ in range(2):  # the kernel, in both
            torch.fft.rfft(kernel)
        for _ in range(2):  # y and the gradient of u
            torch.fft.irfft(spectrum * of_kernel, n=n)
        torch.fft.irfft((spectrum * spectrum).sum(0), n=n)  # the gradient of the kernel

    return work


def whole_row(batch: int, channels: int, length: int, allocator: str) -> Row:
    """Return times and peak memory at one size."""
    u, d_out = torch.randn(2, batch, length, channels).unbind()
    kernel = torch.randn(channels, length) / length**0.5
    contiguous = "plain, (B, L, C) contiguous"
    ours, theirs = (training_step(f, u, kernel, d_out=d_out) for f in (fft_conv, plain))
    laid_out = training_step(lambda u, kernel: plain(u, kernel).contiguous(), u, kernel, d_out=d_out)
    candidates: dict[str, Step] = {"fft_conv": ours, "plain": theirs}
    candidates[contiguous] = lambda: [gradient.contiguous() for gradient in laid_out()]
    times = interleaved(candidates, seconds=2.0, least=5)
    median = times.median()
    values = {f"fft_conv / {name}": median["fft_conv"] / median[name] for name in ("plain", contiguous)}
    values["peak memory, fft_conv / plain"] = peak_memory(ours) / peak_memory(theirs)
    key = {"what": "whole", "B": batch, "C": channels, "L": length, "allocator": allocator}
    return Row.timed(key, times, values)
