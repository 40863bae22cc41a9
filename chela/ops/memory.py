"""Memory for the CPU backends: fresh memory costs a page fault per 4 KiB, often more than the arithmetic on it.

glibc returns large memory to the kernel as soon as it is freed. So scratch is kept from call to call (``Workspace``),
and large results lie in huge pages (``in_huge_pages``).
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
"""Results of this size or more go into huge pages; glibc has memory at hand for smaller ones."""


class Workspace:
    """Named buffers of one call, valid inside its ``with`` block; the memory then serves the thread's next call.

    Args:
        dtype: Of all buffers.
        device: Of all buffers; away from the CPU nothing is kept here, since the allocator there keeps memory itself.

    >>> with Workspace(torch.float32, torch.device("cpu")) as buffer:
    ...     buffer("x", 3, 4).shape
    torch.Size([3, 4])
    """

    _thread = threading.local()

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._named: dict[str, Tensor] = {}

    def __enter__(self) -> Workspace:
        if self.device.type == "cpu":  # taken out: a workspace inside this one gets its own memory
            self._named, self._thread.named = getattr(self._thread, "named", {}), {}
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            left, self._thread.named = KEPT_BYTES, {}
            for name, block in sorted(self._named.items(), key=lambda item: len(item[1])):
                left -= len(block)
                if left >= 0:
                    self._thread.named[name] = block

    @classmethod
    def release(cls) -> None:
        """Give back what this thread has kept."""
        cls._thread.named = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of that name, seen as ``shape``; asking for it again overwrites what it held."""
        size = math.prod(shape) * self.dtype.itemsize
        block = self._named.get(name)
        if block is None or len(block) < size:
            with torch.inference_mode(False):  # a tensor made in it could not be written to outside
                block = self._named[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return block[:size].view(self.dtype).view(shape)


def in_huge_pages(*fresh: Tensor) -> None:
    """Ask Linux for pages of 2 MiB behind large tensors that were not written to yet; elsewhere do nothing."""
    for x in fresh:
        size = x.numel() * x.element_size()
        if size >= HUGE_BYTES and x.device.type == "cpu" and sys.platform == "linux":
            start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (x.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
            # Only advice: should it fail, the pages are small ones.
            _library(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
