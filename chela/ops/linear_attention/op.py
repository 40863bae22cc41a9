"""The torch operator behind a backend: fake tensors, autograd and FLOP counts, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from chela.ops.linear_attention.flops import backward_flops, forward_flops
from chela.ops.linear_attention.recurrent import LinearAttentionState, accumulation_dtype


@dataclass(frozen=True)
class Problem:
    """One call's tensors `(B, L, H, ·)` and options.

    Attributes:
        ones: Whether z, the sum of keys, is asked for beside S: both ride in one tensor `(B, H, D, E + 1)`, as if v had
            a further column of ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    log_decay_back: Tensor | None
    mask: Tensor | None
    causal: bool
    normalize: bool
    ones: bool
    eps: float
    chunk: int

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which sums are kept."""
        return accumulation_dtype(self.v.dtype)

    @property
    def plain(self) -> bool:
        """Whether every token sees the same state: bidirectional, no decay."""
        return not self.causal and self.log_decay is None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """The shape of a state."""
        B, _, H, D = self.q.shape
        return B, H, D, self.v.shape[-1] + self.ones

    def new(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor in the dtype of sums."""
        return self.v.new_empty(shape, dtype=self.sum_dtype)

    def new_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return uninitialised tensors for output, normaliser `(B, H, L)` and last state; empty if not asked."""
        B, L, H, _ = self.q.shape
        total = self.new(B, H, L) if self.normalize else self.new(0)
        return self.v.new_empty(self.v.shape), total, self.new(*self.state_shape) if self.causal else self.new(0)

    def new_gradients(self, decay_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the same for the gradients of q, k, v, both log decays (zeros) and the first state."""
        d_decay, d_back = (
            self.new(0) if x is None or not decay_grad else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            for x in (self.log_decay, self.log_decay_back)
        )
        d_state = self.new(*self.state_shape) if self.causal else self.new(0)
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))
        return dq, dk, dv, d_decay, d_back, d_state


Forward = Callable[[Problem, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = Callable[[Problem, Tensor, Tensor | None, Tensor, Tensor, Tensor, bool], Gradients]


def define(name: str, forward: Forward, backward: Backward, saved_shape: Callable[[Problem], tuple[int, ...]]) -> Any:
    """Register ``chela::name`` and its backward operator, and return the first.

    Args:
        name: The operator's name.
        forward: Given the problem and the first state: the output, the normaliser, the last state, and what
            to save.
        backward: Given the problem, the gradients of the output and the last state, the output, the normaliser, what
            was saved, and whether the log decays need gradients: the gradients of q, k, v, both log decays and the
            first state.
        saved_shape: The shape of what ``forward`` saves.
    """

    @torch.library.custom_op(f"chela::{name}", mutates_args=())
    def operator(
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
        problem = Problem(q, k, v, log_decay, log_decay_back, mask, causal, normalize, ones, eps, chunk)
        if 0 in q.shape[:2]:
            return _of_no_tokens(problem, state, saved_shape(problem))
        with torch.autocast(q.device.type, enabled=False):
            return forward(problem, state)

    @operator.register_fake
    def _(q, k, v, log_decay, log_decay_back, mask, state, *options):  # type: ignore[no-untyped-def]
        problem = Problem(q, k, v, log_decay, log_decay_back, mask, *options)
        return *problem.new_outputs(), problem.new(*saved_shape(problem))

    @torch.library.custom_op(f"chela::{name}_backward", mutates_args=())
    def operator_backward(
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
        problem = Problem(q, k, v, log_decay, log_decay_back, mask, causal, normalize, ones, eps, chunk)
        if 0 in q.shape[:2]:
            return _gradients_of_no_tokens(problem, d_end, decay_grad)
        with torch.autocast(q.device.type, enabled=False):
            return backward(problem, d_out, d_end, out, total, saved, decay_grad)

    @operator_backward.register_fake
    def _(d_out, d_end, q, k, v, log_decay, log_decay_back, mask, out, total, saved, *options):  # type: ignore[no-untyped-def]
        *rest, decay_grad = options
        return Problem(q, k, v, log_decay, log_decay_back, mask, *rest).new_gradients(decay_grad)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, log_decay, log_decay_back, mask, state, *ctx.options = inputs
        out, total, _, saved = output
        ctx.save_for_backward(q, k, v, log_decay, log_decay_back, mask, out, total, saved)
        ctx.has_state = state is not None
        ctx.mark_non_differentiable(total, saved)
        ctx.set_materialize_grads(False)

    def differentiate(
        ctx: Any, d_out: Tensor | None, d_total: None, d_end: Tensor | None, d_saved: None
    ) -> tuple[Any, ...]:
        *inputs, out, total, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if not ctx.options[0]:  # only causal attention has a last state
            d_end = None
        dq, dk, dv, d_decay, d_back, d_state = operator_backward(
            torch.zeros_like(out) if d_out is None else d_out,
            d_end,
            *inputs,
            out,
            total,
            saved,
            *ctx.options,
            needed[3] or needed[4],
        )
        gradients = (dq, dk, dv, d_decay if needed[3] else None, d_back if needed[4] else None)
        return *gradients, None, d_state if ctx.has_state else None, *(None for _ in ctx.options)

    operator.register_autograd(differentiate, setup_context=save)
    overloads = torch.ops.chela
    register_flop_formula(getattr(overloads, name))(forward_flops)
    register_flop_formula(getattr(overloads, f"{name}_backward"))(backward_flops)
    return operator


def _of_no_tokens(
    p: Problem, state: Tensor | None, saved_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``forward`` does where there is nothing to read: the last state is the first."""
    out, total, end = p.new_outputs()
    end.zero_() if state is None else end.copy_(state)
    return out, total, end, p.new(*saved_shape).zero_()


def _gradients_of_no_tokens(p: Problem, d_end: Tensor | None, decay_grad: bool) -> Gradients:
    """Return what ``backward`` does then."""
    *gradients, d_state = p.new_gradients(decay_grad)
    dq, dk, dv, d_decay, d_back = gradients
    return dq, dk, dv, d_decay, d_back, d_state.zero_() if d_end is None else d_state.copy_(d_end)


def call(
    operator: Any,
    inputs: tuple[Tensor | None, ...],
    initial_state: LinearAttentionState | None,
    return_state: bool,
    causal: bool,
    normalize: bool,
    eps: float,
    chunk: int,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Call an operator made by ``define``; ``inputs`` are q, k, v, the two log decays and the mask."""
    state = None
    if initial_state is not None:
        state = torch.cat([initial_state.S, initial_state.z[..., None]], dim=-1)
    ones = normalize or return_state or initial_state is not None
    out, _, end, _ = operator(*inputs, state, causal, normalize, ones, eps, chunk)
    return out, LinearAttentionState(end[..., :-1], end[..., -1]) if return_state else None
