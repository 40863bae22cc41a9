"""Work ahead of a reader: results in order, while threads compute the next ones."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(calls: Iterable[Callable[[], T]], workers: int = 0) -> Iterator[T]:
    """Yield the results of ``calls``, which may be endless, in order, computed ahead by threads (0: one per core).

    At most 2 · ``workers`` results wait for the reader. What a call raises comes in its place; when the reader stops,
    the calls that have not begun are dropped.

    >>> list(prefetch([lambda: 1, lambda: 2], workers=1))
    [1, 2]
    """
    workers = workers or os.cpu_count() or 1
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
