"""The long convolution token by token against the whole. Shapes: u (B, L, C), kernel (C, K)."""

import pytest
import torch
from torch.nn import functional as F

from chela.ops import FFTConvState, StepKernel, fft_conv, fft_conv_prefill, fft_conv_step
from chela.ops.fft_conv.step import BLOCK, room


def _steps(u, kernel, skip=None, state=None):
    state, ready = state or FFTConvState.start(kernel, u.shape[0]), StepKernel(kernel, skip=skip)
    outputs = []
    for t in range(u.shape[1]):
        y, state = fft_conv_step(u[:, t], state, ready)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _filtered(u, kernel):
    """The direct sum over the last K inputs, in float64."""
    taps = kernel.shape[1]
    return F.conv1d(F.pad(u.double().mT, (taps - 1, 0)), kernel.double().flip(1)[:, None], groups=len(kernel)).mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 63, 64, 65, 128, 500, 1000, 1023, 1025])
def test_steps_equal_the_whole(length, dtype):
    u, kernel, skip = torch.randn(3, length, 4), torch.randn(4, length) / length**0.5, torch.randn(4)
    got, state = _steps(u.to(dtype), kernel.to(dtype), skip.to(dtype))
    want = fft_conv(u.double(), kernel.double(), skip=skip.double())
    assert got.dtype == dtype and state.position.tolist() == [length] * 3
    torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)


def test_a_stream_shorter_than_the_kernel():
    u, kernel = torch.randn(2, 300, 3), torch.randn(3, 1000) / 30
    torch.testing.assert_close(_steps(u, kernel)[0], fft_conv(u, kernel), atol=1e-5, rtol=0)


@pytest.mark.parametrize("taps", [1, 5, 64, 65, 100, 128, 200])
def test_beyond_its_taps_it_is_a_filter_in_bounded_memory(taps):
    u, kernel = torch.randn(2, 900, 3), torch.randn(3, taps) / taps**0.5
    got, state = _steps(u, kernel)
    torch.testing.assert_close(got.double(), _filtered(u, kernel), atol=1e-5, rtol=0)
    assert state.inputs.shape == state.pending.shape == (2, 3, room(900, taps)) and room(900, taps) < 2 * max(
        taps, BLOCK
    )


@pytest.mark.parametrize("length", [64, 65, 128, 129, 300])
def test_a_state_is_no_part_of_a_larger_tensor(length):
    """So it can be saved after any token, the first of a page too."""
    kernel = torch.randn(3, 100)
    for state in (None, fft_conv_prefill(torch.randn(2, 140, 3), FFTConvState.start(kernel, 2), kernel)[1]):
        _, after = _steps(torch.randn(2, length, 3), kernel, state=state)
        for tensor in after:
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("pieces", [(1, 299, 500), (64, 64, 384), (130, 1, 1, 255), (900,), (700, 3, 150)], ids=str)
@pytest.mark.parametrize("taps", [1, 3, 64, 100, 200, 1000])
def test_prefill_and_steps_in_turn_equal_the_whole(taps, pieces):
    u, kernel = torch.randn(2, 1100, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64) / taps**0.5
    state, outputs, at = FFTConvState.start(kernel, 2), [], 0
    for length in pieces:
        before = [tensor.clone() for tensor in state]
        y, after = fft_conv_prefill(u[:, at : at + length], state, kernel)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        stepped, state = _steps(u[:, at + length : at + length + 67], kernel, state=after)
        outputs, at = [*outputs, y, stepped], at + length + 67
    want = _filtered(u[:, :at], kernel)
    torch.testing.assert_close(torch.cat(outputs, 1), want[:, :at], atol=1e-12, rtol=0)


def test_half_precision_tokens_are_summed_in_float32():
    u, kernel = torch.randn(1, 200, 3).bfloat16(), torch.randn(3, 200) / 14
    got, state = _steps(u, kernel)
    assert got.dtype == torch.bfloat16 and state.pending.dtype == torch.float32
    torch.testing.assert_close(got, fft_conv(u, kernel), atol=1e-2, rtol=1e-2)


def test_every_pair_is_in_one_tile_and_the_work_is_log2_k_a_token(monkeypatch):
    """Count the tiles: size n comes every 2n tokens, a page every P, so a page of P costs Σ_n P/2n · n log n."""
    sizes = []
    tile = StepKernel.tile
    monkeypatch.setattr(StepKernel, "tile", lambda self, x: (sizes.append(x.shape[2]), tile(self, x))[1])
    length = 16 * BLOCK
    _steps(torch.randn(1, length, 1), torch.randn(1, length))
    counts = {size: sizes.count(size) for size in sorted(set(sizes))}
    assert counts == {BLOCK: 8, 2 * BLOCK: 4, 4 * BLOCK: 2, 8 * BLOCK: 1}
    sizes.clear()
    _steps(torch.randn(1, length, 1), torch.randn(1, 4 * BLOCK))
    assert {size: sizes.count(size) for size in sorted(set(sizes))} == {BLOCK: 8, 2 * BLOCK: 4, 4 * BLOCK: 3}


def test_the_kernel_is_the_one_that_was_made_ready():
    u, kernel, skip = torch.randn(1, 100, 2), torch.randn(2, 100), torch.ones(2)
    want, ready, state = fft_conv(u, kernel, skip=skip), StepKernel(kernel, skip=skip), FFTConvState.start(kernel, 1)
    kernel.zero_()
    for t in range(100):
        y, state = fft_conv_step(u[:, t], state, ready)
        torch.testing.assert_close(y, want[:, t], atol=1e-4, rtol=0)


def test_errors_say_what_was_expected():
    _, state = _steps(torch.randn(1, 3, 2), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"expected u of shape \(1, 2\), got \(2, 2\)"):
        fft_conv_step(torch.randn(2, 2), state, StepKernel(torch.randn(2, 3)))
