from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chela.layers.norm import MaskedBatchNorm
from chela.ops.padding import fill_rows_, rows_where, zero_padding

MASKS = {
    "some": torch.tensor([[True, True, False], [True, False, False]]),
    "none absent": torch.ones(2, 3, dtype=torch.bool),
    "all absent": torch.zeros(2, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rows_are_filled(mask: torch.Tensor) -> None:
    x = torch.randn(2, 3, 4)
    expected = torch.where(mask[..., None], x, 7.0)
    assert fill_rows_(x, rows_where(~mask), 7.0) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_padding_becomes_zero_whatever_stood_there_and_gets_no_gradient(mask: torch.Tensor) -> None:
    x = torch.randn(2, 3, 4)
    x[~mask] = float("nan")
    x.requires_grad_()
    y = zero_padding(x, mask)
    torch.testing.assert_close(y, torch.where(mask[..., None], x, 0.0), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    torch.testing.assert_close(gradient, 2.0 * mask[..., None].expand(2, 3, 4), rtol=0, atol=0)


WRONG = {
    "int": torch.ones(2, 3, dtype=torch.int64),
    "float": torch.ones(2, 3),
    "shorter": torch.ones(2, 2, dtype=torch.bool),
    "one row": torch.ones(1, 3, dtype=torch.bool),
    "flat": torch.ones(6, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("layer", [zero_padding, MaskedBatchNorm(4)], ids=["zero_padding", "batch norm"])
def test_a_mask_of_another_dtype_or_shape_is_refused(layer: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a bool mask of shape \(2, 3\), True = real token, got torch\."):
        layer(torch.randn(2, 3, 4), mask)


def test_zero_padding_of_tensors_without_values() -> None:
    with FakeTensorMode():
        y = zero_padding(torch.empty(2, 3, 4), torch.empty(2, 3, dtype=torch.bool))
    assert y.shape == (2, 3, 4)
