"""Every backend is held to the float64 definition, output and gradients, by the same template."""

from __future__ import annotations

import sys

import pytest
import torch

from chela.ops.linear_attention import cpu
from tests.ops.linear_attention.cases import TOLERANCE, Case, cases, draw, error_ratios, run

attention = sys.modules["chela.ops.linear_attention"]  # chela.ops has a function of that name
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(case: Case, *backends: str, chunk_size: int | None = None) -> None:
    ratios = error_ratios(case, draw(case), *backends, chunk_size=chunk_size)
    wrong = {place: ratio for place, ratio in ratios.items() if not ratio <= TOLERANCE[case.dtype]}
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("case", cases(DTYPES), ids=str)
def test_agrees_with_the_definition(case: Case) -> None:
    check(case, "chunked", "plain")


@pytest.mark.parametrize("case", [case for case in cases(DTYPES) if case.L <= 64], ids=str)
def test_short_sequences_in_chunks_agree_with_the_definition(case: Case) -> None:
    check(case, "chunked", chunk_size=16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_padding_at_the_end_agrees_with_the_definition(causal: bool, decay: str, normalize: bool) -> None:
    case = Case(61, 8, 6, causal, decay, True, normalize, torch.float64)
    drawn = draw(case)
    drawn["mask"] = torch.arange(61) < torch.tensor([[23], [50]])
    expected = run(case, drawn, "reference")
    for chunk_size in (16, None):
        got = run(case, drawn, "chunked", chunk_size)
        assert not got["out"][~drawn["mask"]].any()
        for name, x in got.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", cases(DTYPES)[::5], ids=str)
def test_reference_keeps_its_dtype_and_gradients(case: Case) -> None:
    check(case, "reference")


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_bidirectional_products_in_bfloat16_agree_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, normalize: bool, mask: bool
) -> None:
    """As on tensor cores: factors are bfloat16."""
    monkeypatch.setattr(attention, "factor_dtype", lambda c: torch.bfloat16)
    for L in (1, 17, 1000):
        check(Case(L, 16, 24, False, "none", mask, normalize, torch.bfloat16), "chunked")


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weighted = cpu.Segment.weighted
    monkeypatch.setattr(cpu.Segment, "weighted", lambda *given: 1.001 * weighted(*given))
    with pytest.raises(AssertionError, match="'d_k'"):
        check(Case(500, 16, 16, True, "head", False, False), "chunked")
