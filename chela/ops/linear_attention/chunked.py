"""Linear attention by chunks in plain torch: any device, O(L) time, a backward pass that recomputes.

Inside a chunk the weights are formed (C × C); between chunks only a state S (D × E) is carried. The forward pass
saves the states at segment borders and nothing else; the backward pass walks the segments in reverse. README.md has the
maths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from chela.ops.linear_attention import full, segmented
from chela.ops.linear_attention.flops import backward_flops, forward_flops
from chela.ops.linear_attention.recurrent import LinearAttentionState, accumulation_dtype
from chela.ops.linear_attention.segmented import Problem
from chela.ops.linear_attention.segments import CHUNK, chunks_per_segment


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
    initial_state: LinearAttentionState | None,
    return_state: bool,
    chunk_size: int | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Compute ``linear_attention`` by chunks of ``chunk_size`` tokens (64 unless given)."""
    state = None
    if initial_state is not None:
        # z is the column that a value of ones would have: one tensor, one product.
        state = torch.cat([initial_state.S, initial_state.z[..., None]], dim=-1)
    ones = normalize or return_state or initial_state is not None
    out, _, end, _ = torch.ops.chela.linear_attention_chunked(
        q, k, v, log_decay, log_decay_back, mask, state, causal, normalize, ones, eps, chunk_size or CHUNK
    )
    return out, LinearAttentionState(end[..., :-1], end[..., -1]) if return_state else None


@torch.library.custom_op("chela::linear_attention_chunked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if not causal and log_decay is None:
            return full.forward(q, k, v, mask, normalize, eps)
        problem = Problem(q, k, v, log_decay, log_decay_back, mask, causal, normalize, ones, eps, chunk)
        return segmented.forward(problem, state)


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, H, D = q.shape
    E = v.shape[-1]
    dtype = accumulation_dtype(v.dtype)
    out = v.new_empty(v.shape)
    total = v.new_empty((B, L, H) if normalize else (0,), dtype=dtype)
    if not causal and log_decay is None:
        return out, total, v.new_empty((0,), dtype=dtype), v.new_empty((1, 1, B, H, D, E + normalize), dtype=dtype)
    tokens = chunks_per_segment(H, D, E, chunk) * chunk
    shape = (B, H, D, E + ones)
    saved = v.new_empty((1 if causal else 2, (L + tokens - 1) // tokens, *shape), dtype=dtype)
    return out, total, v.new_empty(shape if causal else (0,), dtype=dtype), saved


@torch.library.custom_op("chela::linear_attention_chunked_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    saved: Tensor,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if not causal and log_decay is None:
            return full.backward(d_out, q, k, v, mask, out, total, saved, normalize, eps)
        problem = Problem(q, k, v, log_decay, log_decay_back, mask, causal, normalize, ones, eps, chunk)
        return segmented.backward(problem, d_out, d_end, out, total, saved, decay_grad)


@_backward.register_fake
def _backward_shapes(
    d_out: Tensor,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    saved: Tensor,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = v.new_empty((0,), dtype=saved.dtype)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        nothing if log_decay is None or not decay_grad else log_decay.new_empty(log_decay.shape),
        nothing.clone() if log_decay_back is None or not decay_grad else log_decay_back.new_empty(log_decay_back.shape),
        saved.new_empty(saved.shape[2:]) if causal else nothing.clone(),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, log_decay_back, mask, state, *ctx.options = inputs
    out, total, _, saved = output
    ctx.save_for_backward(q, k, v, log_decay, log_decay_back, mask, out, total, saved)
    ctx.has_state = state is not None
    ctx.mark_non_differentiable(total, saved)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_out: Tensor | None, d_total: None, d_end: Tensor | None, d_saved: None
) -> tuple[Any, ...]:
    q, k, v, log_decay, log_decay_back, mask, out, total, saved = ctx.saved_tensors
    if not ctx.options[0]:  # only causal attention has a last state
        d_end = None
    decay_grad = any(ctx.needs_input_grad[3:5])
    if d_out is None:
        d_out = torch.zeros_like(out)
    dq, dk, dv, d_decay, d_back, d_state = torch.ops.chela.linear_attention_chunked_backward(
        d_out, d_end, q, k, v, log_decay, log_decay_back, mask, out, total, saved, *ctx.options, decay_grad
    )
    return (
        dq,
        dk,
        dv,
        d_decay if ctx.needs_input_grad[3] else None,
        d_back if ctx.needs_input_grad[4] else None,
        None,
        d_state if ctx.has_state else None,
        *(None for _ in ctx.options),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
register_flop_formula(torch.ops.chela.linear_attention_chunked)(forward_flops)
register_flop_formula(torch.ops.chela.linear_attention_chunked_backward)(backward_flops)
