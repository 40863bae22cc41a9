"""A stage's own backward pass against its plain statement, and what is computed again instead of held."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela import ChelaLayer
from chela.layers import stages
from experiments.bench.timing import peak_memory

LINEAR = nn.Linear(6, 4).double()


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def scaled(z: Tensor, gamma: Tensor, beta: Tensor, positive: bool) -> Tensor:
    return torch.stack(stages.queries_and_keys(z, gamma, beta, positive=positive))


STAGES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "gate": (lambda gate, x, *_: stages.gated_linear(LINEAR, gate, x), [(3, 5, 6), (3, 5, 6)]),
    "feed-forward": (lambda gate, *_: stages.gated_linear(LINEAR, gate), [(5, 6)]),
    "highway": (stages.highway, [(3, 5, 6)] * 3),
    "selecting": (lambda *x: scaled(*x, positive=False), [(3, 5, 6), (2, 2, 3), (2, 2, 3)]),
    "pooling": (lambda *x: scaled(*x, positive=True), [(3, 5, 6), (2, 2, 3), (2, 2, 3)]),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_its_plain_statement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stage, shapes = STAGES[name]
    leaves = [leaf(*shape) for shape in shapes]
    wanted = [*leaves, *(LINEAR.parameters() if name in ("gate", "feed-forward") else ())]
    found = []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr(stages, "by_hand", lambda *_: False)
        y = stage(*leaves)
        assert ("Backward" in type(y.grad_fn).__name__) and y.requires_grad
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad((weights * y).sum(), wanted)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STAGES)
def test_gradients_are_those_of_differences(name: str) -> None:
    torch.manual_seed(0)
    stage, shapes = STAGES[name]
    assert torch.autograd.gradcheck(stage, [leaf(*shape) for shape in shapes])


def test_under_autocast_it_is_the_plain_statement() -> None:
    linear, gate = copy.deepcopy(LINEAR).float(), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stages.gated_linear(linear, gate), linear(F.silu(gate)))


@pytest.mark.parametrize("causal", (False, True))
def test_the_layer_holds_less_and_gives_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = ChelaLayer(64, l_max=512, causal=causal), torch.randn(4, 512, 64)
    again = copy.deepcopy(layer)
    monkeypatch.setattr(stages, "SMALL_ELEMENTS", 0)
    outputs = [layer(x)]  # from the second call on there are no caches to fill
    memory = peak_memory(lambda: outputs.append(layer(x)))
    monkeypatch.setattr(stages, "SMALL_ELEMENTS", 2**40)
    monkeypatch.setattr(stages, "by_hand", lambda *_: False)
    assert memory < 0.75 * peak_memory(lambda: outputs.append(again(x)))
    for y in outputs[1:]:
        y.square().sum().backward()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3 * float(b.grad.abs().max()))
