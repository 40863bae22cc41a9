"""The Triton kernels: under the interpreter on a CPU, compiled on a GPU, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from chela.ops import linear_attention
from chela.ops.backend import Problem
from chela.ops.linear_attention import triton as triton_backend
from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.triton import Launch, launches
from tests.ops.linear_attention.cases import Case, cases, draw, run
from tests.ops.linear_attention.test_backends import check

pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()
NO_BF16 = pytest.mark.skipif(INTERPRETED, reason="bfloat16 is silently wrong under the Triton interpreter")
DTYPES = (torch.float32, torch.float16)
# A program of the interpreter takes milliseconds; its tiles are of 64 tokens and up to 128 columns. One value stands
# for each way in which a tile can be filled: in part, wholly, twice; no seed has much fewer rows than this one. The
# whole table is for -m slow.
FAST = cases(DTYPES, lengths=(1, 17, 64), widths=(8, 24, 256), seed=4)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_triton_agrees_with_the_definition(case: Case) -> None:
    check(case, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(DTYPES), ids=str)
def test_every_length_and_width_agrees_with_the_definition(case: Case) -> None:
    check(case, "triton")


# Decays of each token in both directions are below too, in chunks of any number of blocks.
@pytest.mark.parametrize(
    ("decay", "causal"),
    [
        *(("none", True), ("none", False), ("head", True), ("head", False), ("token", True)),
        pytest.param("token", False, marks=pytest.mark.slow),
    ],
)
def test_several_chunks_and_a_ragged_end(decay: str, causal: bool) -> None:
    check(Case(300, 16, 24, causal, decay, decay == "head", decay != "token"), "triton")


@NO_BF16
@pytest.mark.parametrize("case", cases((torch.bfloat16,)), ids=str)
def test_bfloat16_agrees_with_the_definition(case: Case) -> None:
    check(case, "triton")


# The kernels are the same for both kinds of decay, which differ in strides: one kind for each direction, all when slow.
@pytest.mark.parametrize(
    ("decay", "causal"),
    [
        *(("none", True), ("none", False), ("head", False), ("token", True)),
        *(pytest.param(decay, causal, marks=pytest.mark.slow) for decay, causal in (("head", True), ("token", False))),
    ],
)
def test_small_tiles_take_everything_in_parts(decay: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, columns, states and the tokens that are heard; decays are learned in chunks of several blocks."""
    monkeypatch.setattr(triton_backend, "table", lambda p, **_: (Launch(32, 16, 16, 16, 16, 16, 3, 4, 1),))
    check(Case(110, 24, 40, causal, decay, decay != "none", decay != "token"), "triton")


