"""MEGA: a moving average, then gated single-head attention, full or in chunks (arXiv 2209.10655).

Shapes: B batch, L length, D model width, Z query/key width, V value width, C chunk, N averages per channel.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.attention import Attended, columns
from chela.layers.cache import append, joined, room, with_room
from chela.layers.long_kernel import KERNEL_LR, DampedEMAKernel
from chela.layers.param_groups import mark
from chela.layers.state import State, expect_causal
from chela.ops.fft_conv import fft_conv
from chela.ops.padding import zero_padding


class MEGA(nn.Module):
    """Moving-average equipped gated attention (arXiv 2209.10655, sections 3.1–3.4), x being the normed input.

    ::

        c = SiLU(EMA(x) + ω ⊙ x)                      damped EMA of N averages a channel, in both directions
        z = SiLU(W_z c),   q = γ_q ⊙ z + β_q,   k = γ_k ⊙ z + β_k,   v = SiLU(W_v x)
        o = f(scale · q kᵀ + b_{j−i}) v               over the whole sequence, or within chunks of C tokens
        r = SiLU(W_r c),   h = SiLU(W_h c + W_o (o ⊙ r)),   g = σ(W_u c),   returns g ⊙ (h − stream)

    f = softmax with scale Z^−½, or "laplace", f(x) = ½(1 + erf((x − √½) / (σ√2))), σ = (4π)^−½, with scale one over the
    number of keys seen. O(L²·(Z + V)) time and O(L²) memory, in chunks O(L·C·(Z + V)) and O(L·C); the EMA adds
    O(D·L·log L + D·N·L).

    Args:
        d_model: Width D.
        l_max: Longest sequence.
        causal: No position sees a later one.
        dropout: On h, before the gate.
        d_qk: Width Z of queries and keys.
        d_value: Width V of the values; None is 2·D.
        averages: Moving averages N per channel.
        kernel_rate: The averages learn at the rate of long kernels, ``optimizer.kernel_lr``, as S4D's do; the paper has
            one rate for all.
        attention_function: f; the paper takes softmax for symbols, laplace for pixels.
        chunk: Tokens C that attend to one another, cut at positions C, 2C, …; 0, or more than l_max: all, which are at
            most l_max then.

    >>> MEGA(16, l_max=100, chunk=32)(torch.randn(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        dropout: float = 0.0,
        d_qk: Annotated[int, {"ge": 1, "le": 4096}] = 32,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        averages: Annotated[int, {"ge": 1, "le": 256}] = 16,
        kernel_rate: Annotated[bool, {"neutral": False}] = False,
        attention_function: Literal["softmax", "laplace"] = "softmax",
        chunk: Annotated[int, {"ge": 0, "le": 1_000_000}] = 0,
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        self.causal, self.attention_function = causal, attention_function
        self.sizes = d_model, d_qk, d_value, d_model  # update gate, z, reset gate, candidate: all read c
        self.ends, self.chunk = not 0 < chunk <= l_max, min(chunk or l_max, l_max)
        self.ema = DampedEMAKernel(d_model, l_max, causal=causal, averages=averages)
        if kernel_rate:
            mark(self.ema, lr=KERNEL_LR)
        self.omega = nn.Parameter(torch.empty(d_model))
        self.gamma = nn.Parameter(torch.empty(2, d_qk))
        self.beta = nn.Parameter(torch.empty(2, d_qk))
        self.position_bias = nn.Parameter(torch.empty(2 * self.chunk - 1))
        self.value = Projection(d_model, d_value)
        self.gates = Projection(d_model, sum(self.sizes))
        self.out = Projection(d_value, d_model)
        self.dropout = nn.Dropout(dropout)
        self.attended = Attended()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ω from N(0, 1), γ and the position bias from N(0, 0.02²), set β to 0; the submodules draw their own."""
        nn.init.normal_(self.omega)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.normal_(self.position_bias, std=0.02)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Map the normed ``x: (B, L, D)`` to the update ``(B, L, D)``, 0 where ``mask: (B, L)`` is False.

        The gate replaces a part of ``stream: (B, L, D)``; None is x. Without chunks L is at most l_max.
        """
        self._expect_room(x.shape[1])
        x = zero_padding(x, mask)
        q, k, gates = self._read(self.dropout(F.silu(self._average(x))))
        o = self._attend(q, k, F.silu(self.value(x)), mask)
        return self._combine(o, gates, x if stream is None else stream, mask)

    def _combine(self, o: Tensor, gates: tuple[Tensor, ...], stream: Tensor, mask: Tensor | None) -> Tensor:
        update, reset, candidate = gates
        h = candidate + self.out(self.attended(o) * reset)
        return update * zero_padding(self.dropout(F.silu(h)) - stream, mask)

    def _expect_room(self, length: int) -> None:
        if self.ends and length > self.chunk:
            raise ValueError(
                f"MEGA: expected at most l_max={self.chunk} tokens, got {length}; build the layer with a larger l_max, "
                "or with chunk="
            )

    def _average(self, x: Tensor) -> Tensor:
        """Return EMA(x) + ω ⊙ x.

        MEGA's two directions both start at lag 0. ``fft_conv`` has that lag once, so the skip takes the other's.
        """
        forward, back = self.ema(x.shape[1] + 1)
        if back is None:
            return fft_conv(x, forward, skip=self.omega)
        return fft_conv(x, forward, kernel_back=back[:, 1:], skip=self.omega + back[:, 0])

    def _read(self, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Map ``c: (..., D)`` to queries, keys, and update gate, reset gate and candidate."""
        update, z, reset, candidate = columns(self.gates(c), [*self.sizes])
        q, k = (F.silu(z)[..., None, :] * self.gamma + self.beta).unbind(-2)
        return q, k, (torch.sigmoid(update), F.silu(reset), candidate)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length, size = q.shape[1], min(self.chunk, q.shape[1])
        rest = -length % size
        seen = None
        if mask is not None or rest:
            real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
            seen = F.pad(real, (0, rest)).reshape(len(q), -1, 1, size)
        q, k, v = (F.pad(t, (0, 0, 0, rest)).reshape(len(t), -1, size, t.shape[2]) for t in (q, k, v))
        if self.causal:
            past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
            seen = past if seen is None else seen & past
        weights = self._weights(q @ k.transpose(-1, -2), self._bias(size), seen)
        return (weights @ v).flatten(1, 2)[:, :length]

    def _bias(self, size: int, first: int = 0) -> Tensor:
        """Return b_{j−i} of the queries from ``first`` on, ``(size − first, size)``."""
        place = torch.arange(size, device=self.position_bias.device)
        queries = place[first:, None]
        return self.position_bias[self.chunk - 1 + place - queries]

    def _weights(self, scores: Tensor, bias: Tensor, seen: Tensor | None) -> Tensor:
        """Turn q·k into attention weights over the keys that are ``seen``, None meaning all; none seen gives zeros."""
        if self.attention_function == "softmax":
            scores = scores * self.sizes[1] ** -0.5 + bias
            if seen is None:
                return scores.softmax(-1)
            scores = scores.masked_fill(~seen, float("-inf")).masked_fill(~seen.any(-1, keepdim=True), 0.0)
            return scores.softmax(-1).masked_fill(~seen, 0.0)
        scores = scores / (scores.shape[-1] if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)) + bias
        weights = 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))
        return weights if seen is None else weights.masked_fill(~seen, 0.0)

    def start(self, batch: int) -> State:
        """Return ``modes (B, D, N)``, ``keys (B, R, Z)``, ``values (B, R, V)`` and the ``position`` T.

        Keys and values are those of the chunk begun, its first T mod C places of R; the others are room
        for more, or left of a full chunk. R is a power of two (``chela.layers.cache``), at most C.
        """
        expect_causal(self)
        _, d_qk, d_value, _ = self.sizes
        new, size = self.out.weight.new_zeros, room(0, self.chunk)
        state = self.ema.start(batch)
        state["position"] = torch.zeros(batch, dtype=torch.int64)
        state |= {"keys": new(batch, size, d_qk), "values": new(batch, size, d_value)}
        return state

    def prefill(self, x: Tensor, state: State, stream: Tensor | None = None) -> tuple[Tensor, State]:
        """Feed ``x: (B, L, D)``, each token in O(C·(Z + V) + D·N) time.

        Without chunks there are at most l_max in all.
        """
        begun, (q, k, v, gates), after = self._read_on(x, state)
        k, v = joined(state["keys"], begun, k), joined(state["values"], begun, v)
        o = self._attend_on(q, k, v)
        update = self._combine(o, gates, x if stream is None else stream, None)
        last = (k.shape[1] - 1) // self.chunk * self.chunk  # where the chunk begun begins
        size = room(int(after["position"][0]), self.chunk)
        after |= {"keys": with_room(k[:, last:], size), "values": with_room(v[:, last:], size)}
        return update, after

    @torch.no_grad()
    def step(self, x: Tensor, state: State, stream: Tensor | None = None) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)`` in O(C·(Z + V) + D·N) time.

        The tensors of ``state`` are written to: clone them to branch.
        """
        begun, (q, k, v, gates), after = self._read_on(x[:, None], state)
        keys = append(state["keys"], begun, k, self.chunk)
        values = append(state["values"], begun, v, self.chunk)
        seen = slice(begun + 1)
        o = self._attend_on(q, keys[:, seen], values[:, seen])
        stream = x if stream is None else stream
        update = self._combine(o, gates, stream[:, None], None)
        return update[:, 0], after | {"keys": keys, "values": values}

    def _read_on(self, x: Tensor, state: State) -> tuple[int, tuple[Any, ...], State]:
        """Read the tokens ``x: (B, L, D)`` that follow those of ``state``.

        Return how many tokens of their chunk came before; queries, keys, values and gates; and the new
        state, all but keys and values.
        """
        before = int(state["position"][0])
        self._expect_room(before + x.shape[1])
        modes = {"modes": state["modes"]}
        average, after = self.ema.prefill(x, modes, lambda length: self.ema(length)[0])
        average = torch.addcmul(average, self.omega, x).to(x.dtype)
        q, k, gates = self._read(self.dropout(F.silu(average)))
        after["position"] = state["position"] + x.shape[1]
        return before % self.chunk, (q, k, F.silu(self.value(x)), gates), after

    def _attend_on(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with the last L tokens; ``k`` and ``v`` begin with the tokens of the chunk that came before them."""
        begun, end = k.shape[1] - q.shape[1], min(self.chunk, k.shape[1])
        here = end - begun
        seen = None if here == 1 else torch.ones(here, end, dtype=torch.bool, device=q.device).tril(begun)
        scores = q[:, :here] @ k[:, :end].transpose(1, 2)
        o = self._weights(scores, self._bias(end, begun), seen) @ v[:, :end]
        if k.shape[1] == end:
            return o
        return torch.cat([o, self._attend(q[:, here:], k[:, end:], v[:, end:], None)], dim=1)

    def state_size(self, length: int) -> int:
        """Count modes, keys and values, with the room for more."""
        d_model, d_qk, d_value, _ = self.sizes
        return d_model * self.ema.delta.shape[-1] + room(length, self.chunk) * (d_qk + d_value)


class Projection(nn.Linear):
    """A linear map that starts as MEGA's do: weights ~ N(0, 0.02²), biases 0."""

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


MIXER = MEGA
