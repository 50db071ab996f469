"""Shards on their way to local copies before their rows are read, in the order of the epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from cache.epoch_order import Window
from cache.row_sources import RowSource
from cache.shards import max_shard_bytes

FETCHES = 16  # shards on their way at once


@contextmanager
def fetchers() -> Iterator[ThreadPoolExecutor]:
    """The threads that fetch; at the end, what nobody waits for any more is not fetched."""
    pool = ThreadPoolExecutor(FETCHES, "cache-fetch")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def fetched_ahead(
    windows: Iterator[Window],
    sources: Collection[RowSource],
    limit: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Window]:
    """The windows, the shards of those that come next being fetched already.

    limit: bytes of the local copies. Never so many are asked for that one has to go unread.
    """
    ahead: deque[tuple[Window, int, list[Future[None]]]] = deque()
    in_use: deque[int] = deque([0, 0], maxlen=2)  # the window that is read, and the next
    largest, ended = 0, False
    while True:
        while not ended:
            taken = sum(in_use) + sum(size for _, size, _ in ahead)
            # No window is too large to be fetched, but none makes another go again unread.
            if ahead and (len(ahead) >= FETCHES or taken + largest > limit):
                break
            if (window := next(windows, None)) is None:
                ended = True
                break
            size, fetches = 0, []
            for source in sources:
                for shard in source.shards(window):
                    # Numbered here, in the order of need: threads may begin in another.
                    fetch, asked = source.store.fetch_shard, time.time_ns()
                    fetches.append(pool.submit(fetch, source.name, shard, asked))
                    size += max_shard_bytes(source.store.spec, source.name)
            ahead.append((window, size, fetches))
            largest = max(largest, size)
        if not ahead:
            return
        window, size, fetches = ahead.popleft()
        wait(fetches)  # one that failed is tried again, and told of, when its rows are read
        in_use.append(size)
        yield window
