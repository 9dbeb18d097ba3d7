"""Fetches shards before they are needed, in threads."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jitscale.addresses import masked

logger = logging.getLogger(__name__)

_REPEAT_AFTER = 30.0  # seconds before a prefetcher may fetch the same shard again


class Prefetcher:
    """Threads that fetch shards before they are needed. They are daemons, so a download does not delay the exit.

    `fetch` fetches a shard unless it is here. Several `threads` call it at once. Its errors are only logged, because
    the reader of that shard raises them too. A prefetcher must be created in the process that uses it.
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
        """Replace the waiting shards by `shards`, in the order of need. Running downloads continue."""
        with self._changed:
            now = time.monotonic()
            self._ended = {shard: at for shard, at in self._ended.items() if now - at < _REPEAT_AFTER}
            known = self._running | self._ended.keys()
            self._waiting = deque(shard for shard in dict.fromkeys(shards) if shard not in known and not self._closed)
            self._changed.notify_all()

    def close(self) -> None:
        """Start no more downloads. Running ones continue, because other processes may wait for them."""
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
                logger.warning("shard %d: could not be fetched in advance: %s", shard, masked(str(error)))
            finally:
                with self._changed:
                    self._running.discard(shard)
                    self._ended[shard] = time.monotonic()
