"""The public function: what it refuses and what it says."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from chela.ops import LinearAttentionState, backend, backends, linear_attention
from chela.ops.backend import Problem, choose

Q = torch.randn(2, 10, 3, 4)
V = torch.randn(2, 10, 3, 5)
STATE = LinearAttentionState(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4))

WRONG = [
    ({"q": Q[0]}, "expected q of shape (B, L, H, D), got (10, 3, 4)"),
    ({"k": Q[:, :9]}, "expected k of shape (B=2, L=10, H=3, D=4), got (2, 9, 3, 4)"),
    ({"v": V[:1]}, "expected v of shape (B=2, L=10, H=3, E), got (1, 10, 3, 5)"),
    ({"v": V.half()}, "of one dtype, got torch.float32, torch.float32, torch.float16; cast them"),
    ({"mask": torch.ones(2, 10)}, "a bool mask of shape (2, 10), True = real token, got torch.float32 (2, 10)"),
    ({"log_decay": torch.zeros(2)}, "expected log_decay of shape (H=3) or (B=2, L=10, H=3), got (2,)"),
    ({"causal": True, "log_decay_back": torch.zeros(3)}, "drop it or set causal=False"),
    ({"causal": False, "log_decay_back": torch.zeros(3)}, "without log_decay"),
    ({"causal": False, "initial_state": STATE}, "need causal=True"),
    ({"causal": False, "return_state": True}, "need causal=True"),
    ({"initial_state": LinearAttentionState(STATE.z, STATE.z)}, "initial_state.S of shape (B=2, H=3, D=4, E=5), got"),
    ({"chunk_size": 0}, "expected chunk_size ≥ 1 or None, got 0"),
    ({"backend": "fast"}, "expected backend 'auto' or one of"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[m for _, m in WRONG])
def test_errors_say_what_was_expected(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        linear_attention(**{"q": Q, "k": Q, "v": V, "causal": True, **changed})
    assert "\n" not in str(error.value)


def test_one_decay_of_each_kind() -> None:
    head, token = torch.full((3,), -0.5), torch.full((2, 10, 3), -0.5)
    a = linear_attention(Q, Q, V, causal=False, log_decay=head, log_decay_back=token)
    torch.testing.assert_close(a, linear_attention(Q, Q, V, causal=False, log_decay=head))


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    with pytest.warns(RuntimeWarning, match="'triton' cannot run on cuda .*is not installed.*trying the next one"):
        assert choose("linear_attention", "auto", Problem(torch.device("cuda"))).name == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("linear_attention", "auto", Problem(torch.device("cuda"))).name == "chunked"
        assert choose("linear_attention", "auto", Problem(torch.device("cpu"))).name == "chunked"
    with pytest.raises(ValueError, match="pip install triton"):
        choose("linear_attention", "triton", Problem(torch.device("cuda")))
    assert "not installed" in backends("cuda")["linear_attention"]["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_where_there_is_no_card_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA device" in str(backends("cuda")["linear_attention"]["triton"])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, 257)])
def test_auto_passes_over_a_backend_with_limits_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the machine is no reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = Problem(torch.device("cuda"), dtype, (width, 8))
        assert choose("linear_attention", "auto", problem).name == "chunked"
        assert choose("linear_attention", "auto", Problem(torch.device("cuda"), torch.float32, (256,))).name == "triton"
