"""CHELA (arXiv 2406.08128): short-long convolution, then linear attention, then a gate.

Shapes: B batch, L length, D model width, H heads, Z query/key width per head, V value width over all heads.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.attention import FEATURE_MAPS, Attended, columns, make_decay
from chela.layers.norm import LayerNorm
from chela.layers.padding import zero_padding
from chela.layers.param_groups import mark
from chela.layers.remade import with_remade
from chela.layers.short_long_conv import ShortLongConv
from chela.layers.state import State, expect_causal, nested, part, settled
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.precision import accumulation_dtype


class ChelaLayer(nn.Module):
    """Short-long convolutions help linear attention to focus (arXiv 2406.08128, section 3).

    With c the convolution of the input x (``ShortLongConv``), φ the feature map and ⊙ the product by channel::

        v = SiLU(W_v x)
        z = W_z c,   q = γ_q ⊙ z + β_q,   k = γ_k ⊙ z + β_k              per head, of the selecting and of the pooling
        s = norm(linear_attention(φ(q), φ(k), v_s))                      selects: H heads of signed weights
        p = norm(linear_attention(ψ(q), ψ(k), v_p) / Σ_j ψ(q)·ψ(k_j))    pools: one head, positive, ψ = elu + 1
        o = s,   o = p,   or o = [s, p]                                  attention = "select", "pool" or "both"
        h = SiLU(W_h c + W_o (o ⊙ SiLU(W_r c))),   g = σ(W_u c),   returns g ⊙ (h − stream)     gate = "mega"
        h = W_o (o ⊙ SiLU(W_g c))                                 returns h                  gate = "output"
        h = W_o o                                                returns h                  gate = "none"

    Without options it is the system of the tables. Time O(L·log L·D + L·(D·V + Z·V)), memory O(L·(D + V)).
    ``docs/fidelity.md`` says what the paper states and what was decided here, ``docs/attention.md`` what it does.

    Args:
        d_model: Width D.
        l_max: Longest sequence, and taps of the long kernel.
        causal: No position sees a later one.
        dropout: On h, before the gate, as in MEGA.
        layer: Index of the layer, from 0; with ``depth``, for ``decay="fixed"`` alone.
        depth: Number of layers.
        d_qk: Width Z of queries and keys, per head.
        d_value: Width V of the values, all heads together; None is 2·D.
        pooled: Of these, about which share the pooling head gets of "both": what is left when the heads share the rest.
        heads: Selecting heads H.
        conv: Convolution before the attention; with "none", c = x.
        short_kernel: Taps of the short convolution, odd.
        long_kernel: How the long kernel is made; see ``chela.layers.long_kernel``.
        scale_size: Parameters of a piece of the multi-scale kernel, as the next three; see ``MultiscaleKernel``.
        initial_scale: Stretch all pieces 2^n times more, and have n fewer.
        scale_decay_min: A piece is so many times weaker than the one before it, in the first channel.
        scale_decay_max: The same in the last channel.
        reparam: Train short kernels beside the long one; see ``LongConv``.
        attention: What the attention is made of; with "none", o = SiLU(W_v c).
        feature_map: Feature map φ of the selecting heads; "elu" is elu + 1.
        normalize: Divide their sums by that of the weights, which needs a positive φ.
        decay: How their weights fade with the distance: not at all, or "fixed" by ALiBi's slopes, flatter in deeper
            layers, "learned", one number a head, "token", one a head and token.
        gate: How the convolution gates the attention.
        qk: Of which stage of the convolution the selecting heads make queries and keys; where there is one, of that.

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
        layer: int = 0,
        depth: int = 1,
        d_qk: Annotated[int, {"ge": 1, "le": 256}] = 32,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        pooled: Annotated[float, {"ge": 0, "le": 1, "neutral": 0.25}] = 0.25,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 4,
        conv: Literal["short-long", "short", "long", "none"] = "short-long",
        short_kernel: Annotated[int, {"ge": 3, "le": 31, "odd": True}] = 5,
        long_kernel: Literal["multiscale", "ema"] = "multiscale",
        scale_size: Annotated[int, {"ge": 1, "le": 4096, "neutral": 16}] = 16,
        initial_scale: Annotated[int, {"ge": 0, "le": 30, "neutral": 0}] = 0,
        scale_decay_min: Annotated[float, {"ge": 0.5, "le": 8, "neutral": 2.0}] = 2.0,
        scale_decay_max: Annotated[float, {"ge": 0.5, "le": 8, "neutral": 2.0}] = 2.0,
        reparam: bool = True,
        attention: Literal["both", "select", "pool", "none"] = "both",
        feature_map: Literal["silu", "elu", "identity"] = "silu",
        normalize: bool = False,
        decay: Literal["none", "fixed", "learned", "token"] = "none",
        gate: Literal["highway", "output", "mega", "none"] = "mega",
        qk: Annotated[Literal["short", "long"], {"neutral": "long"}] = "long",
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        d_pool = d_value - heads * (int((1 - pooled) * d_value) // heads)
        d_pool = {"pool": d_value, "both": d_pool}.get(attention, 0)
        selecting = 0 if attention == "none" else d_value - d_pool
        if selecting % heads or (attention == "both" and selecting <= 0):
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.causal, self.gate, self.qk = causal, gate, qk
        scales: dict[str, float] = {"scale_size": scale_size, "initial_scale": initial_scale}
        scales |= {"decay_min": scale_decay_min, "decay_max": scale_decay_max}
        self.conv = ShortLongConv(
            d_model,
            l_max=l_max,
            causal=causal,
            mode=conv,
            short_kernel=short_kernel,
            long_kernel=long_kernel,
            kernel_options=scales if long_kernel == "multiscale" else None,
            branches=(5, 31) if reparam else (),
        )
        self.cores: Any = nn.ModuleList()
        if attention in ("select", "both"):
            options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "causal": causal}
            options["decay"] = make_decay(decay, d_model, heads, layer, depth)
            self.cores.append(Core(d_model, selecting, heads, d_qk, **options))
        if attention in ("pool", "both"):
            self.cores.append(Core(d_model, d_pool, 1, d_qk, feature_map="elu", normalize=True, causal=causal))
        self.norm = LayerNorm(d_value) if attention == "none" else None
        self.value = nn.Linear(d_model, d_value)
        if gate != "none":
            self.gate_in = nn.Linear(d_model, d_value)
        if gate in ("mega", "highway"):
            self.skip = nn.Linear(d_model, d_model)
            self.highway = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_value, d_model)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(_with_cores)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Map the normed ``x: (B, L, D)`` to the update ``(B, L, D)``, 0 where ``mask: (B, L)`` is False.

        ``gate="mega"`` replaces a part of ``stream: (B, L, D)``, the residual stream; None is x.
        """
        x = zero_padding(x, mask)
        u, c = self.conv.stages(x, mask)
        parts = self._values(x, c)
        if self.cores:
            parts = [core(self._read(core, u, c), v, mask) for core, v in zip(self.cores, parts, strict=True)]
        return self._combine(parts, c, x if stream is None or self.gate == "highway" else stream, mask)

    def _read(self, core: Core, u: Tensor, c: Tensor) -> Tensor:
        """Return what a core makes queries and keys of: pooling ones of c."""
        return u if self.qk == "short" and not core.normalize else c

    def _values(self, x: Tensor, c: Tensor) -> list[Tensor]:
        """Return W_v x ``(…, W)`` of each core; without cores, what takes the place of their outputs."""
        if self.norm is not None:
            return [self.norm(F.silu(self.value(c)))]
        return columns(self.value(x), [core.width for core in self.cores])

    def _combine(self, parts: list[Tensor], c: Tensor, stream: Tensor, mask: Tensor | None) -> Tensor:
        o = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        h = self.out(o) if self.gate == "none" else with_remade(self.out, (_gated, o, self.gate_in(c)))
        if self.gate not in ("mega", "highway"):
            return zero_padding(self.dropout(h), mask)
        h = self.dropout(F.silu(h + self.skip(c)))
        return torch.sigmoid(self.highway(c)) * zero_padding(h - stream, mask)

    def start(self, batch: int) -> State:
        """Return the state before the first token, ``conv.…`` and ``cores.0.…``.

        Raises:
            RuntimeError: The layer looks ahead.
        """
        expect_causal(self)
        state = nested("conv", self.conv.start(batch))
        for i, core in enumerate(self.cores):
            state |= nested(f"cores.{i}", core.start(batch))
        return state

    def prefill(self, x: Tensor, state: State, stream: Tensor | None = None) -> tuple[Tensor, State]:
        """Feed the tokens ``x: (B, L, D)`` that follow those of ``state``; return their update and the new state.

        It is what ``forward`` gives them; gradients flow to x and the parameters. ``state`` is not changed. There may
        be more than l_max tokens in all: a long kernel of l_max taps drops the oldest, "ema" has no end.
        """
        return self._go_on("prefill", x, state, stream)

    @torch.no_grad()
    def step(self, x: Tensor, state: State, stream: Tensor | None = None) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)`` to the causal layer; return its update ``(B, D)`` and the new state.

        It equals the same position of ``prefill``; ``stream: (B, D)`` is as in ``forward``. Without gradients,
        O(D·log² K) on average for a long kernel of K taps, O(Z·V) for the attention. The tensors of ``state`` may be
        written to: clone them to branch. In eval mode the long kernel is built once.
        """
        return self._go_on("step", x, state, stream)

    def _go_on(self, form: str, x: Tensor, state: State, stream: Tensor | None) -> tuple[Tensor, State]:
        (u, c), end = getattr(self.conv, f"{form}_stages")(x, part("conv", state))
        parts, after = self._values(x, c), nested("conv", end)
        for i, core in enumerate(self.cores):
            parts[i], end = getattr(core, form)(self._read(core, u, c), parts[i], part(f"cores.{i}", state))
            after |= nested(f"cores.{i}", end)
        return self._combine(parts, c, x if stream is None or self.gate == "highway" else stream, None), after

    def state_size(self, length: int) -> int:
        """Count the numbers of a sequence that ``step`` remembers of ``length`` tokens, beside the position.

        They are the sums S and z, and the convolution's past, which grows to about two to four times l_max a channel.
        """
        sums: int = sum(core.heads * core.d_qk * (core.width // core.heads + 1) for core in self.cores)
        return sums + self.conv.state_size(length)

    def extra_repr(self) -> str:
        """Show what no submodule shows."""
        return f"causal={self.causal}, gate={self.gate}"


class Core(nn.Module):
    """Linear attention over values ``SiLU(v: (B, L, W))``, with queries and keys from c, then a norm.

    Queries and keys of a head are one projection, each with its own scale and shift (arXiv 2209.10655, section 3.2): at
    the start equal tokens match, which is what recall is learned from (docs/attention.md).
    """

    def __init__(
        self, d_model: int, width: int, heads: int, d_qk: int, *, feature_map: str, normalize: bool, causal: bool,
        decay: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.heads, self.d_qk, self.causal = width, heads, d_qk, causal
        self.feature_map, self.normalize, self.decay = FEATURE_MAPS[feature_map], normalize, decay
        self.project = nn.Linear(d_model, heads * d_qk)
        self.gamma = nn.Parameter(torch.empty(2, heads, d_qk))
        self.beta = nn.Parameter(torch.empty(2, heads, d_qk))
        mark(self, "gamma", "beta", weight_decay=0.0)
        self.norm = LayerNorm(width)
        self.attended = Attended()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with queries and keys equal to the projection."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, c: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with all of ``c: (B, L, D)``; return ``(B, L, W)``.

        Weights that are divided by their sum are kept in float32 under autocast: they are nearly equal, and rounding
        them to bf16 takes a quarter of what tells positions apart.
        """
        o: Tensor = self._sum(c, v, mask=mask)
        return self.attended(self.norm(o.flatten(-2)))  # type: ignore[no-any-return]

    def _sum(self, c: Tensor, v: Tensor, **options: Any) -> Any:
        if self.normalize and torch.is_autocast_enabled(c.device.type):
            with torch.autocast(c.device.type, enabled=False):
                return self._sum(c.float(), v.float(), **options)
        log_decay = None if self.decay is None else self.decay(c)  # log λ (H,) or (B, L, H)
        options |= {"causal": self.causal, "log_decay": log_decay, "normalize": self.normalize}
        attend = functools.partial(linear_attention, **options)
        return with_remade(attend, *self._arguments(c, v))

    def _arguments(self, c: Tensor, v: Tensor) -> list[tuple[Any, ...]]:
        """Return how to make queries and keys ``(…, H, Z)`` and values ``(…, H, W / H)``, and of what."""
        z = self.project(c)
        read = [(self._mapped, z, gamma, beta) for gamma, beta in zip(self.gamma, self.beta, strict=True)]
        return [*read, (self._by_head, v)]

    def _mapped(self, z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.feature_map(rearrange(z, "... (h z) -> ... h z", h=self.heads) * gamma + beta)

    def _by_head(self, v: Tensor) -> Tensor:
        return rearrange(F.silu(v), "... (h e) -> ... h e", h=self.heads)

    def start(self, batch: int) -> State:
        """Return the state before the first token: the sums S and z."""
        like, dtype = self.norm.weight, accumulation_dtype(self.norm.weight.dtype)
        sizes = batch, self.heads, self.d_qk, self.width // self.heads
        return LinearAttentionState.zeros(*sizes, device=like.device, dtype=dtype)._asdict()

    def prefill(self, c: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Attend with the tokens ``c: (B, L, D)``, ``v: (B, L, W)`` that follow those of ``state``."""
        o, sums = self._sum(c, v, initial_state=LinearAttentionState(**state), return_state=True)
        return self.attended(self.norm(o.flatten(-2))), settled(**sums._asdict())

    def step(self, c: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Attend with one token more, ``c: (B, D)``, ``v: (B, W)``."""
        q, k, v = (make(*inputs) for make, *inputs in self._arguments(c, v))
        log_decay = None if self.decay is None else self.decay(c)
        past = LinearAttentionState(**state)
        o, sums = linear_attention_step(q, k, v, past, log_decay=log_decay, normalize=self.normalize)
        return self.norm(o.flatten(-2)), sums._asdict()

    def extra_repr(self) -> str:
        """Show what no submodule shows."""
        return f"heads={self.heads}, d_qk={self.d_qk}, normalize={self.normalize}"


def _gated(o: Tensor, gate: Tensor) -> Tensor:
    return o * F.silu(gate)


def _with_cores(layer: ChelaLayer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read the weights of version 0.1 too: there all heads shared one projection, and the one norm was the layer's."""
    if f"{prefix}query_key.gamma" not in state:
        return
    heads = state[f"{prefix}query_key.gamma"].shape[1]
    for name in ("project.weight", "project.bias", "gamma", "beta"):
        tensor = state.pop(f"{prefix}query_key.{name}")
        state[f"{prefix}cores.0.{name}"] = torch.cat([tensor] * heads) if "project" in name else tensor
    for name in ("norm.weight", "norm.bias", "decay.raw"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}cores.0.{name}"] = state.pop(f"{prefix}{name}")


MIXER = ChelaLayer
