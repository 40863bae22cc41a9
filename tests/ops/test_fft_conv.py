"""fft_conv against its definition, and as a PyTorch operator. Shapes: u (B, L, C), kernel (C, K)."""

import sys

import pytest
import torch

from chela.ops import backends, fft_conv
from chela.ops.fft_conv.plain import fft_length, in_order

LENGTHS = [1, 2, 3, 17, 63, 64, 500, 1000, 1023, 1025]
CHANNELS = 5
FAST = sorted(name for name, why_not in backends()["fft_conv"].items() if why_not is None and name != "reference")


def _kernel_size(relation: str, length: int) -> int:
    return {"shorter": max(length // 3, 1), "equal": length, "longer": length + 5}[relation]


def _inputs(batch, length, taps, taps_back, dtype, seed=0):
    """Draw u, kernel, kernel_back (or None), skip and an output gradient; kernels have an L2 norm near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, of=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(of)

    of_kernel = dtype if dtype == torch.float64 else torch.float32
    back = None if taps_back is None else draw(CHANNELS, taps_back, scale=max(taps_back, 1) ** -0.5, of=of_kernel)
    kernel = draw(CHANNELS, taps, scale=taps**-0.5, of=of_kernel)
    u, grad = draw(batch, length, CHANNELS), draw(batch, length, CHANNELS)
    return u, kernel, back, draw(CHANNELS, of=of_kernel), grad


def _run(u, kernel, back, skip, grad, backend):
    """Return the output and the gradients of u, kernel, skip (and kernel_back)."""
    leaves = [x.detach().clone().requires_grad_() for x in (u, kernel, skip, back) if x is not None]
    u, kernel, skip = leaves[:3]
    y = fft_conv(u, kernel, kernel_back=leaves[3] if back is not None else None, skip=skip, backend=backend)
    names = ["du", "dkernel", "dskip", "dkernel_back"]
    gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype), materialize_grads=True)
    return {"y": y.detach()} | dict(zip(names, gradients, strict=False))


def _assert_close(got, want, tolerance):
    """Compare tensor by tensor: the RMS of the error against the RMS of what was expected."""
    for name, expected in want.items():
        error = (got[name].double() - expected.double()).square().mean().sqrt()
        ratio = (error / expected.double().square().mean().sqrt().clamp_min(1e-12)).item()
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("two_sided", [False, True], ids=["causal", "two-sided"])
@pytest.mark.parametrize("relation", ["shorter", "equal", "longer"])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_direct_sum(length, relation, two_sided):
    taps = _kernel_size(relation, length)
    batch = 3 if length % 2 else 1
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        inputs = _inputs(batch, length, taps, taps if two_sided else None, dtype)
        want = _run(*(None if x is None else x.double() for x in inputs), "reference")
        for backend in FAST:
            _assert_close(_run(*inputs, backend), want, tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_inputs_and_outputs(backend, dtype):
    inputs = _inputs(2, 500, 500, 499, dtype)
    want = _run(*(x.double() for x in inputs), "reference")
    got = _run(*inputs, backend)
    assert got["y"].dtype == got["du"].dtype == dtype
    assert got["dkernel"].dtype == got["dkernel_back"].dtype == got["dskip"].dtype == torch.float32
    # rounding to bf16 or fp16 has a relative RMS error of about eps/3.5; kernel gradients stay float32
    _assert_close({k: got[k] for k in ("y", "du")}, {k: want[k] for k in ("y", "du")}, torch.finfo(dtype).eps / 2)
    _assert_close(got, {k: want[k] for k in ("dkernel", "dkernel_back", "dskip")}, 2e-6)


def test_float32_inside_whatever_autocast_says():
    u, kernel, back, skip, grad = _inputs(2, 63, 63, 62, torch.float32)
    want = _run(u, kernel, back, skip, grad, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _run(u, kernel, back, skip, grad, "auto")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("backend", FAST)
def test_non_contiguous_inputs(backend):
    u, kernel, back, skip, grad = _inputs(3, 64, 40, 30, torch.float32)

    def strided(x):
        return torch.stack([x, x + 1], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    want = _run(u, kernel, back, skip, grad, backend)
    inputs = [strided(x) if x.dim() > 1 else torch.stack([x, x], 1)[:, 0] for x in (u, kernel, back, skip, grad)]
    assert not any(x.is_contiguous() for x in inputs)
    y = fft_conv(inputs[0], inputs[1], kernel_back=inputs[2], skip=inputs[3], backend=backend)
    _assert_close({"y": y} | _run(*inputs, backend), want, 1e-6)
    transposed = fft_conv(u.transpose(1, 2).contiguous().transpose(1, 2), kernel, kernel_back=back, skip=skip)
    _assert_close({"y": transposed}, {"y": want["y"]}, 1e-6)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_an_impulse_gives_the_kernel_at_the_right_lags(backend):
    length, at = 20, 8
    kernel, back = torch.randn(CHANNELS, length), torch.randn(CHANNELS, length - 1)
    u = torch.zeros(1, length, CHANNELS)
    u[:, at] = 1
    y = fft_conv(u, kernel, kernel_back=back, backend=backend)[0].T
    torch.testing.assert_close(y[:, at:], kernel[:, : length - at], atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, :at].flip(1), back[:, :at], atol=1e-5, rtol=0)
    causal = fft_conv(u, kernel, backend=backend)[0].T
    torch.testing.assert_close(causal[:, :at], torch.zeros(CHANNELS, at), atol=1e-5, rtol=0)


@pytest.mark.parametrize("of_few_tokens", [1, 1 << 30])
def test_blocks_of_channels_do_not_change_the_result(monkeypatch, of_few_tokens):
    """Three blocks, the last one ragged; or one."""
    monkeypatch.setattr(sys.modules["chela.ops.fft_conv.cpu"], "OF_FEW_TOKENS", of_few_tokens)
    u, kernel, back, skip = (torch.randn(s, dtype=torch.float64) for s in ((2, 50, 40), (40, 50), (40, 49), (40,)))
    inputs = (u, kernel, back, skip, torch.randn_like(u))
    _assert_close(_run(*inputs, "fft"), _run(*inputs, "reference"), 1e-12)


def test_fft_length_keeps_wrapped_lags_apart():
    for length in range(1, 300):
        n = fft_length(length)
        assert n >= 2 * length - 1 and n % 2 == 0


@pytest.mark.parametrize("shape", [(0, 8, CHANNELS), (2, 0, CHANNELS), (2, 8, 0)], ids=str)
def test_nothing_in_gives_nothing_out_and_zero_gradients(shape):
    leaves = [torch.randn(s).requires_grad_() for s in (shape, (shape[2], 4), (shape[2], 3), (shape[2],))]
    y = fft_conv(leaves[0], leaves[1], kernel_back=leaves[2], skip=leaves[3])
    assert y.shape == shape
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(y.sum(), leaves))


def test_only_asked_for_gradients_are_computed():
    u, kernel, back, skip, _ = _inputs(2, 17, 17, 16, torch.float64)
    everything = torch.autograd.grad(
        fft_conv(u.requires_grad_(), kernel.requires_grad_(), kernel_back=back, skip=skip).square().sum(), [u, kernel]
    )
    for index, leaf in enumerate((u, kernel)):
        alone = [x.detach() for x in (u, kernel)]
        alone[index] = leaf
        y = fft_conv(alone[0], alone[1], kernel_back=back, skip=skip)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], everything[index])


def test_the_graph_keeps_the_input_and_the_lags_and_nothing_else():
    inputs = [x.requires_grad_() for x in _inputs(2, 64, 64, 63, torch.float32)[:4]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fft_conv(inputs[0], inputs[1], kernel_back=inputs[2], skip=inputs[3])
    assert [tuple(x.shape) for x in kept] == [(2, 64, CHANNELS), (CHANNELS, 127)]
    assert kept[0].data_ptr() == inputs[0].data_ptr() and not any(x.is_complex() for x in kept)


def test_gradcheck():
    u, kernel, back, skip, _ = _inputs(2, 7, 9, 4, torch.float64)
    leaves = [x.requires_grad_() for x in (u, kernel, back, skip)]
    assert torch.autograd.gradcheck(lambda u, k, b, s: fft_conv(u, k, kernel_back=b, skip=s), leaves)
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k), leaves[:2])


@pytest.mark.parametrize("two_sided", [False, True], ids=["causal", "two-sided"])
def test_opcheck(two_sided):
    u, kernel, back, skip, grad = _inputs(2, 17, 17, 16 if two_sided else 0, torch.float32)
    lags = in_order(kernel, back, skip, 17).requires_grad_()
    torch.library.opcheck(torch.ops.chela.fft_conv.default, (u.requires_grad_(), lags))
    tensors = [x.detach() for x in (grad, u, lags)]
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.chela.fft_conv_backward.default, (*tensors, *flags))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(4, 5)}, r"expected u of shape \(B, L, C\), got \(4, 5\)"),
        ({"kernel": torch.ones(4, 3)}, r"expected kernel of shape \(C=5, K\), got \(4, 3\)"),
        ({"kernel": torch.ones(5, 0)}, r"K>=1"),
        ({"kernel_back": torch.ones(4, 3)}, r"expected kernel_back of shape \(C=5, K_back\), got \(4, 3\)"),
        ({"skip": torch.ones(4)}, r"expected skip of shape \(C=5\), got \(4,\)"),
        ({"u": torch.ones(1, 4, 5, dtype=torch.long)}, r"floating dtype for u, got torch.int64"),
        ({"kernel": torch.ones(5, 3, device="meta")}, r"kernel is on meta, other tensors on cpu"),
        ({"backend": "fast"}, r"expected backend 'auto' or one of"),
    ],
)
def test_errors_say_what_was_expected(change, message):
    call = {"u": torch.ones(1, 4, 5), "kernel": torch.ones(5, 3)} | change
    u, kernel = call.pop("u"), call.pop("kernel")
    with pytest.raises(ValueError, match=message):
        fft_conv(u, kernel, **call)
