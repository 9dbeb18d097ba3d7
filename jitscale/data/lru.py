"""A bounded memory of computed values; a plain dictionary, so that its owner can be pickled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def remembered(cache: OrderedDict[K, V], key: K, compute: Callable[[], V], capacity: int) -> V:
    """`compute()`, from `cache` if it is among the `capacity` most recently used keys."""
    if key not in cache:
        while len(cache) >= capacity:
            cache.popitem(last=False)
        cache[key] = compute()
    cache.move_to_end(key)
    return cache[key]
