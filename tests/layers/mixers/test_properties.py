"""What holds for every mixer: padding is absent, causal sees no future, any length and dtype."""

import pytest
import torch

from tests.layers.mixers.systems import CASES, D_MODEL, IDS, SYSTEMS


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(3, 40, D_MODEL, dtype=torch.float64)


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_appended_padding_changes_nothing(name, causal, x):
    layer = SYSTEMS[name].build(causal)
    mask = torch.ones(3, 40, dtype=torch.bool)
    longer = torch.cat([x, torch.full((3, 60, D_MODEL), 7.0, dtype=torch.float64)], dim=1)
    padded = layer(longer, torch.nn.functional.pad(mask, (0, 60)))[:, :40]
    torch.testing.assert_close(padded, layer(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(padded, layer(x, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_padding_may_hold_anything(name, causal, x):
    """Outputs and all gradients are those with zeros there; no gradient reaches it."""
    layer = SYSTEMS[name].build(causal)
    mask = (torch.arange(40) < torch.tensor([[40], [23], [0]])) & (torch.arange(40) % 7 != 3)
    mask &= torch.arange(40) >= torch.tensor([[5], [0], [0]])  # on the left too
    results = []
    for filled in (0.0, float("nan"), float("inf")):
        leaves = [t.masked_fill(~mask[..., None], filled).requires_grad_() for t in (x, x.flip(1))]
        h = layer(leaves[0], mask, **SYSTEMS[name].context(leaves[1]))
        assert (h[~mask] == 0).all()
        grads = torch.autograd.grad(h.square().sum(), [*leaves, *layer.parameters()], allow_unused=True)
        assert all((grad[~mask] == 0).all() for grad in grads[:2] if grad is not None)
        results.append([h, *(grad for grad in grads if grad is not None)])
    assert all(torch.isfinite(zeros).all() for zeros in results[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_a_mask_of_another_dtype_or_shape_is_refused(name, causal, x):
    layer = SYSTEMS[name].build(causal)
    for mask in (torch.ones(3, 40, dtype=torch.int64), torch.ones(3, 30) > 0, torch.ones(1, 40) > 0):
        with pytest.raises(ValueError, match=r"expected a bool mask .*\(3, 40\), True = real token, got torch\."):
            layer(x, mask)


@pytest.mark.parametrize("name", [name for name, causal in CASES if causal])
def test_causal_sees_no_future(name, x):
    layer = SYSTEMS[name].build(True)
    later = x.clone()
    later[:, 17:] = torch.randn_like(later[:, 17:])
    torch.testing.assert_close(layer(x)[:, :17], layer(later)[:, :17], rtol=0, atol=1e-10)
    assert not torch.allclose(layer(x)[:, 17:], layer(later)[:, 17:])


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
@torch.no_grad()
def test_single_precision_stays_near_double(name, causal):
    layer = SYSTEMS[name].build(causal)
    inputs = [torch.randn(2, length, D_MODEL, dtype=torch.float64) for length in (1, 2, 15, 63, 130)]
    exact = [layer(x) for x in inputs]
    layer.float()
    for x, double in zip(inputs, exact, strict=True):
        assert (layer(x.float()) - double).norm() <= 2e-5 * double.norm(), f"{x.shape[1]} tokens"


@pytest.mark.parametrize(("name", "causal"), CASES, ids=IDS)
def test_bf16_autocast_runs_and_stays_near(name, causal, x):
    layer = SYSTEMS[name].build(causal).float()
    x = x.float()
    mask = torch.arange(40) < torch.tensor([[40], [23], [9]])
    exact = layer(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, mask)
    out.float().square().sum().backward()
    assert (out.float() - exact)[mask].norm() <= 0.05 * exact[mask].norm()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