def test_chunks_are_shorter_where_processors_would_be_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of so many, and the numbers stay."""
    wide = Launch(16, 16, 16, 16, 16, 16, 8, 4, 1)
    assert [wide.filling(256, rows, 132).NB for rows in (2, 10, 20, 40, 70, 1000)] == [2, 2, 2, 4, 8, 8]
    monkeypatch.setattr(triton_backend, "table", lambda p, **_: (wide.filling(p.q.shape[1], 10, 132),))
    check(Case(110, 16, 16, True, "head", True, False), "triton")


def test_decay_gradients_hold_in_chunks_of_any_number_of_blocks() -> None:
    for chunk_size in (64, 320):  # one block and five; three are in the small tiles above
        check(Case(300, 8, 16, False, "token", True, True), "triton", chunk_size=chunk_size)


def test_a_wide_value_takes_several_programs() -> None:
    check(Case(70, 8, 200, True, "token", False, True), "triton")


def test_two_runs_are_equal_bit_by_bit() -> None:
    case = Case(100, 16, 16, False, "token", True, True)
    x = draw(case)
    first, second = run(case, x, "triton"), run(case, x, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not INTERPRETED, reason="a CUDA device multiplies as it does")
@pytest.mark.parametrize("products", (1, 3))
def test_three_products_in_tf32_hold_float32s_tolerance_and_one_does_not(
    products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter multiplies in float32; here factors are cut into the 10 bits tensor cores take and a rest."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cut(x: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def dot(self, a, b, d, precision, *rest) -> TensorHandle:
        assert "TF32x3" in str(precision)
        a_high, b_high = cut(a.data), cut(b.data)
        total = a_high @ b_high
        if products == 3:
            total += a_high @ cut(b.data - b_high) + cut(a.data - a_high) @ b_high
        return TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    case = Case(70, 64, 64, False, "token", True, True)
    if products == 3:
        check(case, "triton")
    else:
        with pytest.raises(AssertionError, match="d_k"):
            check(case, "triton")


def test_opcheck() -> None:
    x = {name: t[:1] for name, t in draw(Case(20, 4, 3, True, "token", True, True)).items()}
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "log_decay")]
    state = torch.randn(1, 2, 4, 4, requires_grad=True)
    args = (*leaves, None, x["mask"], state, True, True, True, 1e-6, 0)
    torch.library.opcheck(torch.ops.chela.linear_attention_triton, args)


def test_smaller_tiles_when_the_device_is_out_of_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    tiles = (Launch(64, 64, 64, 64, 64, 64, 2, 4, 1), Launch(16, 16, 16, 16, 16, 16, 2, 4, 1))
    monkeypatch.setattr(triton_backend, "table", lambda p, **_: tiles)
    monkeypatch.setattr(triton_backend, "_fitting", {})
    tried = []

    def needs_small_tiles(launch: Launch) -> str:
        tried.append(launch)
        if launch.BT > 16:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return "done"

    x = torch.zeros(1, 1, 1, 16)
    problem = Call(x, x, x, None, None, None, None, True, False, False, 1e-6, 0)
    assert triton_backend.first_that_fits(problem, needs_small_tiles) == "done"
    assert triton_backend.first_that_fits(problem, needs_small_tiles) == "done"
    assert tried == [*tiles, tiles[1]]  # what did not fit once is not tried again

    monkeypatch.setattr(triton_backend, "table", lambda p, **_: tiles[:1])
    monkeypatch.setattr(triton_backend, "_fitting", {})
    with pytest.raises(RuntimeError, match=re.escape("use backend='chunked'")):
        triton_backend.first_that_fits(problem, needs_small_tiles)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("shared", (32, 64, 99, 163, 227))
def test_there_is_a_tile_for_every_device(dtype: torch.dtype, shared: int) -> None:
    for width in (1, 16, 64, 65, 128, 200, 256):
        found = launches(width, 8, dtype, shared * 1024)
        assert [x.BT for x in found] == sorted((x.BT for x in found), reverse=True)
        assert min(min(x[:6]) for x in found) >= 16  # what a product on tensor cores takes at least
        assert dtype == torch.float32 or min(min(x.BT, x.BR, x.BU) for x in found) >= 32  # rows of states
        assert all(x.BR <= x.BK and x.BT % x.BU == 0 for x in found)
        assert launches(width, 8, dtype, shared * 1024, gradients=True, hopper=True)


def test_what_it_cannot_take_is_refused_or_left_to_chunked() -> None:
    wide, double = torch.randn(1, 4, 1, 300), torch.randn(1, 4, 1, 8, dtype=torch.float64)
    for x in (wide, double):
        with pytest.raises(ValueError, match=r"the kernels take .*; use 'auto' or one of \['chunked'"):
            linear_attention(x, x, x, causal=True, backend="triton")
        assert linear_attention(x, x, x, causal=True).dtype == x.dtype


@pytest.mark.parametrize(
    ("version", "major", "refused"), [("3.7.0", 9, True), ("3.7.1+git", 9, False), ("3.6.0", 10, False)]
)
def test_hopper_needs_a_triton_that_compiles_it_right(
    version: str, major: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(triton_backend, "triton_version", triton_backend.triton_version.__wrapped__)  # no cache
    reason = triton_backend.why_not(Problem(torch.device("cuda"), torch.bfloat16, (64, 64)))
    assert reason == (
        "Triton before 3.7.1 miscompiles such kernels on Hopper; pip install -U triton" if refused else None
    )


@pytest.mark.skipif(not INTERPRETED, reason="a CUDA device is here")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"cannot run on cpu: Triton kernels need a CUDA device"):
        linear_attention(x, x, x, causal=True, backend="triton")


# Of a thread: what is compiled today and a little more. The others take all 255 there are.
REGISTERS = {"out": 232, "dq": 255, "keys": 255, "states": 176}


@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_kernels_compile_within_the_limits_of_the_device(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.linear_attention.compile_kernels", str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 18
    for r in results:
        assert r["shared"] <= r["limit"], r
        assert r["spills"] <= (256 if r["width"] > 128 else 0), r
        assert r["registers"] <= REGISTERS[r["kernel"]], r
        assert r["hgmma"] in (True, None), r
        assert not r["narrow"], r
        # No length and nothing that changes with it, or each new length would compile anew.
        widths = {"H", "D", "E", "WA", "WC", "state_a", "state_c", "eps"}
        assert {name for name in r["specialised"] if not name.endswith("_ptr")} <= widths, r


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases((torch.float32, torch.float16, torch.bfloat16)), ids=str)
def test_on_a_device(case: Case) -> None:
    torch.set_default_device("cuda")
    try:
        check(case, "triton")
    finally:
        torch.set_default_device(None)
