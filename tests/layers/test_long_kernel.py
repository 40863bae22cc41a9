"""The long kernels: their definitions, the crop, the norm buffer, the cache. Shapes: forward (C, L), back (C, L-1)."""

import pytest
import torch
from torch.nn import functional as F

from chela.layers.long_kernel import DampedEMAKernel, MultiscaleKernel


def multiscale(kernel: MultiscaleKernel, length: int) -> torch.Tensor:
    """Return the forward kernel of a multi-scale one."""
    return kernel.pieces()[0].flatten(1) @ kernel.near(length)


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("l_max", [1, 16, 17, 100])
def test_a_shorter_kernel_is_the_crop_of_the_whole(l_max, causal):
    kernel = DampedEMAKernel(6, l_max, causal=causal)
    forward, back = kernel(l_max)
    assert forward.shape == (6, l_max) and (back is None) == causal
    for length in sorted({1, min(2, l_max), min(15, l_max), l_max - 1 or 1, l_max}):
        shorter, shorter_back = kernel(length)
        torch.testing.assert_close(shorter, forward[:, :length])
        if not causal:
            torch.testing.assert_close(shorter_back, back[:, : length - 1])
            assert shorter_back.shape == (6, length - 1)


def test_a_piece_may_be_stretched_more_and_fade_by_channel():
    """SGConv's ``init_scale`` and its multiplier, which may go from one value to another over the channels."""
    options = {"scale_size": 4, "initial_scale": 2, "decay_min": 1.0, "decay_max": 3.0}
    kernel = MultiscaleKernel(3, 64, causal=True, **options)
    pieces = kernel.weight[0]
    assert pieces.shape == (3, 1 + 4 - 2, 4)
    for channel, multiplier in enumerate((1.0, 2.0, 3.0)):
        stretched = [
            F.interpolate(pieces[channel, i][None, None], scale_factor=2.0 ** (max(0, i - 1) + 2), mode="linear")[0, 0]
            / multiplier**i
            for i in range(3)
        ]
        want = torch.cat(stretched)
        torch.testing.assert_close(multiscale(kernel, 64)[channel], (want / want.norm())[:64])


@pytest.mark.parametrize("l_max", [1, 16, 17, 64, 100, 128])
def test_the_norm_is_taken_at_construction_and_saved(l_max):
    kernel = MultiscaleKernel(5, l_max)
    whole = kernel.ends[-1]
    assert whole >= l_max > (0 if whole == 16 else whole // 2)
    torch.testing.assert_close(multiscale(kernel, whole).norm(dim=1), torch.ones(5))
    before = multiscale(kernel, l_max).detach()
    with torch.no_grad():
        kernel.weight.mul_(3)
    other = MultiscaleKernel(5, l_max)
    other.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(multiscale(other, l_max), 3 * before)
    kernel.reset_parameters()
    torch.testing.assert_close(multiscale(kernel, whole).norm(dim=1), torch.ones(5))


def test_ema_is_its_formula_at_any_length():
    kernel = DampedEMAKernel(3, 10).double()
    length = 37  # beyond l_max
    got = kernel(length)
    for direction in (0, 1):
        for t in (0, 1, 5, 9, 10, 35):
            p, a = torch.sigmoid(kernel.delta[direction]), torch.sigmoid(kernel.alpha[direction])
            want = (p * kernel.beta[direction] * kernel.gamma[direction] * (1 - p * a) ** t).sum(1) / 16**0.5
            torch.testing.assert_close(got[direction][:, t], want)


def test_kept_in_eval_mode():
    kernel = DampedEMAKernel(4, 50).eval()
    with torch.no_grad():
        first = kernel(50)[0]
        assert kernel(50)[0].data_ptr() == kernel(20)[0].data_ptr() == first.data_ptr()
        torch.testing.assert_close(kernel(70)[0][:, :50], first)  # beyond what is kept
    assert kernel(50)[0].requires_grad, "with gradients it must be built anew"


def test_float32_under_autocast_and_gradients_reach_every_parameter():
    kernel = DampedEMAKernel(4, 50)
    want = kernel(50)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, back = kernel(50)
    assert torch.equal(got, want)
    (got.sum() + back.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kernel.parameters())
