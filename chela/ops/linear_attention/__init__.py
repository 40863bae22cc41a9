"""Linear attention: one function for every system built on it. README.md has the maths and the costs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from chela.ops.backend import Backend, Problem, accumulation_dtype, check_tensors, choose, register
from chela.ops.linear_attention.cpu import linear_attention_chunked
from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.pieces import attend_in_pieces
from chela.ops.linear_attention.plain import linear_attention_plain
from chela.ops.linear_attention.reference import divided, heads_first, linear_attention_reference
from chela.ops.linear_attention.step import LinearAttentionState, linear_attention_step
from chela.ops.linear_attention.triton import linear_attention_triton, why_not
from chela.ops.padding import check_mask
from chela.ops.sequence_parallel import current

__all__ = ["LinearAttentionState", "linear_attention", "linear_attention_step"]

register(
    "linear_attention",
    Backend("triton", linear_attention_triton, auto_on=("cuda",), why_not=why_not),
    Backend("chunked", linear_attention_chunked, auto_on=("*",)),
    Backend("plain", linear_attention_plain),
    Backend("reference", linear_attention_reference),
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    log_decay: Tensor | None = None,
    log_decay_back: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Any:
    """Attend without softmax, in time and memory linear in the length.

    o_i = Σ_j M_ij (q_i·k_j) v_j, divided by eps + Σ_j M_ij (q_i·k_j) when ``normalize``. M_ij is the product of the
    decays of the edges between j and i, exp(Σ_{t=j+1..i} log_decay_t) for j < i; M_ii = 1; for j > i it is 0 when
    ``causal`` and else exp(Σ_{t=i+1..j} log_decay_back_t). A masked token is absent: it adds nothing, its edge does not
    decay, its output is 0. Inside ``sequence_parallel`` the tokens are a piece of the sequence, and hear all of it.

    Lightning Attention-2 (arXiv 2401.04658, section 3.2) is ``causal=True`` with one decay per head; LION (arXiv
    2502.16249, section 3) is ``causal=False, normalize=True`` with none, one per head, or one per token.

    Args:
        q: Queries ``(B, L, H, D)``, with any feature map already applied.
        k: Keys ``(B, L, H, D)``.
        v: Values ``(B, L, H, E)``.
        causal: Whether a token hears only itself and those before it.
        log_decay: Log of the decay of the edge from token t − 1 to t: None (no decay), ``(H,)`` or ``(B, L, H)``, ≤ 0.
            In nats; −inf forgets all that came before. Gradients flow to it.
        log_decay_back: The same for the edge from t to t − 1, bidirectional only; ``log_decay`` unless given.
        mask: ``(B, L)`` bool, True = real token.
        normalize: Divide by the sum of the weights; q·k should then be positive.
        eps: Added to that sum.
        initial_state: The state after the tokens before these (causal only).
        return_state: Also return the state after the last token (causal only).
        chunk_size: Tokens per chunk; None lets the backend choose. It changes speed and rounding, not the answer.
        backend: "auto" or one of ``chela.ops.backends()["linear_attention"]``.

    Returns:
        The output ``(B, L, H, E)`` in the dtype of v; with ``return_state`` the pair (output, state). Sums are kept in
        float32, for float64 in float64.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit together, or a backend that cannot run here.

    Complexity: O(B L H (D E + C (D + E))) time for chunks of C tokens, forward and backward; ``reference`` takes O(L²).

    >>> import torch
    >>> from chela.ops import linear_attention
    >>> q, k, v = torch.randn(3, 2, 500, 4, 16).unbind()
    >>> linear_attention(q, k, v, causal=False).shape
    torch.Size([2, 500, 4, 16])
    >>> out, state = linear_attention(q, k, v, causal=True, log_decay=torch.full((4,), -0.01), return_state=True)
    >>> state.S.shape
    torch.Size([2, 4, 16, 16])
    """
    kind = q.device.type
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(kind):  # to one dtype, as for matrix products
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    _check(q, k, v, causal, log_decay, log_decay_back, mask, initial_state, return_state, chunk_size)
    log_decay, log_decay_back = _decays(q, causal, log_decay, log_decay_back)
    run = choose("linear_attention", backend, Problem(q.device, q.dtype, (q.shape[-1], v.shape[-1]))).run
    if 0 in q.shape[:2]:
        run = linear_attention_reference  # no tokens: nothing to cut into chunks
    state = None if initial_state is None else torch.cat([initial_state.S, initial_state.z[..., None]], dim=-1)
    ones = normalize or return_state or state is not None
    call = Call(q, k, v, log_decay, log_decay_back, mask, state, causal, normalize, ones, eps, chunk_size or 0)
    if call.undecayed and run in (linear_attention_triton, linear_attention_chunked):
        run = attend_undecayed  # on every device: nothing is computed inside chunks
    piece = current()
    if piece is not None:
        if return_state or state is not None:
            raise ValueError("linear_attention: expected no state inside sequence_parallel; each piece has its own")
        run = functools.partial(attend_in_pieces, run=run, piece=piece)
    with torch.autocast(kind, enabled=False):  # sums are float32 whatever the dtype of the inputs
        out, end = run(call)
    return (out, LinearAttentionState(end[..., :-1], end[..., -1])) if return_state else out


def attend_undecayed(c: Call) -> tuple[Tensor, None]:
    """Return the output ``(B, L, H, E)`` of a bidirectional call without decay: two products, as all see one state."""
    q, k, v = (x.flatten(0, 1) for x in heads_first(c, factor_dtype(c)))  # here, or each product copies them anew
    sums = (q @ _State.apply(k, v)).unflatten(0, c.state_shape[:2])  # type: ignore[no-untyped-call]
    return divided(sums.to(c.sum_dtype), c), None


class _State(torch.autograd.Function):
    """kᵀ v, with gradients that lie as k and v do: of a transposed one what made the keys pays ten times as much."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return k.mT @ v

    @staticmethod
    def backward(ctx: Any, d_state: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ctx.saved_tensors
        return v @ d_state.mT, k @ d_state


def factor_dtype(c: Call) -> torch.dtype:
    """Return the dtype of factors: that of sums, but for bfloat16 on a GPU; a state in float16 would overflow."""
    return c.q.dtype if c.q.dtype == torch.bfloat16 and c.q.is_cuda else c.sum_dtype


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, log_decay: Tensor | None, log_decay_back: Tensor | None,
    mask: Tensor | None, initial_state: LinearAttentionState | None, return_state: bool, chunk_size: int | None,
) -> None:  # fmt: skip
    S, z = initial_state or (None, None)
    tensors = {"q": (q, "B L H D"), "k": (k, "B L H D"), "v": (v, "B L H E")}
    decays = {"log_decay": (log_decay, "H | B L H"), "log_decay_back": (log_decay_back, "H | B L H")}
    states = {"initial_state.S": (S, "B H D E"), "initial_state.z": (z, "B H D")}
    check_tensors("linear_attention", {**tensors, **decays, **states})
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"linear_attention: expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    if mask is not None:
        check_mask(q[..., 0], mask)
    if causal and log_decay_back is not None:
        raise ValueError("linear_attention: log_decay_back was given with causal=True; drop it or set causal=False")
    if log_decay is None and log_decay_back is not None:
        raise ValueError("linear_attention: log_decay_back was given without log_decay; give both (zeros for no decay)")
    if not causal and (initial_state is not None or return_state):
        raise ValueError("linear_attention: initial_state and return_state need causal=True, got causal=False")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_attention: expected chunk_size ≥ 1 or None, got {chunk_size}")


def _decays(
    q: Tensor, causal: bool, log_decay: Tensor | None, log_decay_back: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Fill in the default, and bring both decays to one dtype (that of the sums) and one shape."""
    if log_decay is None:
        return None, None
    log_decay = log_decay.to(accumulation_dtype(q.dtype))
    if causal:
        return log_decay, None
    back = log_decay if log_decay_back is None else log_decay_back.to(log_decay.dtype)
    if back.ndim != log_decay.ndim:
        log_decay, back = log_decay.expand(q.shape[:3]), back.expand(q.shape[:3])
    return log_decay, back
