"""Each system against its dense float64 statement, forward and backward, with and without padding."""

import pytest
import torch

from tests.layers.mixers.systems import CASES, D_MODEL, IDS, SYSTEMS


def _mask(kind: str, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.arange(length) < torch.tensor([[length], [length - 4]])
    mask[0, 0] = mask[1, 2] = mask[1, 3] = False
    return mask


@pytest.mark.parametrize(("length", "kind"), [(1, "none"), (2, "none"), (13, "none"), (13, "holes")])
@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_equals_its_definition(name, causal, length, kind):
    system = SYSTEMS[name]
    layer = system.build(causal)
    torch.manual_seed(0)
    x = torch.randn(2, length, D_MODEL, dtype=torch.float64, requires_grad=True)
    mask = _mask(kind, length)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask

    stream = torch.randn(2, length, D_MODEL, dtype=torch.float64, requires_grad=True)

    got, expected = layer(x, mask, **system.context(stream)), system.defined(layer, x, real, stream)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(layer(x, mask), system.defined(layer, x, real, x), rtol=1e-8, atol=1e-9)

    weights = torch.randn_like(expected)
    leaves = {"x": x, "stream": stream} | dict(layer.named_parameters())
    grads = [
        torch.autograd.grad((weights * output).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for output in (got, expected)
    ]
    assert (grads[0][1].abs().max() > 0) == bool(system.context(stream))
    for leaf, a, b in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_every_parameter_matters(name, causal):
    """Each parameter moves the output, so that the comparison above can see a mistake in any of them."""
    layer = SYSTEMS[name].build(causal)
    torch.manual_seed(0)
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64)
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    silent = {name for name, p in layer.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not silent
