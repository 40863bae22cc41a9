"""FLOPs of the chunked algorithm, for ``torch.utils.flop_counter``: two per multiply-add, matrix products only.

They are counted for the chunk size asked for, 64 where none was: a backend that chooses its own chunks is measured by
the same yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence

Shape = Sequence[int]
CHUNK = 64


def products(tokens: int, D: int, E: int, C: int, *, causal: bool, decays: bool, backward: bool) -> int:
    """Return the FLOPs of all matrix products over ``tokens`` = B L H tokens in chunks of C.

    A product inside chunks costs C multiply-adds per token and column, one with a state D E per token.
    """
    if not causal and not decays:
        inside, states = 0, 4 if backward else 2
    elif backward:
        inside, states = C * (3 * D + 2 * E), 5 if causal else 11
    else:
        inside, states = C * (D + E), 2 if causal else 5
    return 2 * tokens * (inside + states * D * E)


def forward_flops(q: Shape, k: Shape, v: Shape, log_decay: Shape | None, *rest: object, **_: object) -> int:
    """Return the FLOPs of ``chela::linear_attention_chunked`` from the shapes of its arguments."""
    causal, chunk = bool(rest[3]), rest[7]
    assert isinstance(chunk, int)
    B, L, H, D = q
    return products(
        B * L * H, D, v[-1], min(chunk or CHUNK, L), causal=causal, decays=log_decay is not None, backward=False
    )


def backward_flops(
    d_out: Shape, d_end: Shape | None, q: Shape, k: Shape, v: Shape, log_decay: Shape | None, *rest: object, **_: object
) -> int:
    """Return the FLOPs of ``chela::linear_attention_chunked_backward`` from the shapes of its arguments."""
    causal, chunk = bool(rest[5]), rest[9]
    assert isinstance(chunk, int)
    B, L, H, D = q
    return products(
        B * L * H, D, v[-1], min(chunk or CHUNK, L), causal=causal, decays=log_decay is not None, backward=True
    )
