"""Tiles of the Triton kernels: a table by dtype, width and shared memory of the device, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def padded(width: int) -> int:
    """Return the power of two, at least 16, that a tile of this width is padded to."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Launch:
    """How the kernels are cut.

    Attributes:
        BT: Tokens per tile.
        BC: Columns of the output per program.
        BS: Rows and columns of a state per program.
        NB: Tiles per chunk: more of them write fewer states and multiply more inside chunks.
        warps: Warps per program.
        stages: Stages of the software pipeline.
    """

    BT: int
    BC: int
    BS: int
    NB: int
    warps: int
    stages: int


# (bytes of an element, widest tile) → launches, best first; the later ones are for devices with less shared memory.
_TABLE = {
    (2, 64): (Launch(64, 64, 64, 4, 4, 2), Launch(32, 32, 32, 8, 4, 1), Launch(16, 16, 16, 16, 4, 1)),
    (2, 128): (Launch(64, 64, 64, 4, 4, 2), Launch(32, 32, 32, 8, 4, 1), Launch(16, 16, 16, 16, 4, 1)),
    (2, 256): (Launch(64, 64, 64, 4, 8, 1), Launch(32, 32, 32, 8, 4, 1), Launch(16, 16, 16, 16, 4, 1)),
    (4, 64): (Launch(32, 32, 32, 4, 4, 1), Launch(16, 16, 16, 8, 4, 1)),
    (4, 128): (Launch(32, 32, 32, 4, 4, 1), Launch(16, 16, 16, 8, 4, 1)),
    (4, 256): (Launch(32, 32, 32, 4, 8, 1), Launch(16, 16, 16, 8, 4, 1)),
}


def launches(D: int, E: int, dtype: torch.dtype, shared_memory: int) -> tuple[Launch, ...]:
    """Return the launches worth trying, best first; the last one always fits.

    Args:
        D: Width of queries and keys.
        E: Width of values.
        dtype: Of the inputs.
        shared_memory: Bytes a program may use on the device.
    """
    wide = max(64, padded(max(D, E)))
    table = _TABLE[dtype.itemsize, wide]
    fit = [x for x in table if shared_bytes(x, wide, dtype) <= shared_memory]
    return tuple(fit) or table[-1:]


def shared_bytes(launch: Launch, wide: int, dtype: torch.dtype) -> int:
    """Return about how much shared memory the largest kernel takes: two token tiles, a state tile, one of weights."""
    return dtype.itemsize * (2 * launch.BT * wide + wide * launch.BC + launch.BT * launch.BT) * launch.stages
