"""What is made again must be what was made, and must not be held meanwhile."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

from chela import ChelaLayer
from chela.layers.remade import with_remade
from experiments.bench.timing import peak_memory


@pytest.fixture(autouse=True)
def _whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chela.layers.remade.SMALL_ELEMENTS", 0)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * F.silu(gate)


def leaves() -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8, requires_grad=True), nn.Linear(8, 4)


def test_results_and_gradients_are_those_of_the_plain_call() -> None:
    x, gate, linear = leaves()
    wanted = [x, gate, *linear.parameters()]
    plain, made_again = linear(gated(x, gate)), with_remade(linear, (gated, x, gate))
    assert torch.equal(plain, made_again)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (plain, made_again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_small_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, linear = leaves()
    calls = []
    for small, expected in ((0, 3), (x.numel() + gate.numel() + 1, 1)):
        monkeypatch.setattr("chela.layers.remade.SMALL_ELEMENTS", small)
        y = with_remade(linear, (lambda *inputs: calls.append(1) or gated(*inputs), x, gate))
        y.sum().backward()
        assert len(calls) == expected
        calls.clear()


def test_gradients_twice_over_one_graph() -> None:
    x, gate, linear = leaves()
    y = with_remade(linear, (gated, x, gate)).sum()
    first, second = torch.autograd.grad(y, [x, gate], retain_graph=True), torch.autograd.grad(y, [x, gate])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ("x", "gate", "both"))
def test_inputs_that_need_no_gradient(frozen: str) -> None:
    x, gate, linear = leaves()
    x.requires_grad_(frozen == "gate")
    gate.requires_grad_(frozen == "x")
    wanted = [*(t for t in (x, gate) if t.requires_grad), *linear.parameters()]
    pairs = zip(
        torch.autograd.grad(linear(gated(x, gate)).sum(), wanted),
        torch.autograd.grad(with_remade(linear, (gated, x, gate)).sum(), wanted),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_under_autocast_it_is_made_as_it_was() -> None:
    x, gate, linear = leaves()
    product = lambda x, gate: (x @ gate.mT) @ gate  # noqa: E731  # a product, so that autocast rounds
    grads = []
    for call in (lambda: linear(product(x, gate)), lambda: with_remade(linear, (product, x, gate))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call()
        grads.append(torch.autograd.grad(y.float().sum(), [x, gate, *linear.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_changed_input_is_noticed() -> None:
    x, gate, linear = leaves()
    stream = x * 1
    y = with_remade(linear, (gated, stream, gate))
    stream.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("causal", (False, True))
def test_the_layer_holds_less_and_gives_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = ChelaLayer(64, l_max=512, causal=causal), torch.randn(4, 512, 64)
    again = copy.deepcopy(layer)
    outputs = [layer(x)]  # from the second call on there are no caches to fill
    memory = peak_memory(lambda: outputs.append(layer(x)))
    monkeypatch.setattr("chela.layers.mixers.chela.with_remade", lambda use, *made: use(*(f(*x) for f, *x in made)))
    assert memory < 0.75 * peak_memory(lambda: outputs.append(again(x)))
    for y in outputs[1:]:
        y.square().sum().backward()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_nothing_of_a_graph_outlives_it() -> None:
    """No collector sees a circle through autograd's nodes: it would keep all that comes before it for ever."""

    def nodes() -> int:
        gc.collect()
        return sum(issubclass(type(x), BackwardCFunction) for x in gc.get_objects())

    x, gate, linear = leaves()
    back = nn.Linear(4, 8)
    before = nodes()
    for _ in range(3):
        h = with_remade(linear, (gated, with_remade(back, (F.silu, linear(x))), gate))
        h.sum().backward()
        del h
    assert nodes() == before
