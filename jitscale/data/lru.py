"""A cache of the most recently used values."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(OrderedDict[K, V]):
    """Values by key. Unlike `functools.lru_cache` it can be pickled with its owner, and its capacity may change."""

    def get_or_compute(self, key: K, compute: Callable[[], V], capacity: int) -> V:
        """The stored value of `key`, or else `compute()`, which is stored. Only the last `capacity` keys are kept."""
        if key not in self:
            while len(self) >= capacity:
                self.popitem(last=False)
            self[key] = compute()
        self.move_to_end(key)
        return self[key]
