# mypy: ignore-errors
"""Triton kernels of linear attention: states of chunks, their scan, one kernel for the output and every gradient.

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
    offsets = tokens[:, None] * (H * W) + columns[None, :]
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


@triton.jit
def states_kernel(
    x_ptr, y_ptr, out_ptr, z_ptr, mask_ptr, scale_ptr, delta_ptr, sums_ptr,
    L, H, D, E, chunks, sum_part, sum_b, sum_h, sum_n,
    BT: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SUFFIX: tl.constexpr,
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


@triton.jit
def scan_kernel(
    states_ptr, start_ptr, end_ptr, sums_ptr,
    H, M, chunks, sum_part, sum_b, sum_h, sum_n, last,
    BM: tl.constexpr, SUFFIX: tl.constexpr, DECAY: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds, ``(B, H, n, M)``, into the state that reaches it, in place; write the last."""
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
        if DECAY:
            end = sums_base + (at - bh * chunks) * sum_n + last
            carry = carry * tl.exp(tl.load(end) + tl.load(end + sum_part))
        carry += own
    tl.store(end_ptr + bh * M + m, carry, mask=m < M)


@triton.jit
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


@triton.jit
def from_state(
    a, a_base, state_ptr, z_ptr, delta, t, real, wc, H, WA, WC, state_a, state_c,
    KIND: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, WITH_Z: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what one state gives to the tokens, ``(BT, BC)``, and to their normaliser, ``(BT,)`` (only "out")."""
    y = tl.zeros((t.shape[0], wc.shape[0]), dtype=tl.float32)
    total = tl.zeros((t.shape[0],), dtype=tl.float32)
    for k in range(0, BA, BK):
        row = k + tl.arange(0, BK)
        a_k = load_tile(a_base, t, row, H, WA, real) if BK < BA else a
        inside = (row < WA)[:, None] & (wc < WC)[None, :]
        state = tl.load(state_ptr + row[:, None] * state_a + wc[None, :] * state_c, mask=inside, other=0.0)
        y = tl.dot(a_k.to(DOT), state.to(DOT), y, input_precision=PRECISION)
        if WITH_Z and KIND == "out":
            z = tl.load(z_ptr + row, mask=row < WA, other=0.0)
            total += tl.sum(a_k.to(tl.float32) * z[None, :], 1)
    if WITH_Z and KIND != "out":
        z = tl.load(z_ptr + wc, mask=wc < WC, other=0.0)
        if KIND == "dk":
            y += z[None, :]
        else:
            y -= delta[:, None] * z[None, :]
    return y, total


@triton.jit
def scores(
    a, a_base, b_base, delta, scale_ptr, delta_ptr, start, t, u, real, real_u, H, WA,
    KIND: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return f(a_i·b_j) for tokens t (rows) and u (columns); "dq" and "out" are scaled by row later."""
    s = tl.zeros((t.shape[0], u.shape[0]), dtype=tl.float32)
    for k in range(0, BA, BK):
        row = k + tl.arange(0, BK)
        a_k = load_tile(a_base, t, row, H, WA, real) if BK < BA else a
        s = tl.dot(a_k, tl.trans(load_tile(b_base, u, row, H, WA, real_u)), s, input_precision=PRECISION)
    if NORMALIZE and KIND == "dq":
        s = s - delta[:, None]
    if NORMALIZE and (KIND == "dk" or KIND == "dv"):
        if KIND == "dk":
            s = s - load_tokens(delta_ptr, start, u, real_u, True)[None, :]
        s = s * load_tokens(scale_ptr, start, u, real_u, True)[None, :]
    return s


@triton.jit
def weighted(
    s, after, before, position, ahead_base, back_base, sum_part, ahead_high, ahead_low, back_high, back_low,
    LOWER: tl.constexpr, UPPER: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Return s M for two blocks of one chunk; ``after`` says where i > j, ``position`` where the tokens j are."""
    if DECAY:
        exponent = tl.zeros_like(s)
        if LOWER:
            high, low = load_sums(ahead_base, sum_part, position, True)
            d = ahead_high[:, None] - high[None, :] + (ahead_low[:, None] - low[None, :])
            exponent = tl.where(after, d, exponent)
        if UPPER:
            high, low = load_sums(back_base, sum_part, position, True)
            d = high[None, :] - back_high[:, None] + (low[None, :] - back_low[:, None])
            exponent = tl.where(before, d, exponent)
        s = s * tl.exp(exponent)
    if not UPPER:
        s = tl.where(before, 0.0, s)
    if not LOWER:
        s = tl.where(after, 0.0, s)
    return s


@triton.jit
def store_flow(flow_ptr, row, flow_part, place, numbers, mask):
    """Store numbers, one per token, in a row of ``flow``; each program along axis 1 has four rows of its own."""
    row = tl.program_id(1).to(tl.int64) * 4 + row
    tl.store(flow_ptr + row * flow_part + place, numbers, mask=mask)


@triton.jit
def attend_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, total_ptr, mask_ptr, scale_ptr, delta_ptr,
    left_ptr, right_ptr, z_left_ptr, z_right_ptr, ahead_ptr, back_ptr, own_ptr, flow_ptr,
    L, H, WA, WC, blocks, states, state_a, state_c, sum_part, sum_b, sum_h, sum_n, flow_part, eps,
    KIND: tl.constexpr, BT: tl.constexpr, NB: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, INTRA: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, WITH_Z: tl.constexpr, FLOW: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Σ_j f(a_i·b_j) M_ij c_j for one block of tokens i and one block of columns of c.

    The sum runs over the tokens of i's own chunk, tile by tile, and over all others through the state that reaches the
    chunk from the left (LOWER: j ≤ i) and from the right (UPPER: j ≥ i).

        KIND   a     b     c     f(s)                       what
        "out"  q     k     v     s, then / (eps + total)    output, and total
        "dq"   d_out v     k     scale_i (s − delta_i)      gradient of q
        "dk"   v     d_out q     scale_j (s − delta_j)      gradient of k, over Mᵀ
        "dv"   k     q     d_out scale_j s                  gradient of v, over Mᵀ

    FLOW (dq and dk, one block per chunk) also writes what flows over the edges of the chunk, for the gradient of
    the log decays. Rows 0, 1 of ``flow``: what each token exchanges with the left and the right state; rows 2, 3
    (dq): what crosses each edge inside the chunk, rightward and leftward.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, bh = pid % blocks, pid // blocks
    b, h = bh // H, bh % H
    chunk = block // NB
    here = tl.arange(0, BT)
    t = block * BT + here
    wc = tl.program_id(1) * BC + tl.arange(0, BC)
    head = b * L * H + h
    a_base, b_base, c_base = a_ptr + head * WA, b_ptr + head * WA, c_ptr + head * WC
    sums_at = b * sum_b + h * sum_h + chunk * sum_n
    ahead_base, back_base = ahead_ptr + sums_at, back_ptr + sums_at
    ahead_high, ahead_low = load_sums(ahead_base, sum_part, (block % NB) * BT + here, DECAY and LOWER)
    back_high, back_low = load_sums(back_base, sum_part, (block % NB) * BT + here, DECAY and UPPER)
    real = load_real(mask_ptr, b, t, L, MASKED)
    # Products over the width of a take BK columns at a time; where that is all of them, a is loaded once, here.
    a = load_tile(a_base, t, tl.arange(0, BK), H, WA, real)
    scale = load_tokens(scale_ptr, bh * L, t, real, KIND == "dq" and NORMALIZE)
    delta = load_tokens(delta_ptr, bh * L, t, real, KIND == "dq" and NORMALIZE)
    flow_at = (bh * blocks + block) * BT + here
    if FLOW:
        own = load_tile(own_ptr + head * WC, t, wc, H, WC, real)

    acc = tl.zeros((BT, BC), dtype=tl.float32)
    total = tl.zeros((BT,), dtype=tl.float32)
    state_at = bh * states + tl.minimum(chunk, states - 1)
    for side in tl.static_range(2):
        if (side == 0 and LOWER) or (side == 1 and UPPER):
            y, part = from_state(
                a, a_base, (left_ptr if side == 0 else right_ptr) + state_at * WA * WC,
                (z_left_ptr if side == 0 else z_right_ptr) + state_at * (WA if KIND == "out" else WC),
                delta, t, real, wc, H, WA, WC, state_a, state_c, KIND, BA, BK, WITH_Z, DOT, PRECISION,
            )  # fmt: skip
            if DECAY:
                if side == 0:
                    weight = border_decay(ahead_base, sum_part, NB * BT - 1, ahead_high, ahead_low, True)
                else:
                    weight = border_decay(back_base, sum_part, NB * BT - 1, back_high, back_low, False)
                y, part = y * weight[:, None], part * weight
            if FLOW:
                exchanged = tl.sum(own.to(tl.float32) * y, 1)
                if KIND == "dq" and NORMALIZE:
                    exchanged = exchanged * scale
                store_flow(flow_ptr, side, flow_part, flow_at, tl.where(real, exchanged, 0.0), here < BT)
            acc += y
            total += part

    if INTRA:
        first = chunk * NB if LOWER else block
        end = tl.minimum(chunk * NB + NB, blocks) if UPPER else block + 1
        for other in range(first, end):
            u = other * BT + here
            real_u = load_real(mask_ptr, b, u, L, MASKED)
            c_tile = load_tile(c_base, u, wc, H, WC, real_u)
            s = scores(
                a, a_base, b_base, delta, scale_ptr, delta_ptr, bh * L, t, u, real, real_u, H, WA,
                KIND, BA, BK, NORMALIZE, PRECISION,
            )  # fmt: skip
            after, before = t[:, None] > u[None, :], t[:, None] < u[None, :]
            s = weighted(
                s, after, before, (other % NB) * BT + here, ahead_base, back_base, sum_part,
                ahead_high, ahead_low, back_high, back_low, LOWER, UPPER, DECAY,
            )  # fmt: skip
            if KIND == "out":
                total += tl.sum(s, 1)
            if FLOW and KIND == "dq":
                w = s * tl.dot(own, tl.trans(c_tile), input_precision=PRECISION)
                if NORMALIZE:
                    w = w * scale[:, None]
                # Over the edge x + 1 goes what token j ≤ x gives to i > x: a sum of what crosses, no difference.
                if LOWER:
                    crossing = tl.where(after, tl.cumsum(tl.where(after, w, 0.0), 1), 0.0)
                    store_flow(flow_ptr, 2, flow_part, flow_at + 1, tl.sum(crossing, 0), here + 1 < BT)
                if UPPER:
                    crossing = tl.where(before, tl.cumsum(tl.where(before, w, 0.0), 0), 0.0)
                    store_flow(flow_ptr, 3, flow_part, flow_at + 1, tl.sum(crossing, 1), here + 1 < BT)
            acc = tl.dot(s.to(DOT), c_tile.to(DOT), acc, input_precision=PRECISION)

    if KIND == "out" and NORMALIZE:
        acc = acc / tl.where(real, eps + total, 1.0)[:, None]
        if tl.program_id(1) == 0:
            tl.store(total_ptr + bh * L + t, total, mask=t < L)
    if KIND == "dq" and NORMALIZE:
        acc = acc * scale[:, None]
    acc = tl.where(real[:, None], acc, 0.0)
    offsets = t[:, None] * (H * WC) + wc[None, :]
    inside = (t < L)[:, None] & (wc < WC)[None, :]
    tl.store(out_ptr + head * WC + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
