# mypy: ignore-errors
"""Triton kernels of linear attention: one for the output and the gradient of q, one for the gradients of k and v.

``kernels_states.py`` has the shape legend, the rules that all kernels keep, and the kernels of the states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chela.ops.linear_attention.kernels_states import (
    border_decay,
    delta_kernel,
    load_real,
    load_sums,
    load_tile,
    load_tokens,
    scan_kernel,
    states_kernel,
)

__all__ = ["attend_kernel", "delta_kernel", "keys_kernel", "scan_kernel", "states_kernel"]

# What changes with the length: a kernel is not compiled anew for a 1 or a multiple of 16 in its place.
VARYING = ["L", "blocks", "NB", "sum_part", "sum_b", "sum_h", "sum_n", "flow_rows", "flow_part"]


@triton.jit
def product(
    a, b, a_base, b_base, t, u, real, real_u, H, W, BW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a_i·b_j for tokens t (rows) and u (columns); a and b are their first BK columns, the others are loaded."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    for k in range(BK, BW, BK):
        column = k + tl.arange(0, BK)
        a_k, b_k = load_tile(a_base, t, column, H, W, real), load_tile(b_base, u, column, H, W, real_u)
        s = tl.dot(a_k, tl.trans(b_k), s, input_precision=PRECISION)
    return s


@triton.jit
def from_state(
    a, a_base, state_ptr, z_ptr, t, real, wc, H, WA, WC, state_a, state_c,
    BA: tl.constexpr, BR: tl.constexpr, WITH_TOTAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what one state gives to the tokens, ``(BT, BC)``, and z to their normaliser, ``(BT,)``, WITH_TOTAL."""
    y = tl.zeros((t.shape[0], wc.shape[0]), dtype=tl.float32)
    total = tl.zeros((t.shape[0],), dtype=tl.float32)
    for r in range(0, BA, BR):
        row = r + tl.arange(0, BR)
        a_r = load_tile(a_base, t, row, H, WA, real) if BR < BA else a
        inside = (row < WA)[:, None] & (wc < WC)[None, :]
        state = tl.load(state_ptr + row[:, None] * state_a + wc[None, :] * state_c, mask=inside, other=0.0)
        y = tl.dot(a_r.to(DOT), state.to(DOT), y, input_precision=PRECISION)
        if WITH_TOTAL:
            z = tl.load(z_ptr + row, mask=row < WA, other=0.0)
            total += tl.sum(a_r.to(tl.float32) * z[None, :], 1)
    return y, total


@triton.jit
def side_decay(side: tl.constexpr, ahead_base, back_base, sum_part, last, ahead_high, ahead_low, back_high, back_low):
    """Return the decay between tokens and the state that reaches their chunk from the left (side 0) or the right."""
    base, high, low = (ahead_base, ahead_high, ahead_low) if side == 0 else (back_base, back_high, back_low)
    return border_decay(base, sum_part, last, high, low, side == 0)


