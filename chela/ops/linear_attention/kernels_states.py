# mypy: ignore-errors
"""What the Triton kernels of linear attention share, and those of states: what each chunk adds, and their scan.

Shape legend: B batch, L tokens, H heads, D and E widths, n chunks of NB blocks of BT tokens. Tokens ``(B, L, H, ·)``,
states ``(B, H, n, D, E)`` float32, per-token numbers ``(B, H, L)`` float32. README.md derives what is computed here.

Every sum has one owner, so there are no atomics and two runs agree bit by bit. Whatever grows with B, L or H is
multiplied in int64: program ids are widened first, and every product begins with one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, tokens, columns, H, W, real):
    """Load rows ``tokens`` and ``columns`` of one head of ``(L, H, W)``; zero where not real or beyond W."""
    offsets = tokens.to(tl.int64)[:, None] * (H * W) + columns[None, :]
    return tl.load(base + offsets, mask=real[:, None] & (columns < W)[None, :], other=0.0)


@triton.jit
def load_real(mask_ptr, b, tokens, L, MASKED: tl.constexpr):
    """Return which tokens exist and are not masked."""
    real = tokens < L
    if MASKED:
        real = real & (tl.load(mask_ptr + b * L + tokens, mask=real, other=0) != 0)
    return real


@triton.jit
def load_tokens(ptr, start, tokens, real, WANTED: tl.constexpr):
    """Load a number per token, 0 where not real; zeros when not wanted."""
    if WANTED:
        numbers = tl.load(ptr + start + tokens, mask=real, other=0.0)
    else:
        numbers = tl.zeros_like(tokens).to(tl.float32)
    return numbers


@triton.jit
def load_sums(base, sum_part, position, WANTED: tl.constexpr):
    """Load both floats of the sums of log decays at positions of a chunk; zeros when not wanted."""
    if WANTED:
        high, low = tl.load(base + position), tl.load(base + sum_part + position)
    else:
        high, low = tl.zeros_like(position).to(tl.float32), tl.zeros_like(position).to(tl.float32)
    return high, low


@triton.jit
def border_decay(base, sum_part, last, high, low, LEFT: tl.constexpr):
    """Return the decay between tokens and the left border of their chunk (LEFT) or its last token."""
    if LEFT:
        decay = tl.exp(high + low)
    else:
        decay = tl.exp(tl.load(base + last) - high + (tl.load(base + sum_part + last) - low))
    return decay


@triton.jit(do_not_specialize=["L", "chunks", "NB", "sum_part", "sum_b", "sum_h", "sum_n"])
def states_kernel(
    x_ptr, y_ptr, out_ptr, z_ptr, mask_ptr, scale_ptr, delta_ptr, sums_ptr,
    L, H, D, E, chunks, NB, sum_part, sum_b, sum_h, sum_n,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SUFFIX: tl.constexpr,
    DECAY: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, WITH_Z: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what each chunk adds to a state: Σ_t w_t x_t y_tᵀ, and Σ_t w_t g_t x_t to z.

    w_t is the decay to the border where the state leaves the chunk, times ``scale`` when SCALED; g_t is 1, or −delta_t.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunk, bh = pid % chunks, pid // chunks
    b, h = bh // H, bh % H
    e_blocks = tl.cdiv(E, BE)
    d = (tl.program_id(1) // e_blocks) * BD + tl.arange(0, BD)
    e = (tl.program_id(1) % e_blocks) * BE + tl.arange(0, BE)
    x_base, y_base = x_ptr + (b * L * H + h) * D, y_ptr + (b * L * H + h) * E
    sums_base = sums_ptr + b * sum_b + h * sum_h + chunk * sum_n
    state = tl.zeros((BD, BE), dtype=tl.float32)
    z = tl.zeros((BD,), dtype=tl.float32)
    for block in range(NB):
        position = block * BT + tl.arange(0, BT)
        t = chunk * (NB * BT) + position
        real = load_real(mask_ptr, b, t, L, MASKED)
        x = load_tile(x_base, t, d, H, D, real)
        y = load_tile(y_base, t, e, H, E, real)
        if DECAY or SCALED:
            w = tl.full((BT,), 1.0, dtype=tl.float32)
            if DECAY:
                high, low = load_sums(sums_base, sum_part, position, True)
                w = border_decay(sums_base, sum_part, NB * BT - 1, high, low, SUFFIX)
            if SCALED:
                w = w * tl.load(scale_ptr + bh * L + t, mask=real, other=0.0)
            x = (x.to(tl.float32) * w[:, None]).to(DOT)
        state = tl.dot(tl.trans(x.to(DOT)), y.to(DOT), state, input_precision=PRECISION)
        if WITH_Z:
            if SCALED:
                g = -tl.load(delta_ptr + bh * L + t, mask=real, other=0.0)
                z += tl.sum(x.to(tl.float32) * g[:, None], 0)
            else:
                z += tl.sum(x.to(tl.float32), 0)
    inside = (d < D)[:, None] & (e < E)[None, :]
    offsets = d[:, None].to(tl.int64) * E + e[None, :]
    tl.store(out_ptr + (bh * chunks + chunk) * D * E + offsets, state, mask=inside)
    if WITH_Z and tl.program_id(1) % e_blocks == 0:
        tl.store(z_ptr + (bh * chunks + chunk) * D + d, z, mask=d < D)


@triton.jit(do_not_specialize=["chunks", "sum_part", "sum_b", "sum_h", "sum_n", "last"])
def scan_kernel(
    states_ptr, start_ptr, end_ptr, sums_ptr, met_ptr, through_ptr,
    H, M, chunks, sum_part, sum_b, sum_h, sum_n, last,
    BM: tl.constexpr, SUFFIX: tl.constexpr, DECAY: tl.constexpr, STARTED: tl.constexpr, MEETS: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds, ``(B, H, n, M)``, into the state that reaches it, in place; write the last.

    MEETS also writes its inner product with the state that comes the other way, a part for each program along axis 1.
    """
    bh = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    sums_base = sums_ptr + (bh // H) * sum_b + (bh % H) * sum_h
    carry = tl.zeros((BM,), dtype=tl.float32)
    if STARTED:
        carry = tl.load(start_ptr + bh * M + m, mask=m < M, other=0.0)
    for step in range(chunks):
        at = bh * chunks + (chunks - 1 - step if SUFFIX else step)
        place = states_ptr + at * M + m
        own = tl.load(place, mask=m < M, other=0.0)
        tl.store(place, carry, mask=m < M)
        if MEETS:
            met = tl.load(met_ptr + at * M + m, mask=m < M, other=0.0)
            part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * chunks
            tl.store(through_ptr + part + at, tl.sum(carry * met, 0))
        if DECAY:
            end = sums_base + (at - bh * chunks) * sum_n + last
            carry = carry * tl.exp(tl.load(end) + tl.load(end + sum_part))
        carry += own
    tl.store(end_ptr + bh * M + m, carry, mask=m < M)


@triton.jit(do_not_specialize=["L", "blocks"])
def delta_kernel(
    d_out_ptr, out_ptr, total_ptr, mask_ptr, scale_ptr, delta_ptr, L, H, E, eps, blocks,
    BT: tl.constexpr, BE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write scale = 1 / (eps + total) and delta = d_out · out per token: what division adds."""
    pid = tl.program_id(0).to(tl.int64)
    block, bh = pid % blocks, pid // blocks
    b, h = bh // H, bh % H
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    real = load_real(mask_ptr, b, t, L, MASKED)
    base = (b * L * H + h) * E
    d_out = load_tile(d_out_ptr + base, t, e, H, E, real).to(tl.float32)
    out = load_tile(out_ptr + base, t, e, H, E, real).to(tl.float32)
    total = tl.load(total_ptr + bh * L + t, mask=real, other=0.0)
    tl.store(scale_ptr + bh * L + t, 1.0 / tl.where(real, eps + total, 1.0), mask=t < L)
    tl.store(delta_ptr + bh * L + t, tl.sum(d_out * out, 1), mask=t < L)
