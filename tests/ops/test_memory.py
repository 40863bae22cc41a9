"""Scratch memory is kept by the thread that used it, within bounds, and works whatever mode it was made in."""

from __future__ import annotations

import threading

import pytest
import torch

from chela.ops import linear_attention
from chela.ops.memory import HUGE_BYTES, KEPT_BYTES, Workspace, in_huge_pages

CPU = torch.device("cpu")


def workspace(dtype: torch.dtype = torch.float32) -> Workspace:
    return Workspace(dtype, CPU)


@pytest.fixture(autouse=True)
def nothing_kept():
    Workspace.release()
    yield
    Workspace.release()


def test_the_next_call_takes_the_same_memory_whatever_its_dtype() -> None:
    with workspace() as buffer:
        first = buffer("x", 1000).data_ptr()
    with workspace(dtype=torch.float64) as buffer:
        assert buffer("x", 500).data_ptr() == first


def test_another_thread_has_memory_of_its_own() -> None:
    with workspace() as buffer:
        buffer("x", 1000)
    seen: list[int] = []

    def work() -> None:
        with workspace() as buffer:
            seen.append(buffer("x", 1000).data_ptr())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen and seen[0] != Workspace._thread.named["x"].data_ptr()


def test_what_is_kept_is_bounded() -> None:
    for size in (KEPT_BYTES // 2, KEPT_BYTES, KEPT_BYTES // 3):
        with workspace() as buffer:
            for name in "xyz":
                buffer(name, size // 4)
            with workspace() as inner:
                inner("x", size // 4)
        assert 0 < sum(len(block) for block in Workspace._thread.named.values()) <= KEPT_BYTES


@pytest.mark.parametrize("causal", [True, False])
def test_inference_and_training_share_it(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 70, 3, 8).unbind()
    log_decay = -torch.rand(2, 70, 3)
    with torch.inference_mode():
        expected = linear_attention(q, k, v, causal=causal, log_decay=log_decay, backend="chunked")
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]
    out = linear_attention(*leaves[:3], causal=causal, log_decay=leaves[3], backend="chunked")
    torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(out, expected)
    with torch.inference_mode():
        assert torch.equal(linear_attention(q, k, v, causal=causal, log_decay=log_decay, backend="chunked"), expected)


def test_huge_pages_change_nothing_and_need_no_cpu() -> None:
    x = torch.arange(HUGE_BYTES // 4 + 3, dtype=torch.float32)[1:]
    before = x.clone()
    in_huge_pages(x, torch.empty(HUGE_BYTES, device="meta"), torch.empty(0))
    assert torch.equal(x, before)
