"""The order of samples: one global position that counts over all epochs, for any number of ranks.

Position p is sample q = p mod N of epoch p // N. In each epoch the shards are permuted and laid end to end; the line is
cut into contiguous streams whose lengths differ by one at most; each stream is shuffled in windows; q is taken from
stream q mod C at depth q // C. The first N mod C streams are the longer ones, so every q has a place. Nothing is
dropped or padded, batches straddle epochs, and finding any position costs the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from jitscale.keyed_random import Int64Array, Purpose, permutation


class EpochOrder:
    """Where the sample of each global position lies. A function of the data and the seed, never of the ranks.

    Attributes:
        streams: C, the number asked for, or fewer where the data are too few to fill a window in each.
    """

    def __init__(self, samples_per_shard: Int64Array, seed: int, streams: int, window: int) -> None:
        self._samples = np.asarray(samples_per_shard, np.int64)
        self._seed = seed
        self._window = window
        self._total = int(self._samples.sum())
        self.streams = max(1, min(streams, self._total // window))
        # A batch touches every stream: keep the windows of two epochs, for batches that straddle them.
        self._window_order = lru_cache(maxsize=2 * self.streams)(self._compute_window_order)
        self._shard_line = lru_cache(maxsize=2)(self._compute_shard_line)

    def __reduce__(self) -> tuple[type[EpochOrder], tuple[Int64Array, int, int, int]]:
        return EpochOrder, (self._samples, self._seed, self.streams, self._window)

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Shard numbers and sample numbers within them, (B,) each, of global `positions` (B,)."""
        shards = np.empty(len(positions), np.int64)
        samples = np.empty(len(positions), np.int64)
        epochs = positions // self._total
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            line = self._places_in_line(int(epoch), positions[chosen] % self._total)
            order, ends = self._shard_line(int(epoch))
            slot = np.searchsorted(ends, line, side="right")
            shards[chosen] = order[slot]
            samples[chosen] = line - (ends[slot] - self._samples[order[slot]])
        return shards, samples

    def _places_in_line(self, epoch: int, q: Int64Array) -> Int64Array:
        """Places in the line of shards laid end to end, for places `q` in the epoch."""
        base, longer = divmod(self._total, self.streams)
        stream, depth = q % self.streams, q // self.streams
        start = stream * base + np.minimum(stream, longer)
        length = base + (stream < longer)
        window = depth // self._window
        first = window * self._window
        width = np.minimum(self._window, length - first)
        shuffled = np.empty_like(q)
        for i in range(len(q)):
            order = self._window_order(epoch, int(stream[i]), int(window[i]), int(width[i]))
            shuffled[i] = order[depth[i] - first[i]]
        return start + first + shuffled

    def _compute_shard_line(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards' order in an epoch, and where each ends in the line."""
        order = permutation(len(self._samples), self._seed, Purpose.SHARD_ORDER, epoch)
        return order, np.cumsum(self._samples[order])

    def _compute_window_order(self, epoch: int, stream: int, window: int, width: int) -> Int64Array:
        return permutation(width, self._seed, Purpose.WINDOW_ORDER, epoch, stream, window)
