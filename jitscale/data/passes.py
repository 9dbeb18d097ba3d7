"""Reads each sample of some shards once, in tar order, with webdataset's reader in worker processes.

Training reads by position (`loader`) and packing by offset, because they need other orders. --verify reads by offset
too: it must continue after damage, name bytes, and not wait for the import of torch, which webdataset needs.

Shapes: B images of a block, S pixels per side, A channels.
"""

import tarfile
from collections.abc import Generator
from functools import partial
from itertools import islice

import numpy as np
import webdataset
from torch.utils.data import get_worker_info
from webdataset.tariterators import tar_file_iterator

from jitscale.data.images import UInt8Array
from jitscale.data.shards import ShardSet
from jitscale.data.tar_members import is_image
from jitscale.data.workers import start_workers
from jitscale.errors import DataError, data_error

FEWEST_FOR_WORKERS = 1024  # images; fewer are decoded before workers have started
_DAMAGE = (OSError, tarfile.TarError)


def read_once(shards: ShardSet, samples: range, block: int, num_workers: int) -> Generator[UInt8Array, None, None]:
    """The images of `samples` (at least one), in order, as blocks uint8 (B, S, S, A). All but the last have `block`.

    `samples` count over all `shards` in turn, and `shards` must be whole tars. If there are many samples, `num_workers`
    processes decode them. Raises a DataError if an image cannot be decoded, a tar differs from its index, or a worker
    has died.
    """
    blocks = [samples[first : first + block] for first in range(0, len(samples), block)]
    pipeline = webdataset.DataPipeline(partial(_own_blocks, blocks), webdataset.map(partial(_read_block, shards)))
    return start_workers(pipeline, num_workers if len(samples) >= FEWEST_FOR_WORKERS else 0)


def _own_blocks(blocks: list[range]) -> list[range]:
    """This worker's blocks. Workers take blocks in turns and PyTorch collects them in turns, so the order is kept.

    webdataset's `split_by_worker` is not used: it reads environment variables such as WORKER, which other programs set.
    """
    worker = get_worker_info()
    return blocks if worker is None else blocks[worker.id :: worker.num_workers]


def _read_block(shards: ShardSet, samples: range) -> UInt8Array | DataError:
    """The images (B, S, S, A). They are an array, which goes through a pipe; a tensor would need shared memory."""
    images: list[UInt8Array] = []
    try:
        while samples:
            shard, first = shards.shard_and_index(samples[0])
            rows = range(first, min(first + len(samples), int(shards.samples_per_shard[shard])))
            images += _images(shards, shard, rows)
            samples = samples[len(rows) :]
    except DataError as error:
        return error
    return np.stack(images)


def _images(shards: ShardSet, shard: int, rows: range) -> list[UInt8Array]:
    """The images of consecutive samples of one tar. Raises a DataError if one cannot be read or decoded."""
    what = f"{shards.place(shard, rows.start)} or a later one cannot be read"
    with data_error(what, "copy the shard again", _DAMAGE):
        if shards.has_links(shard, rows):
            return [shards.read(shard, row)[0] for row in rows]
        with shards.open_tar(shard, rows.start) as tar:
            images = tar_file_iterator(tar, skip_meta=None, select_files=is_image)
            files = [member["data"] for member in islice(images, len(rows))]
    if len(files) < len(rows):  # webdataset stops silently at a damaged header
        what = "is not at its place in the index, because a header is damaged; copy the shard again"
        raise DataError(f"{shards.place(shard, rows[len(files)])} {what}")
    return [shards.decode(shard, row, data) for row, data in zip(rows, files, strict=True)]
