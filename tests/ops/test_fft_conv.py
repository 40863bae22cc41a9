"""fft_conv against its definition, and as a PyTorch operator. Shapes: u (B, L, C), kernel (C, K)."""

import pytest
import torch

from chela.ops import backends, fft_conv

LENGTHS = [1, 2, 3, 17, 63, 64, 500, 1000, 1023, 1025]
CHANNELS = 5
BACKENDS = sorted(name for name, why_not in backends()["fft_conv"].items() if why_not is None)


def _kernel_size(relation: str, length: int) -> int:
    return {"shorter": max(length // 3, 1), "equal": length, "longer": length + 5}[relation]


def _inputs(batch, length, taps, taps_back, dtype, seed=0):
    """Draw u, kernel, kernel_back (or None), skip and an output gradient; kernels have an L2 norm near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, of=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(of)

    of_kernel = dtype if dtype == torch.float64 else torch.float32
    back = None if taps_back is None else draw(CHANNELS, taps_back, scale=taps_back**-0.5, of=of_kernel)
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_direct_sum(backend, length, relation, two_sided):
    taps = _kernel_size(relation, length)
    batch = 3 if length % 2 else 1
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        inputs = _inputs(batch, length, taps, taps if two_sided else None, dtype)
        want = _run(*(None if x is None else x.double() for x in inputs), "reference")
        _assert_close(_run(*inputs, backend), want, tolerance)


def test_gradcheck():
    u, kernel, back, skip, _ = _inputs(2, 7, 9, 4, torch.float64)
    leaves = [x.requires_grad_() for x in (u, kernel, back, skip)]
    assert torch.autograd.gradcheck(lambda u, k, b, s: fft_conv(u, k, kernel_back=b, skip=s), leaves)
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k), leaves[:2])
