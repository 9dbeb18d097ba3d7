"""Fetching shards ahead of need, in threads."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jitscale.addresses import masked

logger = logging.getLogger(__name__)

_REPEAT_AFTER = 30.0  # seconds; sooner than this a prefetcher does not fetch a shard again


class Prefetcher:
    """Daemon threads that fetch shards ahead of need: a running download does not hold up the end of the process.

    `fetch` makes sure that a shard is there. It is called in several `threads` at once, and its errors are logged: the
    reader of that shard meets them too. A prefetcher must be made in the process that uses it.
    """

    def __init__(self, fetch: Callable[[int], None], threads: int = 4) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._running: set[int] = set()
        self._ended: dict[int, float] = {}  # shard to when it was fetched, or failed
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        """Replace the waiting shards by `shards`, in the order of need. Running downloads go on."""
        with self._changed:
            now = time.monotonic()
            self._ended = {shard: at for shard, at in self._ended.items() if now - at < _REPEAT_AFTER}
            known = self._running | self._ended.keys()
            self._waiting = deque(shard for shard in dict.fromkeys(shards) if shard not in known and not self._closed)
            self._changed.notify_all()

    def close(self) -> None:
        """Start nothing more. Does not wait for running downloads, which other processes may be waiting for."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                shard = self._waiting.popleft()
                self._running.add(shard)
            try:
                self._fetch(shard)
            except Exception as error:
                logger.warning("shard %d: could not be fetched ahead of need: %s", shard, masked(str(error)))
            finally:
                with self._changed:
                    self._running.discard(shard)
                    self._ended[shard] = time.monotonic()
