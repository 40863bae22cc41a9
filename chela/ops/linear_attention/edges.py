"""Decays inside a segment, for one direction, and the gradient of the log decays.

Sums of log decays are kept in float64 and per chunk, and only differences of them are rounded: a token that decays by
exp(-100) does not cost its neighbours their digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chela.ops.linear_attention.segments import Segment


def lowest_log_decay(dtype: torch.dtype) -> float:
    """Return a log decay whose exp is 0 in ``dtype``; anything below it, -inf too, means the same."""
    return -750.0 if dtype == torch.float64 else -110.0


@dataclass(frozen=True)
class Edges:
    """The decays of one direction in one segment; leading axes are 1 where all chunks or rows agree. None: no decay.

    Attributes:
        sums: `(n, B, H, C)` float64, Σ of log decays from the chunk's first edge to token i's own edge.
        enter: `(n, B, H, C, 1)`, exp(sums_i): the weight between the chunk's left border and token i.
        leave: `(n, B, H, C, 1)`, exp(sums_last − sums_i): the weight between token i and the chunk's last token.
    """

    sums: Tensor | None = None
    enter: Tensor | None = None
    leave: Tensor | None = None

    def entering(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return x `(n, B, H, C, ·)` weighted by what lies between each token and the chunk's left border."""
        return x if self.enter is None else torch.mul(x, self.enter, out=out)

    def leaving(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return x weighted by what lies between each token and the chunk's last token."""
        return x if self.leave is None else torch.mul(x, self.leave, out=out)

    def across(self, x: Tensor) -> Tensor:
        """Return x `(n, B, H)` weighted by the decay over each whole chunk."""
        return x if self.enter is None else x * self.enter[..., -1, 0]

    def within(self, x: Tensor) -> Tensor:
        """Return M inside each chunk for j ≤ i, 0 above: `(n, B, H, C, C)`, or `(C, C)` without decay.

        Args:
            x: `(n, B, H, C, ·)`, whose dtype M takes.
        """
        C = x.shape[-2]
        if self.sums is None:
            return x.new_ones(C, C).tril_()
        M = x.new_empty(*self.sums.shape, C)
        torch.sub(self.sums[..., :, None], self.sums[..., None, :], out=M)
        return M.clamp_(max=0).exp_().tril_()

    def carry(self, states: Tensor, *, reverse: bool = False) -> Tensor:
        """Carry states `(n + 1, B, H, D, E)` over the borders of the chunks, in place.

        Going forward, ``states[0]`` is what comes in and ``states[c + 1]`` what chunk c adds; the answer's row r is the
        state at border r. In reverse, ``states[n]`` comes in from the right and ``states[c]`` is what chunk c adds.

        One addition per chunk, each to what is still in the cache: faster than one product of all of them with a
        triangle of decays, and than ``cumsum``, which walks along the wrong axis.
        """
        rows = states.unbind()
        steps = [(r - 1, r) for r in range(1, len(rows))]
        if reverse:
            steps = [(r, before) for before, r in reversed(steps)]
        if self.enter is None:
            for source, target in steps:
                rows[target].add_(rows[source])
            return states
        over = self.enter[..., -1, :, None].expand(len(rows) - 1, -1, -1, -1, -1).unbind()
        for source, target in steps:
            rows[target].addcmul_(rows[source], over[min(source, target)])
        return states


def edges(log_decay: Tensor | None, segment: Segment, dtype: torch.dtype, device: torch.device) -> Edges:
    """Return the decays of a segment from log decays: None, `(H,)` or `(B, L, H)`."""
    if log_decay is None:
        return Edges()
    log_decay = log_decay.detach().clamp(min=lowest_log_decay(dtype))
    if log_decay.ndim == 3:
        B, H = segment.rows.stop - segment.rows.start, log_decay.shape[-1]
        steps = torch.empty(segment.n, B, H, segment.C, 1, dtype=torch.float64, device=device)
        sums = segment.load(log_decay[..., None], steps)[..., 0].cumsum(-1)
    elif segment.absent is None:
        steps = torch.arange(1, segment.C + 1, dtype=torch.float64, device=device)
        sums = (log_decay.double()[:, None] * steps)[None, None]
    else:
        sums = (~segment.absent).double().cumsum(-1) * log_decay.double()[:, None]
    enter, leave = sums.exp().to(dtype), (sums[..., -1:] - sums).exp().to(dtype)
    return Edges(sums, enter[..., None], leave[..., None])


def edge_gradient(inside: Tensor, entering: Tensor, leaving: Tensor, through: Tensor) -> Tensor:
    """Return the gradient of each edge's log decay, `(…, C)`: all that flows over that edge.

    Every term is a sum of flows that do cross the edge; none is the difference of two large sums, so that the gradient
    keeps its digits when a strong decay makes it small. It is told for edges that are crossed rightward; for the other
    direction exchange ``entering`` and ``leaving``.

    Args:
        inside: `(…, C)`, what crosses each edge between two tokens of the chunk.
        entering: `(…, C)`, what each token exchanges with tokens left of the chunk.
        leaving: `(…, C)`, what each token exchanges with tokens right of it.
        through: `(…)`, what passes over the whole chunk.
    """
    reaching = entering.flip(-1).cumsum(-1).flip(-1)
    left = torch.nn.functional.pad(leaving[..., :-1].cumsum(-1), (1, 0))
    return inside + reaching + left + through[..., None]


def crossing(flow: Tensor) -> Tensor:
    """Return what crosses each edge, `(…, C)`, of the flow from token j to token i > j, `(…, C, C)`, zero elsewhere."""
    C = flow.shape[-1]
    before = torch.ones(C, C, dtype=flow.dtype, device=flow.device).triu_(1)
    return (flow @ before).tril_().sum(-2)
