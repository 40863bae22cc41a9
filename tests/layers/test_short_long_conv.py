"""ShortLongConv: its equations, scale, padding, branches and steps. Shapes: x (B, L, C), mask (B, L)."""

import functools

import pytest
import torch
from torch.nn import functional as F

from chela import param_groups
from chela.layers.param_groups import initialise
from chela.layers.short_long_conv import SHORT_DEVIATION, ShortLongConv
from chela.ops import short_conv

C, L_MAX = 6, 70
MODES = ("short-long", "short", "long", "none")


def _mask(batch, length):
    """Right padding of different sizes; the first row has none."""
    lengths = torch.tensor([max(length - 5 * row, 1) for row in range(batch)])
    return torch.arange(length) < lengths[:, None]


def _trained(steps=3, **options):
    """Take some steps, so that gains and weights are no longer what they were at the start."""
    torch.manual_seed(0)
    layer = ShortLongConv(C, l_max=L_MAX, **options)
    optimiser = torch.optim.AdamW(param_groups(layer, lr=1e-2, weight_decay=0.01), lr=1e-2)
    for _ in range(steps):
        x, mask = torch.randn(3, L_MAX, C) * 2 + 1, _mask(3, L_MAX)
        optimiser.zero_grad()
        (layer(x, mask) - x.roll(3, 1)).square().mean().backward()
        optimiser.step()
    return layer


@pytest.mark.parametrize("kernel", ["multiscale", "ema"])
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("anew", [False, True], ids=["built", "drawn anew"])
@torch.no_grad()
def test_every_branch_starts_with_unit_scale(causal, kernel, anew):
    layer = ShortLongConv(C, l_max=L_MAX, causal=causal, long_kernel=kernel)
    if anew:
        initialise(layer, seed=3)
    gains = layer.long.gain.clone()
    for j in range(len(gains)):
        layer.long.gain.zero_()
        layer.long.gain[j] = gains[j]
        energy = layer.long.lags(L_MAX).square().sum(1)
        torch.testing.assert_close(energy * SHORT_DEVIATION**2, torch.ones(C))  # the variance, for white inputs


@torch.no_grad()
def test_the_short_stage_has_the_deviation_that_the_gains_expect():
    u = ShortLongConv(200, l_max=64).short(torch.randn(50, 64, 200))
    assert u[:, 2:-2].std().item() == pytest.approx(SHORT_DEVIATION, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_only_its_stages(mode):
    layer = ShortLongConv(C, l_max=L_MAX, mode=mode)
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"short-long": {"short", "long"}, "short": {"short"}, "long": {"long"}, "none": set()}[mode]
    x, mask = torch.randn(2, 20, C), _mask(2, 20)
    y = layer(x, mask)
    assert y[~mask].abs().sum() == 0
    if mode == "none":
        assert torch.equal(y, x * mask[..., None])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("branches", [(), (4, 31)], ids=["plain", "branches"])
def test_steps_equal_the_whole(mode, branches):
    options = {"causal": True, "mode": mode, "branches": branches, "short_kernel": 4}
    layer = ShortLongConv(C, l_max=L_MAX, **options) if mode == "none" else _trained(**options)
    x = torch.randn(2, L_MAX, C)
    state, outputs = layer.eval().start(2), []
    for t in range(L_MAX):
        _, y, state = layer.advance("step", x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["multiscale", "ema"])
def test_beyond_l_max_it_is_the_filter_of_its_kernel(kernel):
    """In prefill and in steps, over several pages; "ema" has no last tap."""
    layer = _trained(causal=True, long_kernel=kernel).double().eval().requires_grad_(False)
    x = torch.randn(2, 9 * L_MAX, C, dtype=torch.float64)
    _, y, state = layer.advance("prefill", x[:, : 5 * L_MAX + 3], layer.start(2))
    size, outputs = sum(tensor.numel() for tensor in state.values()), [y]
    for t in range(5 * L_MAX + 3, 9 * L_MAX):
        _, y, state = layer.advance("step", x[:, t], state)
        outputs.append(y[:, None])
    taps = layer.long.lags(x.shape[1] if kernel == "ema" else L_MAX)
    u = F.silu(short_conv(x, layer.short.weight, causal=True, backend="reference"))
    want = F.conv1d(F.pad(u.mT, (taps.shape[1] - 1, 0)), taps.flip(1)[:, None], groups=C).mT
    torch.testing.assert_close(torch.cat(outputs, 1), F.silu(want + layer.long.bias), atol=1e-10, rtol=0)
    assert sum(tensor.numel() for tensor in state.values()) <= 2 * size