@triton.jit
def decay_between(
    after, before, position, ahead_base, back_base, sum_part, ahead_high, ahead_low, back_high, back_low,
    LOWER: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    """Return M for two blocks of one chunk; ``after`` says where i > j, ``position`` where the tokens j are."""
    exponent = tl.zeros(after.shape, dtype=tl.float32)
    if LOWER:
        high, low = load_sums(ahead_base, sum_part, position, True)
        d = ahead_high[:, None] - high[None, :] + (ahead_low[:, None] - low[None, :])
        exponent = tl.where(after, d, exponent)
    if UPPER:
        high, low = load_sums(back_base, sum_part, position, True)
        d = high[None, :] - back_high[:, None] + (low[None, :] - back_low[:, None])
        exponent = tl.where(before, d, exponent)
    return tl.exp(exponent)


@triton.jit
def kept(s, after, before, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Return s with zeros on the side that is not heard."""
    if not UPPER:
        s = tl.where(before, 0.0, s)
    if not LOWER:
        s = tl.where(after, 0.0, s)
    return s


@triton.jit
def store_flow(flow_ptr, row, flow_rows, flow_part, place, numbers, mask):
    """Store numbers, one per token, in a row of ``flow``; each program along axis 1 has rows of its own."""
    row = tl.program_id(1).to(tl.int64) * flow_rows + row
    tl.store(flow_ptr + row * flow_part + place, numbers, mask=mask)


@triton.jit
def store_crossing(flow_ptr, row, flow_rows, flow_part, edges, mask, w, gone, heard, RIGHTWARD: tl.constexpr):
    """Store what flows over edges at block j on its way to block i; return ``gone`` and what block j gives to each i.

    ``gone`` is what the blocks of the chunk beyond j give to each i. Over the edge into token x goes what tokens j < x
    give to i ≥ x, or j ≥ x to i < x: a sum of what crosses, no difference.
    """
    w = tl.where(heard, w, 0.0)
    crossing = tl.where(heard, gone[:, None] + tl.cumsum(w, 1, reverse=not RIGHTWARD), 0.0)
    store_flow(flow_ptr, row, flow_rows, flow_part, edges, tl.sum(crossing, 0), mask)
    return gone + tl.sum(w, 1)


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, total_ptr, mask_ptr, scale_ptr, delta_ptr,
    left_ptr, right_ptr, z_left_ptr, z_right_ptr, ahead_ptr, back_ptr, own_ptr, flow_ptr,
    L, H, WA, WC, blocks, NB, state_a, state_c, sum_part, sum_b, sum_h, sum_n, flow_rows, flow_part, eps,
    KIND: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, DECAY: tl.constexpr,
    MASKED: tl.constexpr, NORMALIZE: tl.constexpr, WITH_Z: tl.constexpr, FLOW: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Σ_j f(a_i·b_j) M_ij c_j for one block of tokens i and one block of columns of c.

    The sum runs over the tokens of i's own chunk, tile by tile, and over all others through the state that reaches the
    chunk from the left (LOWER: j ≤ i) and from the right (UPPER: j ≥ i).

        KIND   a     b     c     f(s)                       what
        "out"  q     k     v     s, then / (eps + total)    output, and total
        "dq"   d_out v     k     scale_i (s − delta_i)      gradient of q

    FLOW (dq, where ``own`` is q) also writes what flows over edges of the chunk, for the gradient of the log decays.
    Rows 0, 1 of ``flow``: what each token exchanges with the left and the right state. From row 2 on, one row for each
    block of the chunk: what crosses each edge of the chunk on its way rightward to that block; then as many, leftward.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, bh = pid % blocks, pid // blocks
    b, h = bh // H, bh % H
    chunk = block // NB
    here = tl.arange(0, BT)
    t = (block * BT + here).to(tl.int32)
    mine = (block % NB).to(tl.int32) * BT + here  # where tokens are in their chunk
    wc = tl.program_id(1) * BC + tl.arange(0, BC)
    head = b * L * H + h
    a_base, b_base, c_base = a_ptr + head * WA, b_ptr + head * WA, c_ptr + head * WC
    sums_at = b * sum_b + h * sum_h + chunk * sum_n
    ahead_base, back_base = ahead_ptr + sums_at, back_ptr + sums_at
    ahead_high, ahead_low = load_sums(ahead_base, sum_part, mine, DECAY and LOWER)
    back_high, back_low = load_sums(back_base, sum_part, mine, DECAY and UPPER)
    real = load_real(mask_ptr, b, t, L, MASKED)
    # Products over the width of a take BK columns at a time; where that is all of them, a is loaded once, here.
    a = load_tile(a_base, t, tl.arange(0, BK), H, WA, real)
    scale = load_tokens(scale_ptr, bh * L, t, real, KIND == "dq" and NORMALIZE)
    delta = load_tokens(delta_ptr, bh * L, t, real, KIND == "dq" and NORMALIZE)
    state_at = bh * tl.cdiv(blocks, NB) + chunk
    chunk_at = state_at * (NB * BT)
    if FLOW:
        own = load_tile(own_ptr + head * WC, t, wc, H, WC, real)

    acc = tl.zeros((BT, BC), dtype=tl.float32)
    total = tl.zeros((BT,), dtype=tl.float32)
    for side in tl.static_range(2):
        if (side == 0 and LOWER) or (side == 1 and UPPER):
            state_ptr, z_ptr = (left_ptr, z_left_ptr) if side == 0 else (right_ptr, z_right_ptr)
            z_base = z_ptr + state_at * (WA if KIND == "out" else WC)
            y, part = from_state(
                a, a_base, state_ptr + state_at * WA * WC, z_base, t, real, wc, H, WA, WC, state_a, state_c,
                BA, BR, WITH_Z and KIND == "out", DOT, PRECISION,
            )  # fmt: skip
            if WITH_Z and KIND == "dq":
                y -= delta[:, None] * tl.load(z_base + wc, mask=wc < WC, other=0.0)[None, :]
            if DECAY:
                weight = side_decay(
                    side, ahead_base, back_base, sum_part, NB * BT - 1, ahead_high, ahead_low, back_high, back_low
                )
                y, part = y * weight[:, None], part * weight
            if FLOW:
                exchanged = tl.sum(own.to(tl.float32) * y, 1)
                if NORMALIZE:
                    exchanged = exchanged * scale
                exchanged = tl.where(real, exchanged, 0.0)
                store_flow(flow_ptr, side, flow_rows, flow_part, chunk_at + mine, exchanged, here < BT)
            acc += y
            total += part

    from_left, from_right = tl.zeros((BT,), dtype=tl.float32), tl.zeros((BT,), dtype=tl.float32)
    first = chunk * NB if LOWER else block
    end = tl.minimum(chunk * NB + NB, blocks) if UPPER else block + 1
    for step in range(first, end):
        other = step
        if FLOW and UPPER:  # towards the block from both ends of the chunk, itself last
            other = tl.where(step < block, step, block + end - 1 - step)
        u = (other * BT + here).to(tl.int32)
        real_u = load_real(mask_ptr, b, u, L, MASKED)
        c_tile = load_tile(c_base, u, wc, H, WC, real_u)
        b_tile = load_tile(b_base, u, tl.arange(0, BK), H, WA, real_u)
        s = product(a, b_tile, a_base, b_base, t, u, real, real_u, H, WA, BA, BK, PRECISION)
        if NORMALIZE and KIND == "dq":
            s = s - delta[:, None]
        position = (other % NB) * BT + here
        after, before = mine[:, None] > position[None, :], mine[:, None] < position[None, :]
        if DECAY:
            s = s * decay_between(
                after, before, position, ahead_base, back_base, sum_part,
                ahead_high, ahead_low, back_high, back_low, LOWER, UPPER,
            )  # fmt: skip
        s = kept(s, after, before, LOWER, UPPER)
        if KIND == "out":
            total += tl.sum(s, 1)
        if FLOW:
            w = s * tl.dot(own, tl.trans(c_tile), input_precision=PRECISION)
            if NORMALIZE:
                w = w * scale[:, None]
        acc = tl.dot(s.to(DOT), c_tile.to(DOT), acc, input_precision=PRECISION)
        if FLOW:
            edges, lane = chunk_at + position, 2 + block % NB
            if LOWER:
                from_left = store_crossing(
                    flow_ptr, lane, flow_rows, flow_part, edges + 1, position + 1 < NB * BT, w, from_left,
                    after, True,
                )  # fmt: skip
            if UPPER:
                from_right = store_crossing(
                    flow_ptr, lane + NB, flow_rows, flow_part, edges, here < BT, w, from_right, before, False
                )

    if KIND == "out" and NORMALIZE:
        acc = acc / tl.where(real, eps + total, 1.0)[:, None]
        if tl.program_id(1) == 0:
            tl.store(total_ptr + bh * L + t, total, mask=t < L)
    if KIND == "dq" and NORMALIZE:
        acc = acc * scale[:, None]
    acc = tl.where(real[:, None], acc, 0.0)
    offsets = t[:, None].to(tl.int64) * (H * WC) + wc[None, :]
    inside = (t < L)[:, None] & (wc < WC)[None, :]
    tl.store(out_ptr + head * WC + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, mask_ptr, scale_ptr, delta_ptr,
    left_ptr, right_ptr, z_left_ptr, z_right_ptr, ahead_ptr, back_ptr, flow_ptr,
    L, H, D, E, blocks, NB, sum_part, sum_b, sum_h, sum_n, flow_rows, flow_part,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KD: tl.constexpr, KE: tl.constexpr,
    CD: tl.constexpr, CE: tl.constexpr, BR: tl.constexpr, BU: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
    DECAY: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, WITH_Z: tl.constexpr,
    FLOW: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k and v for one block of tokens j, CD columns of the one and CE of the other.

        dk_j = Σ_i M_ij scale_i (d_out_i·v_j − delta_i) q_i        dv_j = Σ_i M_ij scale_i (q_i·k_j) d_out_i

    Rows are tokens j, so all is over Mᵀ: LOWER is i ≤ j, and states and decays of the two sides have changed places.
    Products over a width take KD or KE columns at a time. FLOW writes rows 0, 1 of ``flow``, as in ``attend_kernel``.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, bh = pid % blocks, pid // blocks
    b, h = bh // H, bh % H
    chunk = block // NB
    here = tl.arange(0, BT)
    t = (block * BT + here).to(tl.int32)
    mine = (block % NB).to(tl.int32) * BT + here  # where tokens are in their chunk
    d, e = tl.program_id(1) * CD + tl.arange(0, CD), tl.program_id(1) * CE + tl.arange(0, CE)
    first_d, first_e = tl.arange(0, KD), tl.arange(0, KE)
    head = b * L * H + h
    q_base, k_base = q_ptr + head * D, k_ptr + head * D
    v_base, d_out_base = v_ptr + head * E, d_out_ptr + head * E
    sums_at = b * sum_b + h * sum_h + chunk * sum_n
    ahead_base, back_base = ahead_ptr + sums_at, back_ptr + sums_at
    ahead_high, ahead_low = load_sums(ahead_base, sum_part, mine, DECAY and LOWER)
    back_high, back_low = load_sums(back_base, sum_part, mine, DECAY and UPPER)
    real = load_real(mask_ptr, b, t, L, MASKED)
    k, v = load_tile(k_base, t, first_d, H, D, real), load_tile(v_base, t, first_e, H, E, real)
    state_at = bh * tl.cdiv(blocks, NB) + chunk
    chunk_at = state_at * (NB * BT)

    dk, dv = tl.zeros((BT, CD), dtype=tl.float32), tl.zeros((BT, CE), dtype=tl.float32)
    for side in tl.static_range(2):
        if (side == 0 and LOWER) or (side == 1 and UPPER):
            state_ptr, z_ptr = (left_ptr, z_left_ptr) if side == 0 else (right_ptr, z_right_ptr)
            state = state_ptr + state_at * D * E
            y, _ = from_state(v, v_base, state, z_ptr, t, real, d, H, E, D, 1, E, BE, BR, False, DOT, PRECISION)
            if WITH_Z:
                y += tl.load(z_ptr + state_at * D + d, mask=d < D, other=0.0)[None, :]
            if DECAY:
                weight = side_decay(
                    side, ahead_base, back_base, sum_part, NB * BT - 1, ahead_high, ahead_low, back_high, back_low
                )
                y = y * weight[:, None]
            if FLOW:
                own = k if KD == CD and CD == BD else load_tile(k_base, t, d, H, D, real)
                exchanged = tl.where(real, tl.sum(own.to(tl.float32) * y, 1), 0.0)
                store_flow(flow_ptr, side, flow_rows, flow_part, chunk_at + mine, exchanged, here < BT)
            dk += y
            y, _ = from_state(k, k_base, state, z_ptr, t, real, e, H, D, E, E, 1, BD, BR, False, DOT, PRECISION)
            if DECAY:
                y = y * weight[:, None]
            dv += y

    first = chunk * NB if LOWER else block
    end = tl.minimum(chunk * NB + NB, blocks) if UPPER else block + 1
    for start in range(first * BT, end * BT, BU):
        u = (start + tl.arange(0, BU)).to(tl.int32)
        real_u = load_real(mask_ptr, b, u, L, MASKED)
        q, d_out = load_tile(q_base, u, first_d, H, D, real_u), load_tile(d_out_base, u, first_e, H, E, real_u)
        position = start - chunk * (NB * BT) + tl.arange(0, BU)
        after, before = mine[:, None] > position[None, :], mine[:, None] < position[None, :]
        M = tl.full((BT, BU), 1.0, dtype=tl.float32)
        if DECAY:
            M = decay_between(
                after, before, position, ahead_base, back_base, sum_part,
                ahead_high, ahead_low, back_high, back_low, LOWER, UPPER,
            )  # fmt: skip
        if NORMALIZE:
            M = M * load_tokens(scale_ptr, bh * L, u, real_u, True)[None, :]
        M = kept(M, after, before, LOWER, UPPER)
        s = product(k, q, k_base, q_base, t, u, real, real_u, H, D, BD, KD, PRECISION) * M
        d_out_e = d_out if KE == CE and CE == BE else load_tile(d_out_base, u, e, H, E, real_u)
        dv = tl.dot(s.to(DOT), d_out_e.to(DOT), dv, input_precision=PRECISION)
        p = product(v, d_out, v_base, d_out_base, t, u, real, real_u, H, E, BE, KE, PRECISION)
        if NORMALIZE:
            p = p - load_tokens(delta_ptr, bh * L, u, real_u, True)[None, :]
        q_d = q if KD == CD and CD == BD else load_tile(q_base, u, d, H, D, real_u)
        dk = tl.dot((p * M).to(DOT), q_d.to(DOT), dk, input_precision=PRECISION)

    at = t[:, None].to(tl.int64)
    d_at, e_at = at * (H * D) + d[None, :], at * (H * E) + e[None, :]
    dk, dv = tl.where(real[:, None], dk, 0.0), tl.where(real[:, None], dv, 0.0)
    mask = (t < L)[:, None]
    tl.store(dk_ptr + head * D + d_at, dk.to(dk_ptr.dtype.element_ty), mask=mask & (d < D)[None, :])
    tl.store(dv_ptr + head * E + e_at, dv.to(dv_ptr.dtype.element_ty), mask=mask & (e < E)[None, :])
