"""The CHELA layer: the equations written out once more; what holds for every mixer is in mixers/."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chela.layers.mixers.chela import ChelaLayer

D, L_MAX = 6, 24


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> ChelaLayer:
    return ChelaLayer(D, l_max=L_MAX, **{"d_qk": 4, "d_value": 8, "heads": 2, **options}).to(dtype).eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", ["none", "fixed"])
@pytest.mark.parametrize("attention", ["select", "pool", "both"])
def test_is_the_equations(attention: str, decay: str, causal: bool) -> None:
    """The definition of the docstring, with direct sums in place of the ops; the convolution has its own tests."""
    m = layer(attention=attention, decay=decay, causal=causal, layer=1, depth=4)
    for parameter in m.parameters():
        parameter.data.normal_(std=0.5)
    x, stream = torch.randn(2, 1, 9, D, dtype=torch.float64)
    c, v = m.conv(x), F.silu(m.value(x))
    at, parts = torch.arange(9), []
    for core, values in zip(m.cores, v.split([core.width for core in m.cores], -1), strict=True):
        heads, pools = [], core.heads == 1
        for h, value in enumerate(values.chunk(core.heads, -1)):
            z = (c @ core.project.weight.T + core.project.bias)[..., 4 * h : 4 * h + 4]
            q, k = (z * core.gamma[i, h] + core.beta[i, h] for i in (0, 1))
            weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT if pools else F.silu(q) @ F.silu(k).mT
            slope = 0 if pools or decay == "none" else (0.0625, 0.00390625)[h] * (1 - 1 / 3 + 1e-5)
            weights = weights * torch.exp(-slope * (at[:, None] - at).abs())
            weights = weights.tril() if causal else weights
            heads.append(weights @ value / (weights.sum(-1, keepdim=True) if pools else 1))
        parts.append(core.norm(torch.cat(heads, -1)))
    h = F.silu(m.skip(c) + m.out(torch.cat(parts, -1) * F.silu(m.gate_in(c))))
    torch.testing.assert_close(m(x, stream=stream), torch.sigmoid(m.highway(c)) * (h - stream), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_one_head_need_not_be_normalised(causal: bool) -> None:
    """Its division by the sum of the weights is one factor a position, which the norm undoes."""
    x = torch.randn(2, L_MAX, D, dtype=torch.float64)
    for heads, same in ((1, True), (2, False)):
        options = {"causal": causal, "heads": heads, "attention": "select", "feature_map": "elu"}
        divided, plain = (layer(normalize=normalize, **options) for normalize in (True, False))
        divided.cores[0].norm.eps = plain.cores[0].norm.eps = 0.0
        with torch.no_grad():
            for parameter in divided.parameters():
                parameter.normal_()
        plain.load_state_dict(divided.state_dict())
        assert torch.allclose(divided(x), plain(x), rtol=0, atol=1e-9) == same


@pytest.mark.parametrize("option", [{"conv": "wide"}, {"attention": "softmax"}, {"gate": "x"}, {"feature_map": "relu"}])
def test_unknown_names_say_what_is_known(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected one of .*, got"):
        ChelaLayer(D, l_max=L_MAX, **option)


def test_heads_must_divide_the_value_width() -> None:
    with pytest.raises(ValueError, match="expected a multiple of heads=3, got 8"):
        layer(heads=3, attention="select")
    with pytest.raises(ValueError, match="expected a multiple of heads=4, got 3"):
        layer(heads=4, d_value=3)
    assert not layer(heads=3, attention="none").cores  # which are not there


@pytest.mark.parametrize("pools", [True, False])
def test_weights_that_are_divided_are_not_rounded_under_autocast(pools: bool) -> None:
    core = layer(torch.float32, attention="pool" if pools else "select").cores[0]
    c, v = torch.randn(2, L_MAX, D), torch.randn(2, L_MAX, 8)
    exact = core(c, v, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(core(c, v, None), exact) == pools
