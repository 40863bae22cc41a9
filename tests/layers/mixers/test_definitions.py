"""Each system against its dense float64 statement, forward and backward, with and without padding."""

import pytest
import torch

from tests.layers.mixers.systems import CASES, D_MODEL, IDS, SYSTEMS


def _outputs(update):
    return update if isinstance(update, tuple) else (update,)


def _mask(kind: str, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.arange(length) < torch.tensor([[length], [max(1, length - 4)]])
    if kind == "holes":
        mask = mask.clone()
        mask[0, 0] = mask[1, 2] = mask[1, 3] = False
    return mask


@pytest.mark.parametrize(("length", "kind"), [(1, "none"), (2, "none"), (13, "none"), (13, "right"), (13, "holes")])
@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_equals_its_definition(name, causal, length, kind):
    system = SYSTEMS[name]
    layer = system.build(causal)
    torch.manual_seed(0)
    x = torch.randn(2, length, D_MODEL, dtype=torch.float64, requires_grad=True)
    mask = _mask(kind, length)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask

    got, expected = _outputs(layer(x, mask)), _outputs(system.definition(layer, x, real))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a * real[..., None], b * real[..., None], rtol=1e-8, atol=1e-9)

    weights = [torch.randn_like(b) * real[..., None] for b in expected]
    leaves = {"x": x} | dict(layer.named_parameters())
    grads = [
        torch.autograd.grad(
            sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs in (got, expected)
    ]
    for leaf, a, b in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_every_parameter_matters(name, causal):
    """Each parameter moves the output, so that the comparison above can see a mistake in any of them."""
    layer = SYSTEMS[name].build(causal)
    torch.manual_seed(0)
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64)
    outputs = _outputs(layer(x))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    silent = {name for name, p in layer.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not silent
