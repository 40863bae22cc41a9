"""The long convolution token by token against the whole. Shapes: u (B, L, C), kernel (C, K)."""

import pytest
import torch

from chela.ops import fft_conv
from chela.ops.fft_conv import step as streaming
from chela.ops.fft_conv.step import BLOCK, FFTConvState, fft_conv_step


def _steps(u, kernel, skip=None):
    state = FFTConvState.start(kernel, u.shape[0], skip=skip)
    return torch.stack([fft_conv_step(u[:, t], state)[0] for t in range(u.shape[1])], 1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 63, 64, 65, 128, 500, 1000, 1023, 1025])
def test_steps_equal_the_whole(length, dtype):
    u, kernel, skip = torch.randn(3, length, 4), torch.randn(4, length) / length**0.5, torch.randn(4)
    got, _ = _steps(u.to(dtype), kernel.to(dtype), skip.to(dtype))
    want = fft_conv(u.double(), kernel.double(), skip=skip.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)


def test_a_stream_shorter_than_the_kernel_and_one_that_stops_midway():
    u, kernel = torch.randn(2, 300, 3), torch.randn(3, 1000) / 30
    got, _ = _steps(u, kernel)
    want = fft_conv(u, kernel)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_half_precision_tokens_are_summed_in_float32():
    u, kernel = torch.randn(1, 200, 3).bfloat16(), torch.randn(3, 200) / 14
    got, state = _steps(u, kernel)
    assert got.dtype == torch.bfloat16 and state.pending.dtype == torch.float32
    torch.testing.assert_close(got, fft_conv(u, kernel), atol=1e-2, rtol=1e-2)


def test_every_pair_is_in_one_tile_and_the_work_is_l_log2_l(monkeypatch):
    """Count what the tiles cost: size P comes every 2P tokens, so its FFTs cost L/2P · P log P."""
    sizes = []
    add = streaming._add_tile
    monkeypatch.setattr(streaming, "_add_tile", lambda s: (sizes.append(s.position & -s.position), add(s)))
    length = 16 * BLOCK
    _steps(torch.randn(1, length, 1), torch.randn(1, length))
    counts = {size: sizes.count(size) for size in sorted(set(sizes))}
    assert counts == {BLOCK: 8, 2 * BLOCK: 4, 4 * BLOCK: 2, 8 * BLOCK: 1}


def test_the_kernel_of_the_start_is_the_kernel_of_the_stream():
    u, kernel, skip = torch.randn(1, 100, 2), torch.randn(2, 100), torch.ones(2)
    want = fft_conv(u, kernel, skip=skip)
    state = FFTConvState.start(kernel, 1, skip=skip)
    kernel.zero_()
    got = torch.stack([fft_conv_step(u[:, t], state)[0] for t in range(100)], 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_errors_say_what_was_expected():
    _, state = _steps(torch.randn(1, 3, 2), torch.randn(2, 3))
    with pytest.raises(ValueError, match="expected at most K=3 tokens, one for each tap, got one more"):
        fft_conv_step(torch.randn(1, 2), state)
    with pytest.raises(ValueError, match=r"expected u of shape \(1, 2\), got \(2, 2\)"):
        fft_conv_step(torch.randn(2, 2), state)
