"""ShortLongConv: its equations, padding, re-parameterisation and steps. Shapes: x (B, L, C), mask (B, L)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from chela import param_groups
from chela.layers.short_long_conv import ShortLongConv
from chela.ops import fft_conv, short_conv

C, L_MAX = 6, 70
MODES = ("short-long", "short", "long", "none")
LENGTHS = [1, 2, 3, 17, 63, 70]


def _mask(batch, length):
    """Right padding of different sizes; the first row has none."""
    lengths = torch.tensor([max(length - 5 * row, 1) for row in range(batch)])
    return torch.arange(length) < lengths[:, None]


def _trained(steps=3, **options):
    """Take some steps, so that norms and weights are no longer what they were at the start."""
    torch.manual_seed(0)
    layer = ShortLongConv(C, l_max=L_MAX, **options)
    optimiser = torch.optim.AdamW(param_groups(layer, lr=1e-2, weight_decay=0.01), lr=1e-2)
    for _ in range(steps):
        x, mask = torch.randn(3, L_MAX, C) * 2 + 1, _mask(3, L_MAX)
        optimiser.zero_grad()
        (layer(x, mask) - x.roll(3, 1)).square().mean().backward()
        optimiser.step()
    return layer


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_default_is_the_equations(length, causal):
    layer = ShortLongConv(C, l_max=L_MAX, causal=causal)
    x, mask = torch.randn(3, length, C), _mask(3, length)
    absent = ~mask[..., None]
    forward, back = layer.long.kernel(length)
    short = short_conv(x.masked_fill(absent, 0), layer.short.weight, causal=causal, backend="reference")
    u = F.silu(short).masked_fill(absent, 0)
    long = fft_conv(u, forward, kernel_back=back, backend="reference") + layer.long.skip * u
    want = F.silu(long).masked_fill(absent, 0)
    torch.testing.assert_close(layer(x, mask), want, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "reparam"])
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
def test_padding_content_does_not_leak(causal, reparam):
    layer = ShortLongConv(C, l_max=L_MAX, causal=causal, reparam=reparam)
    x, mask = torch.randn(3, 40, C), _mask(3, 40)
    outputs, gradients = [], []
    for content in (0.0, 1e3, float("nan")):
        layer.zero_grad()
        filled = x.masked_fill(~mask[..., None], content).requires_grad_()
        y = layer(filled, mask)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([filled.grad, *(p.grad.clone() for p in layer.parameters())])
        assert filled.grad[~mask].abs().sum() == 0 and y[~mask].abs().sum() == 0
    for y, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(y, outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))


@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "reparam"])
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
def test_more_padding_changes_nothing_on_real_tokens(causal, reparam):
    layer = ShortLongConv(C, l_max=L_MAX, causal=causal, reparam=reparam)
    x = torch.randn(2, 30, C)
    alone = copy.deepcopy(layer)
    want = alone(x)
    padded = F.pad(x, (0, 0, 0, 25), value=9.0)
    got = layer(padded, torch.arange(55).expand(2, 55) < 30)
    torch.testing.assert_close(got[:, :30], want, atol=1e-5, rtol=1e-5)
    for (name, mine), theirs in zip(layer.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5, msg=name)


def test_batch_statistics_are_those_of_real_tokens():
    layer = ShortLongConv(C, l_max=L_MAX, reparam=True)
    x, mask = torch.randn(3, 50, C), _mask(3, 50)
    layer(x, mask)
    u = layer.short(x * mask[..., None]) * mask[..., None]
    for branch, norm in zip(layer.long.branches, layer.long.norms[1:], strict=True):
        real = branch(u)[mask]
        torch.testing.assert_close(norm.running_mean, 0.1 * real.mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * real.var(0), atol=1e-6, rtol=1e-4)


def test_causal_sees_no_later_token():
    layer = _trained(causal=True, reparam=True).eval()
    x = torch.randn(1, 40, C)
    changed = x.clone()
    changed[:, 25:] = 7.0
    torch.testing.assert_close(layer(x)[:, :25], layer(changed)[:, :25], atol=1e-5, rtol=1e-5)
    assert (layer(x)[:, 25:] - layer(changed)[:, 25:]).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", ["multiscale", "free", "ema"])
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "reparam"])
def test_merged_equals_eval_after_training(reparam, causal, kernel):
    layer = _trained(causal=causal, reparam=reparam, long_kernel=kernel).eval()
    if reparam:
        assert (layer.long.norms[0].running_mean.abs() > 1e-3).any(), "the norms must have moved for this test to bite"
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    merged = copy.deepcopy(layer)
    merged.merge()
    assert not any(isinstance(p, torch.nn.Parameter) for p in merged.long.parameters())
    loaded = ShortLongConv(C, l_max=L_MAX, causal=causal, reparam=reparam, long_kernel=kernel).eval()
    loaded.load_state_dict(merged.state_dict())
    for length in LENGTHS:
        x, mask = torch.randn(3, length, C), _mask(3, length)
        want = layer(x, mask)
        torch.testing.assert_close(merged(x, mask), want, atol=1e-5, rtol=0)
        assert torch.equal(loaded(x, mask), merged(x, mask))
    merged.unmerge()
    after = merged.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("l_max", [1, 2, 3, 16])
def test_branches_longer_than_the_kernel_merge_too(l_max, causal):
    layer = ShortLongConv(C, l_max=l_max, causal=causal, reparam=True)
    for _ in range(2):
        layer(torch.randn(3, l_max, C))
    layer.eval()
    x = torch.randn(2, l_max, C)
    want = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=0)


def test_the_merged_form_says_what_it_is():
    layer = _trained(reparam=True).eval()
    training = layer.state_dict()
    layer.merge()
    assert "merged" in repr(layer.long) and sum(p.numel() for p in layer.long.parameters()) == 0
    assert {k for k in layer.state_dict() if k.startswith("long.")} == {
        "long.merged.forward_kernel",
        "long.merged.back_kernel",
        "long.merged.bias",
    }
    with pytest.raises(
        RuntimeError, match="expected the merged form, which this layer has, but the state_dict holds the"
    ):
        layer.load_state_dict(training)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(ValueError, match=f"expected at most l_max={L_MAX} tokens, got {L_MAX + 1}"):
        layer(torch.randn(1, L_MAX + 1, C))
    with pytest.raises(RuntimeError, match=r"does not train; call unmerge\(\)"):
        layer.train()(torch.randn(1, 5, C))
    layer.unmerge()
    with pytest.raises(RuntimeError, match="is not merged"):
        layer.unmerge()


def test_merged_layers_keep_the_dtype_of_their_input():
    layer = _trained(reparam=True).eval()
    x = torch.randn(2, 20, C).bfloat16()
    want = layer(x)
    layer.merge()
    assert layer(x).dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), want, atol=0.05, rtol=0.05)


def test_unmerge_needs_the_training_parameters():
    layer = _trained(reparam=True).eval()
    loaded = ShortLongConv(C, l_max=L_MAX, reparam=True)
    layer.merge(keep_training_form=False)
    loaded.load_state_dict(layer.state_dict())
    for merged in (layer, loaded):
        with pytest.raises(RuntimeError, match="training parameters were not kept"):
            merged.unmerge()


def test_training_goes_on_after_unmerge():
    layer = _trained(reparam=True)
    parameters = list(layer.parameters())
    layer.eval()
    layer.merge()
    layer.unmerge()
    layer.train()
    layer(torch.randn(2, 20, C)).sum().backward()
    assert [id(p) for p in layer.parameters()] == [id(p) for p in parameters]
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "reparam"])
def test_steps_equal_the_whole(mode, reparam):
    options = {"causal": True, "mode": mode, "reparam": reparam, "short_kernel": 4}
    layer = (ShortLongConv(C, l_max=L_MAX, **options) if mode == "none" else _trained(**options)).eval()
    x = torch.randn(2, L_MAX, C)
    state, outputs = None, []
    for t in range(L_MAX):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(x), atol=1e-5, rtol=0)
    if "long" in mode:
        with pytest.raises(ValueError, match=f"expected at most K={L_MAX} tokens"):
            layer.step(x[:, 0], state)


def test_merged_layers_step_too():
    layer = _trained(causal=True, reparam=True).eval()
    x = torch.randn(2, 20, C)
    want = layer(x)
    layer.merge()
    state = layer.start(2)
    got = torch.stack([layer.step(x[:, t], state)[0] for t in range(20)], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_bfloat16_input_and_autocast():
    layer = ShortLongConv(C, l_max=L_MAX)
    x = torch.randn(2, 30, C)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want)
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "reparam"])
def test_compiles_as_one_graph(reparam):
    layer = _trained(reparam=reparam).eval()
    x, mask = torch.randn(2, 30, C), _mask(2, 30)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode: expected one of short-long, short, long, none, got 'both'"),
        ({"long_kernel": "s4"}, "long_kernel: expected one of multiscale, free, ema, got 's4'"),
        ({"short_kernel": 4}, "expected an odd number of taps when not causal, got 4"),
        ({"reparam": True, "branches": (4,)}, "expected an odd number of taps when not causal, got 4"),
    ],
)
def test_errors_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        ShortLongConv(C, l_max=L_MAX, **options)


def test_what_needs_another_form_says_so():
    with pytest.raises(RuntimeError, match="expected causal=True"):
        ShortLongConv(C, l_max=L_MAX).start(1)
    with pytest.raises(RuntimeError, match="expected eval mode"):
        ShortLongConv(C, l_max=L_MAX, causal=True, reparam=True).start(1)
    with pytest.raises(RuntimeError, match="expected a long stage to merge, but mode is 'short'"):
        ShortLongConv(C, l_max=L_MAX, mode="short").merge()
