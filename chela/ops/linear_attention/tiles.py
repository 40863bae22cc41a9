"""How the Triton kernels are cut: a table of tiles by dtype, width and shared memory, no tuning at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch


def padded(width: int) -> int:
    """Return the power of two, at least 32, that a tile of this width is padded to."""
    return max(32, 1 << (width - 1).bit_length())


class Launch(NamedTuple):
    """How the kernels are cut."""

    BT: int  # tokens per tile
    BK: int  # columns of a product's width at a time
    BC: int  # columns of the output per program
    BR: int  # rows of a state at a time, for the output and the gradient of q
    BU: int  # tokens i, and rows of a state, at a time, for the gradients of k and v
    BS: int  # rows and columns of a state per program
    NB: int  # tiles per chunk: more of them write fewer states and multiply more inside chunks
    warps: int  # per program
    stages: int  # of the software pipeline

    def filling(self, length: int, rows: int, processors: int) -> Launch:
        """Return this with a half, a quarter, … of NB where the states' programs would leave processors idle.

        A program works on one chunk of one of so many ``rows``, batch rows times heads. A chunk keeps two tiles: with
        one the gradient of k and v spills in bfloat16 at a width of 128.

        >>> wide = Launch(64, 64, 64, 64, 64, 64, NB=4, warps=8, stages=2)
        >>> wide.filling(32_768, 128, 132).NB, wide.filling(4_096, 4, 132).NB
        (4, 2)
        """
        NB = self.NB
        while NB > 2 and rows * -(-length // (self.BT * NB)) < processors:
            NB //= 2
        return self._replace(NB=NB)


# (dtype, widest tile) → (KiB of shared memory the device must have, launch), best first.
# Chosen so that compiled for such devices with everything on nothing spills (at 256, next to nothing).
# In half precision no product with a state has 16 rows in the middle; float32 would spill with 32. BU of float32: 16
# spills on later cards, 32 on an A100.
_TABLE = {
    (torch.bfloat16, 64): (
        (200, Launch(64, 64, 64, 64, 64, 64, 4, 8, 2)),
        (90, Launch(32, 64, 64, 64, 32, 64, 8, 4, 2)),
        (48, Launch(32, 64, 32, 32, 32, 32, 8, 4, 1)),
        (0, Launch(32, 32, 32, 32, 32, 32, 8, 4, 1)),
    ),
    (torch.bfloat16, 128): (
        (200, Launch(64, 128, 128, 32, 32, 64, 4, 8, 2)),
        (90, Launch(32, 128, 128, 32, 32, 64, 8, 8, 2)),
        (48, Launch(32, 128, 32, 32, 32, 32, 8, 4, 1)),
        (0, Launch(32, 32, 32, 32, 32, 32, 8, 4, 1)),
    ),
    (torch.bfloat16, 256): (
        (200, Launch(64, 64, 128, 32, 32, 64, 4, 8, 1)),
        (90, Launch(32, 64, 128, 32, 32, 64, 8, 8, 1)),
        (0, Launch(32, 32, 32, 32, 32, 32, 8, 4, 1)),
    ),
    (torch.float16, 64): (
        (90, Launch(32, 64, 64, 32, 32, 64, 8, 8, 1)),
        (0, Launch(32, 32, 32, 32, 32, 32, 8, 4, 1)),
    ),
    **dict.fromkeys(
        ((torch.float16, width) for width in (128, 256)),
        (
            (90, Launch(32, 128, 64, 32, 32, 64, 8, 8, 1)),
            (0, Launch(32, 32, 32, 32, 32, 32, 8, 4, 1)),
        ),
    ),
    **dict.fromkeys(
        ((torch.float32, width) for width in (64, 128, 256)),
        (
            (200, Launch(32, 16, 64, 16, 32, 32, 4, 8, 1)),
            (48, Launch(32, 16, 64, 16, 16, 32, 4, 8, 1)),
            (0, Launch(16, 32, 16, 16, 16, 16, 8, 4, 1)),
        ),
    ),
}


def precision(dtype: torch.dtype) -> str:
    """Return how products on tensor cores keep the digits of their inputs: float32 takes three products in TF32.

    Products with sums of float16 inputs run in TF32 too, which has as many digits; on AMD float32 is plain FMA.
    """
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


# Interpreted, each program costs milliseconds whatever its size: fewer, larger ones.
INTERPRETED = Launch(64, 128, 128, 64, 32, 128, 2, 4, 1)


def launches(
    D: int, E: int, dtype: torch.dtype, shared_memory: int, *, gradients: bool = False, hopper: bool = False
) -> tuple[Launch, ...]:
    """Return the launches worth trying where a program may use so many bytes, best first; the last one always fits.

    On Hopper tiles of 64 tokens take WGMMA, of which others have seen wrong gradients with 8 warps, and with 4 they
    spill: ``gradients`` do without. Elsewhere they take fewer columns in such tiles, and in float32, or they would
    spill too.
    """
    wide = max(64, padded(max(D, E)))
    found = [launch for least, launch in _TABLE[dtype, wide] if least * 1024 <= shared_memory]
    if gradients and hopper:
        found = [x for x in found if x.BT <= 32]
    if gradients and dtype == torch.float32:
        found = [x._replace(BC=min(x.BC, 32)) for x in found]
    elif gradients:
        found = [x._replace(BC=min(x.BC, 64), BU=min(x.BU, 32)) if x.BT > 32 else x for x in found]
    return tuple(found)
