"""Linear attention by chunks in plain torch: any device, O(L) time, a backward pass that recomputes.

Inside a chunk the weights are formed (C × C); between chunks only a state S (D × E) is carried. The forward pass
saves the states at segment borders and nothing else; the backward pass walks the segments in reverse. README.md has the
maths.
"""

from __future__ import annotations

from torch import Tensor

from chela.ops.linear_attention import full, op, segmented
from chela.ops.linear_attention.op import Gradients, Problem
from chela.ops.linear_attention.recurrent import LinearAttentionState
from chela.ops.memory import Workspace


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
    """Compute ``linear_attention`` by chunks of ``chunk_size`` tokens (by default what suits the widths)."""
    inputs = (q, k, v, log_decay, log_decay_back, mask)
    return op.call(_operator, inputs, initial_state, return_state, causal, normalize, eps, chunk_size or 0)


def _forward(p: Problem, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _workspace(p) as buffer:
        return full.forward(p, buffer) if p.plain else segmented.forward(p, buffer, state)


def _backward(
    p: Problem, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool
) -> Gradients:
    with _workspace(p) as buffer:
        if p.plain:
            return full.backward(p, buffer, d_out, out, total, saved)
        return segmented.backward(p, buffer, d_out, d_end, out, total, saved, decay_grad)


def _workspace(p: Problem) -> Workspace:
    return Workspace(p.sum_dtype, p.q.device, buffers_per_block=2 if p.plain else 16)


def _saved_shape(p: Problem) -> tuple[int, ...]:
    return full.saved_shape(p) if p.plain else segmented.saved_shape(p)


_operator = op.define("linear_attention_chunked", _forward, _backward, _saved_shape)