@pytest.mark.parametrize("kernel", ["multiscale", "ema"])
def test_a_step_has_the_kernel_of_the_parameters_as_they_are(kernel):
    layer = _trained(causal=True, long_kernel=kernel).eval()
    step = torch.no_grad()(functools.partial(layer.advance, "step"))
    x, state = torch.randn(1, C), layer.start(1)
    step(x, state)
    kept = dict(layer.long._cache)
    step(x, state)
    assert kept and all(layer.long._cache[key] is value for key, value in kept.items())

    def tune(y):  # in eval mode
        y.sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()

    for write in (
        lambda: tune(layer(torch.randn(1, 5, C))),
        lambda: tune(layer.advance("prefill", torch.randn(1, 5, C), layer.start(1))[1]),
        lambda: layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}),
        lambda: (layer.long.gain.data.mul_(2), layer.eval()),
        lambda: layer.double(),
    ):
        write()
        x = x.to(layer.long.gain)
        torch.testing.assert_close(step(x, layer.start(1))[1], layer(x[:, None])[:, 0])


def test_bfloat16_input_and_autocast():
    layer = ShortLongConv(C, l_max=L_MAX)
    x = torch.randn(2, 30, C)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want)
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode: expected one of short-long, short, long, none, got 'both'"),
        ({"long_kernel": "s4"}, "long_kernel: expected one of multiscale, ema, got 's4'"),
        ({"short_kernel": 4}, "expected odd numbers of taps when not causal, got 4"),
        ({"branches": (4,)}, "expected odd numbers of taps when not causal, got 4"),
    ],
)
def test_errors_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        ShortLongConv(C, l_max=L_MAX, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("branches", [(), (5, 31)], ids=["plain", "branches"])
@pytest.mark.parametrize(
    ("l_max", "length", "compiled"),
    [(1, 1, False), (16, 3, False), (100, 100, False), (128, 17, False), (129, 129, False), (500, 170, True)],
)
def test_its_lags_are_the_kernel_as_one_would_write_it(l_max, length, compiled, branches, causal):
    """Values and gradients of all parameters, against pieces by PyTorch's interpolation in float64."""
    long = ShortLongConv(C, l_max=l_max, causal=causal, branches=branches).double().long
    scales = long.kernel.weight.shape[2]
    want = []
    for direction in range(1 if causal else 2):
        pieces = [
            F.interpolate(long.kernel.weight[direction, :, i][None], scale_factor=2.0 ** max(0, i - 1), mode="linear")
            / (2**i * long.kernel.norm[direction, :, 0])
            for i in range(scales)
        ]
        want.append(torch.cat(pieces, dim=2)[0, :, : length - direction] * long.gain[0, :, None])
    want[0] = want[0] + F.pad((long.skip * long.gain[0])[:, None], (0, length - 1))
    for gain, taps in zip(long.gain[1:], long.branches, strict=True):
        size = taps.shape[1]
        left = size - 1 if causal else (size - 1) // 2
        scaled = F.pad(taps * gain[:, None], (length, length))  # lag s is at length + left − s
        want[0] = want[0] + scaled[:, left + 1 : left + 1 + length].flip(1)
        if not causal:
            want[1] = want[1] + scaled[:, length + left + 1 : 2 * length + left]
    torch._dynamo.reset()
    got = (torch.compile(long.lags, fullgraph=True, backend="aot_eager") if compiled else long.lags)(length)
    lags = torch.cat([*(back.flip(1) for back in want[1:]), want[0]], dim=1)
    torch.testing.assert_close(got, lags)
    parameters = [p for name, p in long.named_parameters() if name != "bias"]
    weights = torch.randn_like(lags)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), parameters) for x in (got, lags)), strict=True):
        torch.testing.assert_close(a, b)


def test_beyond_l_max_is_an_error_or_the_declared_extension():
    with pytest.raises(ValueError, match=r"expected a length up to l_max=20, got 21; build the layer with a larger"):
        ShortLongConv(4, l_max=20)(torch.zeros(1, 21, 4))
    assert ShortLongConv(4, l_max=20, long_kernel="ema")(torch.zeros(1, 21, 4)).shape == (1, 21, 4)
