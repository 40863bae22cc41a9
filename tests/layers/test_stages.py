"""A stage's own backward pass against its plain statement, and what is computed again instead of held."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela import ChelaLayer
from chela.layers import attention, short_long_conv, stages
from chela.layers.stages import Factor
from chela.ops.fft_conv import convolve_in_order
from chela.ops.padding import zero_padding
from experiments.bench.timing import peak_memory

torch.manual_seed(0)
LINEAR, DROPOUT, NORM = nn.Linear(6, 4).double(), nn.Dropout(0.0), nn.LayerNorm(4).double()
GATE = tuple(nn.Linear(*shape).double() for shape in ((4, 6), (6, 4), (4, 4), (4, 4)))
MASK = torch.arange(5) < torch.tensor([[5], [2], [3]])


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attended(*x: Tensor, mask: Tensor | None, positive: bool) -> Tensor:
    """Attend and normalise, and set to 0 what means nothing."""
    c, v, gamma, beta = x
    core = attention.Core(6, 4, gamma.shape[1], 3, pools=positive, causal=False).double()
    core.norm = NORM
    with torch.no_grad():
        for i, parameter in enumerate(core.project.parameters()):
            parameter.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view_as(parameter))
    return zero_padding(torch.func.functional_call(core, {"gamma": gamma, "beta": beta}, (c, v, mask)), mask)


def convolved(u: Tensor, learned: Tensor) -> Tensor:
    matrices = torch.linspace(-1, 1, 54, dtype=u.dtype).view(6, 9).split([5, 4], dim=1)
    near = Factor(slice(None), matrices[0], slice(2, 7))
    far = Factor(slice(2, 4), matrices[1][:2, :2], slice(7, 9))
    pieces = [Factor(slice(0, 2), matrices[1][2:4, 2:], slice(0, 2)), near, far]
    if stages.own_backward(u, learned):
        return stages.convolved(u, learned, pieces)
    lags = sum(F.pad(learned[:, of] @ matrix, (at.start, 9 - at.stop)) for of, matrix, at in pieces)
    assert isinstance(lags, Tensor)
    return convolve_in_order(u, lags)


def by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stages, attention, short_long_conv):
        monkeypatch.setattr(module, "own_backward", lambda *_: False)


FEATURES = [(3, 5, 6), (3, 5, 4), (2, 2, 3), (2, 2, 3)]
ONE_HEAD = [*FEATURES[:2], (2, 1, 3), (2, 1, 3)]
STAGES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "feed-forward": (lambda inner: stages.feed_forward(LINEAR, inner), [(5, 6)]),
    "convolution": (convolved, [(3, 5, 4), (4, 6)]),
    "gate": (lambda *x: stages.gate(*x, None, GATE, DROPOUT), [(3, 5, 6), (3, 5, 4), (3, 5, 4)]),
    "gate, masked": (lambda *x: stages.gate(*x, MASK, GATE, DROPOUT), [(3, 5, 6), (3, 5, 4), (3, 5, 4)]),
    **{
        f"{'pooling' if positive else 'selecting'}, {shapes[2][1]} heads, {'masked' if mask is MASK else 'whole'}": (
            functools.partial(attended, mask=mask, positive=positive),
            shapes,
        )
        for positive in (False, True)
        for shapes in (FEATURES, ONE_HEAD)
        for mask in (None, MASK)
    },
}


@pytest.mark.parametrize(("held", "rows"), [(True, 0), (False, 2), (False, 11)])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_its_plain_statement(name: str, held: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stage, shapes = STAGES[name]
    leaves = [leaf(*shape) for shape in shapes]
    linears = (LINEAR,) if name == "feed-forward" else GATE if "gate" in name else (NORM,) if "heads" in name else ()
    wanted = [*leaves, *(parameter for linear in linears for parameter in linear.parameters())]
    if not held:
        for limit in ("SMALL_ELEMENTS", "MANY_LAGS"):
            monkeypatch.setattr(stages, limit, 0)
        monkeypatch.setattr(stages, "ROWS", rows)
    found = []
    for own_backward in (True, False):
        if not own_backward:
            by_autograd(monkeypatch)
        y = stage(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        total = (weights * y).sum()
        found.append([y, *torch.autograd.grad(total, wanted, retain_graph=True)])
        assert all(map(torch.equal, found[-1][1:], torch.autograd.grad(total, wanted)))  # what was held is not spent
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_under_autocast_it_is_the_plain_statement() -> None:
    linear, gate = copy.deepcopy(LINEAR).float(), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stages.feed_forward(linear, gate), linear(F.silu(gate)))


@pytest.mark.parametrize("causal", (False, True))
def test_the_layer_holds_less_and_gives_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = ChelaLayer(64, l_max=512, causal=causal), torch.randn(4, 512, 64)
    again = copy.deepcopy(layer)
    monkeypatch.setattr(stages, "SMALL_ELEMENTS", 0)
    outputs = [layer(x)]  # from the second call on there are no caches to fill
    memory = peak_memory(lambda: outputs.append(layer(x)))
    monkeypatch.setattr(stages, "SMALL_ELEMENTS", 2**40)
    by_autograd(monkeypatch)
    assert memory < 0.75 * peak_memory(lambda: outputs.append(again(x)))
    for y in outputs[1:]:
        y.square().sum().backward()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3 * float(b.grad.abs().max()))


def test_adapters_and_hooks_are_called() -> None:
    """What takes a linear layer's place, or listens to it, is not passed by for its weights."""
    layer, seen = ChelaLayer(8, l_max=16), []
    layer.out.register_forward_hook(lambda *_: seen.append("out"))
    layer.cores[0].project.register_forward_hook(lambda *_: seen.append("project"))

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("skip")
            return super().forward(x)

    layer.skip = Adapted(8, 8)
    layer(torch.randn(1, 16, 8)).sum().backward()
    assert sorted(seen) == ["out", "project", "skip"]
