"""The linear transformer (arXiv 2006.16236), and what other systems of linear attention inherit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.layers.multi_head import MultiHead
from chela.layers.state import State, detached
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.padding import zero_padding


class LinearAttention(MultiHead):
    """Linear attention with elu + 1 features, normalised (arXiv 2006.16236, section 3.2).

    Per head, with φ(x) = elu(x) + 1::

        o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)

    O(L·V·(D + Z)) time, O(L·V) memory; see ``MultiHead`` for the arguments and letters. A system that inherits from it
    has other ``features``, other ``edges``, or no ``normalize``.

    >>> LinearAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    features_per_width = 1
    in_pieces = True
    normalize = True

    def feature_map(self, x: Tensor) -> Tensor:
        """Return elu(x) + 1, positive (arXiv 2006.16236, equation 7)."""
        return F.elu(x) + 1

    def features(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the projection ``y: (..., 3V)`` to φ(q), φ(k) and v, each ``(..., H, ·)``."""
        q, k, v = self.split(y)
        return self.feature_map(q), self.feature_map(k), v

    def edges(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return log λ of the edges t−1 → t and t → t−1, each ``(H,)`` or ``(B, L, H)``; None is no decay."""
        return None, None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over the tokens that are True in ``mask: (B, L)``."""
        x = zero_padding(x, mask)
        q, k, v = self.features(self.project(x, mask))
        forth, back = self.edges(x, mask)
        decays: dict[str, Any] = {"log_decay": forth, "log_decay_back": None if self.causal else back}
        o = linear_attention(q, k, v, causal=self.causal, mask=mask, normalize=self.normalize, **decays)
        return self.merge(self.attended(o), x, mask)

    def start(self, batch: int) -> State:
        """Return the sums S and z, and what the short convolution keeps."""
        before = super().start(batch)
        sizes = batch, self.heads, self.features_per_width * self.head_width, self.head_width
        return before | LinearAttentionState.zeros(*sizes, like=self.out.weight)._asdict()

    def onward(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """Return log λ of the edges into ``x: (B, L, D)`` from the token before each, and what the next call needs."""
        return self.edges(x, None)[0], {}

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed ``x: (B, L, D)``."""
        y, recent = self.advance("prefill", x, state)
        q, k, v = self.features(y)
        edges, after = self.onward(x, state)
        past = LinearAttentionState(state["S"], state["z"])
        options: dict[str, Any] = {"normalize": self.normalize, "initial_state": past, "return_state": True}
        o, sums = linear_attention(q, k, v, causal=True, log_decay=edges, **options)
        return self.merge(self.attended(o), x, None), recent | after | detached(**sums._asdict())

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)``."""
        y, recent = self.advance("step", x, state)
        q, k, v = self.features(y)
        edges, after = self.onward(x[:, None], state)
        edges = edges[:, 0] if edges is not None and edges.ndim == 3 else edges
        past = LinearAttentionState(state["S"], state["z"])
        o, sums = linear_attention_step(q, k, v, past, log_decay=edges, normalize=self.normalize)
        return self.merge(o, x, None), recent | after | sums._asdict()

    def state_size(self, length: int) -> int:
        """Count the sums S and z, and the short convolution's inputs."""
        sums = self.features_per_width * self.d_value * (self.head_width + 1)
        return super().state_size(length) + sums


MIXER = LinearAttention
