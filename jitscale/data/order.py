"""The order of samples: one global position counts over all epochs, for any number of readers.

Letters: N samples of an epoch, C streams, B positions in one request.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jitscale.data.lru import LRUCache
from jitscale.errors import DataError
from jitscale.keyed_random import Int64Array, Purpose, hash64, permutation


class EpochOrder:
    """The sample at position p of the endless global sequence, computed by arithmetic without iteration or state.

    Position p is place q = p mod N of epoch p // N, and each epoch is a permutation of the N samples:

    1. The shards are permuted and laid end to end.
    2. The line is cut into C contiguous streams whose lengths differ by at most one, the longer ones first.
    3. Each stream is shuffled inside windows of `window` samples (its last one may be shorter).
    4. Place q is depth q // C of stream q mod C. The last round of an epoch, if not whole, has the longer streams only.

    So C shards are read in parallel, each nearly in sequence. If W divides C, a rank that takes every W-th position
    reads only C / W streams. C is `streams`, halved until C is at most the number of shards and an average stream
    fills a window: few long streams mix better than many streams that are shorter than a batch. C depends, as the whole
    order does, on the data, `seed`, `streams` and `window` only. Ranks, workers and batch size do not change it.

    `origin` is the position at which epoch 0 begins: 0, or the position at which the run changed its data.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | Int64Array,
        seed: int,
        streams: int = 512,
        window: int = 512,
        origin: int = 0,
    ) -> None:
        self._samples: Int64Array = np.asarray(samples_per_shard, np.int64)
        self.num_samples = int(self._samples.sum())
        if self.num_samples < 1 or streams < 1 or window < 1:
            raise DataError(
                f"order: {self.num_samples} samples, {streams} streams, window {window}; each must be at least 1"
            )
        while streams > 1 and (streams > len(self._samples) or self.num_samples < streams * window):
            streams //= 2
        self.seed, self.streams, self.window, self.origin = seed, streams, window, origin
        self._lines: LRUCache[int, tuple[Int64Array, Int64Array]] = LRUCache()
        self._windows: LRUCache[tuple[int, int], npt.NDArray[np.int32]] = LRUCache()

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The shard numbers and the indices inside the shards of `positions` (B,), both (B,)."""
        epochs, places = np.divmod(positions - self.origin, self.num_samples)
        depths, streams = np.divmod(places, self.streams)
        windows, slots = np.divmod(depths, self.window)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch, window in np.unique(np.stack([epochs, windows]), axis=1).T.tolist():
            here = (epochs == epoch) & (windows == window)
            shuffled = self._window_order(epoch, window)[streams[here], slots[here]]
            along = self._stream_starts(streams[here]) + window * self.window + shuffled
            shard_order, starts = self._line(epoch)
            turn = np.searchsorted(starts, along, side="right") - 1
            shards[here], indices[here] = shard_order[turn], along - starts[turn]
        return shards, indices

    def _line(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards of an epoch in order, and the start of each on the line."""

        def lay() -> tuple[Int64Array, Int64Array]:
            order = permutation(len(self._samples), self.seed, Purpose.SHARD_ORDER, epoch)
            lengths = self._samples[order]
            return order, np.cumsum(lengths) - lengths

        return self._lines.get_or_compute(epoch, lay, 2)

    def _stream_starts(self, streams: Int64Array) -> Int64Array:
        shortest, longer = divmod(self.num_samples, self.streams)
        return streams * shortest + np.minimum(streams, longer)

    def _window_order(self, epoch: int, window: int) -> npt.NDArray[np.int32]:
        """The order inside one window of every stream: (C, samples of the longest stream's window)."""

        def shuffle() -> npt.NDArray[np.int32]:
            streams = np.arange(self.streams)
            lengths = np.diff(self._stream_starts(np.arange(self.streams + 1))) - window * self.window
            slots = np.arange(min(self.window, int(lengths.max())))
            draws = hash64(self.seed, Purpose.WINDOW_ORDER, epoch, streams[:, None], window, slots)
            draws[slots >= lengths[:, None]] = np.iinfo(np.uint64).max  # sorts last; a shorter stream never reads it
            return np.argsort(draws, axis=1, kind="stable").astype(np.int32)

        return self._windows.get_or_compute((epoch, window), shuffle, 3)
