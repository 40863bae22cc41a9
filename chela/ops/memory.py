"""Memory for the CPU backends: fresh memory costs a page fault per 4 KiB, often more than the arithmetic on it.

glibc hands whatever is large back to the kernel as soon as it is freed. Hence scratch is kept from call to call
(``Workspace``), and large results are asked for in huge pages (``in_huge_pages``).
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
import threading

import torch
from torch import Tensor

_library = functools.cache(ctypes.CDLL)
KEPT_BYTES = 1 << 24
"""At most this much scratch is kept by a thread."""
HUGE_BYTES = 1 << 23
"""Results of this size on go into huge pages; smaller ones come from memory that glibc has at hand."""


class Workspace:
    """Named buffers of one call, valid inside its ``with`` block; the memory then serves the thread's next call.

    They are cut from blocks that hold many of them. If the first block is not enough, the next are a quarter as large.

    Args:
        dtype: Of all buffers.
        device: Of all buffers; away from the CPU nothing is kept here, since the allocator there keeps memory itself.
        buffers_per_block: How many buffers of the size first asked for a new block holds.

    >>> with Workspace(torch.float32, torch.device("cpu"), 2) as buffer:
    ...     buffer("x", 3, 4).shape
    torch.Size([3, 4])
    """

    _thread = threading.local()

    def __init__(self, dtype: torch.dtype, device: torch.device, buffers_per_block: int) -> None:
        self.dtype, self.device = dtype, device
        self._per_block = buffers_per_block
        self._named: dict[str, Tensor] = {}
        self._blocks: list[Tensor] = []
        self._used = 0
        self._room = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Workspace:
        if self.device.type == "cpu":
            self._blocks = getattr(self._thread, "blocks", [])
            self._thread.blocks = []  # so that no other workspace takes them meanwhile
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            blocks, left = [*self._blocks, *self._thread.blocks], KEPT_BYTES  # and those of a workspace inside this one
            self._thread.blocks = []
            for block in sorted(blocks, key=len, reverse=True):
                if len(block) <= left:
                    self._thread.blocks.append(block)
                    left -= len(block)

    @classmethod
    def release(cls) -> None:
        """Give back what this thread has kept."""
        cls._thread.blocks = []

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of that name, seen as ``shape``; asking for it again overwrites what it held."""
        size = math.prod(shape)
        flat = self._named.get(name)
        if flat is None or flat.numel() < size:
            flat = self._named[name] = self._cut(size)
        return flat[:size].view(shape)

    def _cut(self, size: int) -> Tensor:
        needed = -(-size * self.dtype.itemsize // 64) * 64  # whole cache lines
        while len(self._room) < needed:
            if self._used == len(self._blocks):
                buffers = max(1, self._per_block // 4) if self._blocks else self._per_block
                with torch.inference_mode(False):  # a tensor made in it could not be written to outside
                    self._blocks.append(torch.empty(buffers * needed, dtype=torch.uint8, device=self.device))
            self._room = self._blocks[self._used]
            self._used += 1
        cut, self._room = self._room[:needed], self._room[needed:]
        return cut.view(self.dtype)


def in_huge_pages(*fresh: Tensor) -> None:
    """Ask Linux for pages of 2 MiB behind large tensors that were not written to yet; elsewhere do nothing."""
    for x in fresh:
        size = x.numel() * x.element_size()
        if size >= HUGE_BYTES and x.device.type == "cpu" and sys.platform == "linux":
            start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (x.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
            # Only advice: should it fail, the pages are small ones.
            _library(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
