"""torch.compile takes every mixer whole: no graph break, the same numbers, forward and backward."""

import pytest
import torch

from tests.layers.mixers.systems import CASES, D_MODEL, IDS, SYSTEMS

FAST = {("chela", False), ("lion_s", False), ("mega", False), ("s4d", False)}  # mega's average is chela's "ema" kernel


@pytest.mark.parametrize(
    ("name", "causal"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
    ids=IDS,
)
def test_compiles_whole(name, causal):
    torch._dynamo.reset()
    layer = SYSTEMS[name].build(causal)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (20, 33):  # the second makes the length a symbol
        _same(layer, compiled, length)


def _same(layer, compiled, length):
    torch.manual_seed(0)
    x = torch.randn(2, length, D_MODEL, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(length) < torch.tensor([[length], [17]])
    results = []
    for module in (layer, compiled):
        out = module(x, mask)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
