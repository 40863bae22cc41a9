"""Softmax attention, the transformer's own (arXiv 1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.cache import append, joined, room, with_room
from chela.layers.multi_head import Heads, MultiHead, Taps, Width
from chela.layers.state import State
from chela.ops.padding import zero_padding


class SoftmaxAttention(MultiHead):
    """Multi-head softmax attention (arXiv 1706.03762, section 3.2), rotary positions (2104.09864) on queries and keys.

    Per head::

        o_i = Σ_j softmax_j(q_i·k_j / √Z) v_j

    O(L²·V) time, O(L·V) memory through the fused kernel (O(B·L²) when causal with a mask); see ``MultiHead`` for the
    other arguments.

    Args:
        rotary: Turn queries and keys by their position; the width of a head must then be even. False with
            ``model.positions=learned``.

    >>> SoftmaxAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Heads = 4,
        d_value: Width = None,
        short: Taps = 0,
        rotary: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, short=short, causal=causal)
        if rotary and self.head_width % 2:
            what = f"expected an even width of a head, got {self.head_width}; change d_value or heads"
            raise ValueError(f"rotary: {what}")
        self.rotary = rotary

    def split(self, y: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``y: (B, L, 3V)``, whose first token has the position ``start``, into ``(B, L, H, Z)`` each."""
        q, k, v = super().split(y)
        return (rotate(q, start), rotate(k, start), v) if self.rotary else (q, k, v)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over the tokens that are True in ``mask: (B, L)``."""
        x = zero_padding(x, mask)
        q, k, v = (t.transpose(1, 2) for t in self.split(self.project(x, mask)))
        seen = None if mask is None else mask[:, None, None, :]
        if seen is not None and self.causal:
            seen = seen & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and mask is None)
        return self.merge(self.attended(o.transpose(1, 2)), x, mask)

    def start(self, batch: int) -> State:
        """Return ``keys``, turned if ``rotary``, ``values``, both ``(B, H, R, Z)``, ``position`` T and ``short.…``.

        The first T of R places are tokens, the others room for more; R is a power of two
        (``chela.layers.cache``).
        """
        before = super().start(batch)
        keys = self.out.weight.new_zeros(batch, self.heads, room(0), self.head_width)
        position = torch.zeros(batch, dtype=torch.int64)
        return before | {"keys": keys, "values": keys.clone(), "position": position}

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed ``x: (B, L, D)`` after T tokens in O(L·(L + T)·V) time.

        The new state is a copy: O((L + T)·V) memory.
        """
        before, length = int(state["position"][0]), x.shape[1]
        y, recent = self.advance("prefill", x, state)
        q, k, v = (t.transpose(1, 2) for t in self.split(y, before))  # (B, H, L, Z)
        k, v = joined(state["keys"], before, k), joined(state["values"], before, v)
        end = before + length
        seen = None  # the mask is the kernel's own, or there is none
        if before and length > 1:
            seen = torch.ones(length, end, dtype=torch.bool, device=x.device).tril(before)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=before == 0)
        update = self.merge(self.attended(o.transpose(1, 2)), x, None)
        keys, values = with_room(k, room(end)), with_room(v, room(end))
        return update, recent | {"keys": keys, "values": values, "position": state["position"] + length}

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)`` after T in O(T·V) time.

        The tensors of ``state`` are written to: clone them to branch.
        """
        before = int(state["position"][0])
        y, recent = self.advance("step", x, state)
        q, k, v = (t.transpose(1, 2) for t in self.split(y[:, None], before))  # (B, H, 1, Z)
        keys = append(state["keys"], before, k)
        values = append(state["values"], before, v)
        seen = slice(before + 1)
        o = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])
        update = self.merge(self.attended(o.transpose(1, 2)), x[:, None], None)
        return update[:, 0], recent | {"keys": keys, "values": values, "position": state["position"] + 1}

    def state_size(self, length: int) -> int:
        """Count the keys and values, with the room for more, and the short convolution's inputs."""
        return super().state_size(length) + 2 * self.d_value * room(length)


def rotate(x: Tensor, start: int, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features, i and i + Z/2, by an angle that grows with the position (arXiv 2104.09864).

    ``x: (B, L, H, Z)`` has an even Z, its first token the position ``start``; the slowest pair turns by about 1/base a
    position. Angles are computed in at least float32.
    """
    length, heads, width = x.shape[1:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = torch.arange(start, start + length, device=x.device, dtype=dtype)[:, None, None] * rates
    # One factor for each number of a record, so that a product is one long loop.
    cos = torch.cat([angles.cos()] * 2, dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    return torch.addcmul(x * cos, x.roll(width // 2, dims=-1), sin)


MIXER = SoftmaxAttention
