"""Each op on pieces of a sequence against its definition on the whole, in float64, with gradients."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chela.ops import fft_conv, linear_attention, sequence_parallel, short_conv
from chela.ops.linear_attention import LinearAttentionState
from chela.ops.sequence_parallel import Piece
from tests.processes import in_processes

LENGTHS = (1, 2, 13, 37)  # with no token in some piece, and none a multiple of the processes
TAPS = ((5, False), (4, True), (31, False))  # halos longer than a piece too
Case = tuple[Any, ...]
Result = dict[str, Tensor]


def cases() -> list[Case]:
    directions = [(True, decay, "") for decay in ("none", "head", "token")]
    directions += [(False, decay, back) for decay, back in (("none", ""), ("head", "head"), ("token", "head"))]
    found: list[Case] = [
        ("attention", L, *direction, normalize, masked)
        for L, direction, normalize in itertools.product(LENGTHS, directions, (False, True))
        for masked in ((True, False) if L == 13 else (L == 37,))
    ]
    found += [("short", L, *taps) for L in LENGTHS for taps in TAPS]
    found += [("long", L, channels, causal) for L in LENGTHS for channels in (2, 7) for causal in (False, True)]
    return found


def attention(case: Case, generator: torch.Generator, backend: str, piece: Piece | None) -> Result:
    L, causal, decay, back, normalize, masked = case[1:]
    B, H, D, E = 2, 2, 3, 4

    def decays(kind: str) -> Tensor | None:
        shape = {"head": (H,), "token": (B, L, H)}.get(kind)
        if shape is None:
            return None
        steps = -3 * torch.rand(*shape, generator=generator, dtype=torch.float64)
        return steps.masked_fill_(steps < -2.9, -torch.inf) if kind == "token" else steps

    q, k = (torch.rand(B, L, H, D, generator=generator, dtype=torch.float64) + 0.1 for _ in "qk")
    v = torch.randn(B, L, H, E, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, L, generator=generator) > 0.4 if masked else None
    tensors = {"q": q, "k": k, "v": v, "log_decay": decays(decay), "log_decay_back": decays(back)}
    mine = {name: leaf(x, piece, cut=x.ndim > 2) for name, x in tensors.items() if x is not None}
    mask = mask if piece is None or mask is None else piece.cut(mask)
    out = linear_attention(**mine, mask=mask, causal=causal, normalize=normalize, backend=backend)
    return with_gradients(out, mine, generator, (B, L, H, E), piece)


def short(case: Case, generator: torch.Generator, backend: str, piece: Piece | None) -> Result:
    L, taps, causal = case[1:]
    x = torch.randn(2, L, 3, generator=generator, dtype=torch.float64)
    mine = {"x": leaf(x, piece)}
    mine["weight"] = leaf(torch.randn(3, taps, generator=generator, dtype=torch.float64), piece, cut=False)
    out = short_conv(**mine, causal=causal, silu=True, backend=backend)
    return with_gradients(out, mine, generator, x.shape, piece)


def long(case: Case, generator: torch.Generator, backend: str, piece: Piece | None) -> Result:
    L, C, causal = case[1:]
    u = torch.randn(2, L, C, generator=generator, dtype=torch.float64)
    kernels = {"kernel": (C, L), "kernel_back": (C, max(1, L - 1)), "skip": (C,)}
    mine = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in kernels.items()}
    if causal:
        del mine["kernel_back"]
    mine = {"u": leaf(u, piece)} | {name: leaf(x, piece, cut=False) for name, x in mine.items()}
    channels = slice(None) if piece is None else piece.channels(C)
    out = fft_conv(mine["u"], **{name: x[channels] for name, x in mine.items() if name != "u"}, backend=backend)
    return with_gradients(out, mine, generator, u.shape, piece)


def leaf(x: Tensor, piece: Piece | None, *, cut: bool = True) -> Tensor:
    return (piece.cut(x) if cut and piece is not None else x).detach().clone().requires_grad_()


def with_gradients(
    out: Tensor, leaves: dict[str, Tensor], generator: torch.Generator, shape: Any, piece: Piece | None
) -> Result:
    weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
    weights = weights if piece is None else piece.cut(weights)
    gradients = torch.autograd.grad(out, list(leaves.values()), weights, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def solve(case: Case, number: int, backend: str, piece: Piece | None = None) -> Result:
    generator = torch.Generator().manual_seed(number)
    return {"attention": attention, "short": short, "long": long}[case[0]](case, generator, backend, piece)


def work(chosen: list[Case]) -> list[Any]:
    """What this process finds for each case."""
    found: list[Any] = []
    for number, case in enumerate(chosen):
        with sequence_parallel(case[1]) as piece:
            found.append(solve(case, number, "auto", piece))
    with sequence_parallel(4), pytest.raises(ValueError, match="expected no state inside sequence_parallel"):
        q = torch.ones(1, 1, 1, 1)
        linear_attention(q, q, q, causal=True, initial_state=LinearAttentionState.zeros(1, 1, 1, 1))
    return found


def test_pieces_are_the_whole(tmp_path: Path) -> None:
    """Of four processes, so that pieces in the middle pass on and lend beyond their neighbours; networks on fewer are
    in ``tests/training``."""
    results = in_processes(4, tmp_path, work, cases())
    for number, case in enumerate(cases()):
        whole = solve(case, number, "reference")
        of_all = [of_one[number] for of_one in results]
        for name, expected in whole.items():
            parts = [part[name] for part in of_all]
            found = torch.cat(parts, dim=1) if expected.ndim > 2 else torch.stack(parts).sum(0)
            where = f"{case} {name}: found {found}, expected {expected}"
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=where)
