"""CHELA (arXiv 2406.08128): short-long convolution, then linear attention, then a gate.

Shapes: B batch, L length, D model width, H heads, Z query/key width per head, V value width over all heads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.attention import Core, columns
from chela.layers.short_long_conv import ShortLongConv
from chela.layers.stages import gate
from chela.layers.state import State, expect_causal, nested, part
from chela.ops.padding import zero_padding


class ChelaLayer(nn.Module):
    """Short-long convolutions help linear attention to focus (arXiv 2406.08128, section 3).

    With u and c the short and the long stage of the convolution of the input x (``ShortLongConv``)::

        v = SiLU(W_v x)
        z = W_z u or W_z c,   q = γ_q ⊙ z + β_q,   k = γ_k ⊙ z + β_k     per head; of u to select (qk = "short")
        s = norm(linear_attention(φ(q), φ(k), v_s))                      selects: H heads of signed weights, φ = SiLU
        p = norm(linear_attention(ψ(q), ψ(k), v_p) / Σ_j ψ(q)·ψ(k_j))    pools: one head, positive, ψ = elu + 1
        o = s,   o = p,   or o = [s, p]                                  attention = "select", "pool" or "both"
        h = SiLU(W_h c + W_o (o ⊙ SiLU(W_r c))),   g = σ(W_u c)
        returns g ⊙ (h − x)                                              gate = "highway"
        returns W_o o                                                    gate = "none"

    Without options it is the system of the tables. Time O(L·log L·D + L·(D·V + Z·V)), memory O(L·(D + V)).
    ``docs/fidelity.md`` says what the paper states and what was decided here, ``docs/attention.md`` what it does.

    Args:
        d_model: Width D.
        l_max: Longest sequence, and taps of the long kernel.
        causal: No position sees a later one.
        dropout: On h, before the gate, as in MEGA.
        d_qk: Width Z of queries and keys, per head.
        d_value: Width V of the values, all heads together; None is 2·D.
        pooled: Share of V that the pooling head of "both" has, and what the selecting heads cannot share evenly.
        heads: Selecting heads H.
        qk: The stage that the selecting heads make queries and keys of. Without a short stage it is the long one.
        conv: Convolution before the attention; with "none", u = c = x.
        long_kernel: How the long kernel is made; see ``chela.layers.long_kernel``.
        scale_size: Parameters of a piece of the multi-scale kernel, as the next three; see ``MultiscaleKernel``.
        initial_scale: Stretch all pieces 2^n times more, and have n fewer.
        scale_decay_min: A piece is so many times weaker than the one before it, in the first channel.
        scale_decay_max: The same in the last channel.
        reparam: Train short kernels beside the long one; see ``LongConv``.
        attention: What the attention is made of; with "none", o = norm(SiLU(W_v c)).
        gate: How the convolution gates the attention.

    Raises:
        ValueError: An argument out of its limits, or values that the heads cannot share evenly.

    >>> layer = ChelaLayer(16, l_max=100)
    >>> layer(torch.randn(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    in_pieces = True

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        dropout: float = 0.0,
        d_qk: Annotated[int, {"ge": 1, "le": 256}] = 32,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        pooled: Annotated[float, {"ge": 0, "le": 1, "neutral": 0.25}] = 0.25,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 4,
        qk: Annotated[Literal["short", "long"], {"neutral": "long"}] = "short",
        conv: Literal["short-long", "short", "long", "none"] = "short-long",
        long_kernel: Literal["multiscale", "ema"] = "multiscale",
        scale_size: Annotated[int, {"ge": 1, "le": 4096, "neutral": 16}] = 16,
        initial_scale: Annotated[int, {"ge": 0, "le": 30, "neutral": 0}] = 0,
        scale_decay_min: Annotated[float, {"ge": 0.5, "le": 8, "neutral": 2.0}] = 2.0,
        scale_decay_max: Annotated[float, {"ge": 0.5, "le": 8, "neutral": 2.0}] = 2.0,
        reparam: bool = True,
        attention: Literal["both", "select", "pool", "none"] = "both",
        gate: Literal["highway", "none"] = "highway",
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        pooled = {"select": 0.0, "both": pooled}.get(attention, 1.0)
        d_select = heads * (int((1 - pooled) * d_value) // heads)
        if (attention == "select" and d_select < d_value) or (attention == "both" and d_select == 0):
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.causal, self.qk, self.gate = causal, qk, gate
        scales: dict[str, float] = {"scale_size": scale_size, "initial_scale": initial_scale}
        scales |= {"decay_min": scale_decay_min, "decay_max": scale_decay_max}
        self.conv = ShortLongConv(
            d_model,
            l_max=l_max,
            causal=causal,
            mode=conv,
            long_kernel=long_kernel,
            kernel_options=scales if long_kernel == "multiscale" else None,
            branches=(5, 31) if reparam else (),
        )
        self.cores: Any = nn.ModuleList()
        if attention in ("select", "both"):
            self.cores.append(Core(d_model, d_select, heads, d_qk, pools=False, causal=causal))
        if attention in ("pool", "both"):
            self.cores.append(Core(d_model, d_value - d_select, 1, d_qk, pools=True, causal=causal))
        self.norm = nn.LayerNorm(d_value) if attention == "none" else None
        self.value = nn.Linear(d_model, d_value)
        if gate != "none":
            self.gate_in = nn.Linear(d_model, d_value)
            self.skip = nn.Linear(d_model, d_model)
            self.highway = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_value, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ``x: (B, L, D)`` to the update ``(B, L, D)``, 0 where ``mask: (B, L)`` is False."""
        width = self.value.in_features
        if x.ndim != 3 or x.shape[2] != width or not x.shape[1]:
            raise ValueError(f"expected x of shape (B, L, {width}) with L of at least 1, got {tuple(x.shape)}")
        x = zero_padding(x, mask)
        u, c = self.conv.stages(x, mask)
        parts = [core(z, v, mask) for core, z, v in self._inputs(x, u, c)]
        return self._gated(parts, x, c, mask)

    def _inputs(self, x: Tensor, u: Tensor, c: Tensor) -> list[tuple[Core, Tensor, Tensor]]:
        """Return each core with the stage that its queries and keys read, and its values W_v x before SiLU."""
        values = columns(self.value(x), [core.width for core in self.cores]) if self.cores else []
        of = [u if self.qk == "short" and not core.pools else c for core in self.cores]
        return list(zip(self.cores, of, values, strict=True))

    def _gated(self, parts: list[Tensor], x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        """Join the outputs of the cores (without cores: values of c), and gate them by c."""
        if self.norm is not None:
            parts = [self.norm(F.silu(self.value(c)))]
        o = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if self.gate == "none":
            return zero_padding(self.dropout(self.out(o)), mask)
        return gate(o, c, x, mask, (self.gate_in, self.out, self.skip, self.highway), self.dropout)

    def start(self, batch: int) -> State:
        """Return the state before the first token, ``conv.…`` and ``cores.0.…``; a RuntimeError if it looks ahead."""
        expect_causal(self)
        state = nested("conv", self.conv.start(batch))
        for i, core in enumerate(self.cores):
            state |= nested(f"cores.{i}", core.start(batch))
        return state

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed the tokens ``x: (B, L, D)`` that follow those of ``state``; return their update and the new state.

        It is what ``forward`` gives them; gradients flow to x and the parameters. ``state`` is not changed. There may
        be more than l_max tokens in all: a long kernel of l_max taps drops the oldest, "ema" has no end.
        """
        return self._advance("prefill", x, state)

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)`` to the causal layer; return its update ``(B, D)`` and the new state.

        It equals the same position of ``prefill``. Without gradients, O(D·log² K) on average for a long kernel of K
        taps, O(Z·V) for the attention. The tensors of ``state`` may be written to: clone them to branch. In eval mode
        the long kernel is built once.
        """
        return self._advance("step", x, state)

    def _advance(self, form: Literal["prefill", "step"], x: Tensor, state: State) -> tuple[Tensor, State]:
        u, c, end = self.conv.advance(form, x, part("conv", state))
        parts: list[Tensor] = []
        after = nested("conv", end)
        for i, (core, z, v) in enumerate(self._inputs(x, u, c)):
            o, end = getattr(core, form)(z, v, part(f"cores.{i}", state))
            parts.append(o)
            after |= nested(f"cores.{i}", end)
        return self._gated(parts, x, c, None), after

    def state_size(self, length: int) -> int:
        """Count the numbers of a sequence that ``step`` remembers of ``length`` tokens, beside the position.

        They are the sums S and z, and the convolution's past, which grows to about two to four times l_max a channel.
        """
        sums: int = sum(core.heads * core.d_qk * (core.width // core.heads + 1) for core in self.cores)
        return sums + self.conv.state_size(length)


MIXER = ChelaLayer
