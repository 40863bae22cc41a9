"""What the fast backends share: the torch operator with its fake form and autograd, and the gradient of the decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.backend import accumulation_dtype


class Call(NamedTuple):
    """One call's tensors ``(B, L, H, ·)`` and options, in the order of the operator's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    log_decay_back: Tensor | None
    mask: Tensor | None
    state: Tensor | None  # S and z before the first token, side by side (B, H, D, E + 1); None for zeros
    causal: bool
    normalize: bool
    # Whether z is needed beside S: then it is one more column of S, as if v had a further column of ones. If not, the
    # last state is not asked for.
    ones: bool
    eps: float
    chunk: int  # tokens per chunk; 0 lets the backend choose

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which sums are kept."""
        return accumulation_dtype(self.v.dtype)

    @property
    def undecayed(self) -> bool:
        """Whether every token sees the same state: bidirectional, no decay."""
        return not self.causal and self.log_decay is None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """The shape of a state."""
        B, _, H, D = self.q.shape
        return B, H, D, self.v.shape[-1] + int(self.ones)  # a bool beside a symbol is an error in torch 2.11

    def new(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor in the dtype of sums."""
        return self.v.new_empty(shape, dtype=self.sum_dtype)

    def new_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return uninitialised tensors for output, normaliser ``(B, H, L)`` and last state; empty if not asked for."""
        B, L, H, _ = self.q.shape
        total = self.new(B, H, L) if self.normalize else self.new(0)
        return self.v.new_empty(self.v.shape), total, self.new(*self.state_shape) if self.causal else self.new(0)

    def new_gradients(self, decay_grad: bool) -> Gradients:
        """Return the same for the gradients of q, k, v, both log decays (zeros) and the first state."""
        d_decay, d_back = (
            self.new(0) if x is None or not decay_grad else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            for x in (self.log_decay, self.log_decay_back)
        )
        d_state = self.new(*self.state_shape) if self.causal else self.new(0)
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))
        return dq, dk, dv, d_decay, d_back, d_state


# Output, normaliser, last state, and what to save.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
# Of q, k, v, both log decays and the first state.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? log_decay_back, Tensor? mask, Tensor? state, "
    "bool causal, bool normalize, bool ones, float eps, SymInt chunk"
)
_FORWARD = f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_CALL}, Tensor d_out, Tensor? d_end, Tensor out, Tensor total, Tensor saved, bool decay_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_TENSORS, _ARGUMENTS = 7, len(Call._fields)


def define(
    name: str,
    forward: Callable[[Call], Outputs],
    backward: Callable[..., Gradients],
    saved_shape: Callable[[Call], tuple[int, ...]],
) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """Register ``chela::name`` and its backward operator; return a function from a call to output and last state.

    ``backward`` is given the call, the gradients of the output and of the last state (or None), the output, the
    normaliser, what ``forward`` saved (of ``saved_shape``), and whether the log decays need gradients.
    """

    @torch.library.custom_op(f"chela::{name}", mutates_args=(), schema=_FORWARD)
    def operator(*arguments: Any) -> Outputs:
        call = Call(*arguments)
        with torch.autocast(call.q.device.type, enabled=False):
            return forward(call)

    @operator.register_fake
    def _(*arguments: Any) -> Outputs:
        call = Call(*arguments)
        return *call.new_outputs(), call.new(*saved_shape(call))

    @torch.library.custom_op(f"chela::{name}_backward", mutates_args=(), schema=_BACKWARD)
    def gradients(*arguments: Any) -> Gradients:
        call = Call(*arguments[:_ARGUMENTS])
        with torch.autocast(call.q.device.type, enabled=False):
            return backward(call, *arguments[_ARGUMENTS:])

    @gradients.register_fake
    def _(*arguments: Any) -> Gradients:
        return Call(*arguments[:_ARGUMENTS]).new_gradients(arguments[-1])

    def differentiate(ctx: Any, d_out: Tensor | None, _: None, d_end: Tensor | None, __: None) -> tuple[Any, ...]:
        *tensors, out, total, saved = ctx.saved_tensors
        call, needed = Call(*tensors, *ctx.options), ctx.needs_input_grad
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_end = d_end if call.causal else None  # only causal attention has a last state
        dq, dk, dv, d_decay, d_back, d_state = gradients(*call, d_out, d_end, out, total, saved, needed[3] or needed[4])
        decays = d_decay if needed[3] else None, d_back if needed[4] else None
        return dq, dk, dv, *decays, None, d_state if call.state is not None else None, *(None for _ in ctx.options)

    operator.register_autograd(differentiate, setup_context=_save)

    def run(call: Call) -> tuple[Tensor, Tensor]:
        out, _, end, _ = operator(*call)
        return out, end

    return run


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    out, total, _, saved = output
    ctx.save_for_backward(*inputs[:_TENSORS], out, total, saved)
    ctx.options = inputs[_TENSORS:]
    ctx.mark_non_differentiable(total, saved)
    ctx.set_materialize_grads(False)


def edge_gradient(inside: Tensor, entering: Tensor, leaving: Tensor, through: Tensor) -> Tensor:
    """Return the gradient of each edge's log decay, ``(…, C)``: all that flows over that edge.

    Every term is a sum of flows that do cross the edge. None is the difference of two large sums, so the gradient keeps
    its digits when a strong decay makes it small. ``inside`` is what crosses each edge between two tokens of
    the chunk, ``entering`` and ``leaving`` what each token exchanges with those left and right of the chunk, and
    ``through`` ``(…)`` what passes over all of it.
    """
    reaching = entering.flip(-1).cumsum(-1).flip(-1)
    left = torch.nn.functional.pad(leaving[..., :-1].cumsum(-1), (1, 0))
    return inside + reaching + left + through[..., None]
