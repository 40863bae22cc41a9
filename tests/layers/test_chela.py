"""The CHELA layer: the equations written out once more; what holds for every mixer is in mixers/."""

from typing import Any

import pytest
import torch

from chela.layers.mixers.chela import ChelaLayer

D, L_MAX = 6, 24


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> ChelaLayer:
    return ChelaLayer(D, l_max=L_MAX, **{"d_qk": 4, "d_value": 8, "heads": 2, **options}).to(dtype).eval()


@pytest.mark.parametrize("option", [{"conv": "wide"}, {"attention": "softmax"}, {"gate": "x"}, {"qk": "both"}])
def test_unknown_names_say_what_is_known(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected one of .*, got"):
        ChelaLayer(D, l_max=L_MAX, **option)


@pytest.mark.parametrize("shape", [(2, 9, D + 1), (2, 0, D), (9, D)])
def test_an_input_of_another_shape_is_the_layers_own_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"expected x of shape \(B, L, {D}\) with L of at least 1, got \({shape[0]}, "
    ):
        layer(torch.float32)(torch.zeros(shape))


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
