"""Each sample of some shards read once, in tar order, by webdataset's reader in worker processes.

Training reads by position instead (`loader`), and packing by offset, since their order is another. So does --verify,
which goes on behind damage, names bytes, and must not wait for torch, which webdataset imports.

Shapes: B images of a block, S pixels a side, A channels.
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

FEWEST_FOR_WORKERS = 1024  # images; fewer are decoded by the time that workers have started
_DAMAGE = (OSError, tarfile.TarError)


def read_once(shards: ShardSet, samples: range, block: int, num_workers: int) -> Generator[UInt8Array, None, None]:
    """The images of one or more `samples`, in order, as blocks uint8 (B, S, S, A); all but the last have `block`.

    Samples are counted over all `shards` in turn; these have all samples of their tars. `num_workers` processes decode
    them if there are many. Raises a DataError if an image cannot be decoded, a tar does not hold what its index says,
    or a worker died.
    """
    blocks = [samples[first : first + block] for first in range(0, len(samples), block)]
    pipeline = webdataset.DataPipeline(partial(_own_blocks, blocks), webdataset.map(partial(_read_block, shards)))
    return start_workers(pipeline, num_workers if len(samples) >= FEWEST_FOR_WORKERS else 0)


def _own_blocks(blocks: list[range]) -> list[range]:
    """Workers take blocks by turns, and PyTorch collects them by turns, so that the order stays.

    webdataset's `split_by_worker` would believe environment variables of other programs, such as WORKER.
    """
    worker = get_worker_info()
    return blocks if worker is None else blocks[worker.id :: worker.num_workers]


def _read_block(shards: ShardSet, samples: range) -> UInt8Array | DataError:
    """(B, S, S, A), as an array: that goes through a pipe, where a tensor would need shared memory."""
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
    """The images of some neighbours in one tar. Raises a DataError if one cannot be read or decoded."""
    what = f"{shards.place(shard, rows.start)} cannot be read, or one behind it"
    with data_error(what, "copy the shard again", _DAMAGE):
        if shards.has_links(shard, rows):
            return [shards.read(shard, row)[0] for row in rows]
        with shards.open_tar(shard, rows.start) as tar:
            images = tar_file_iterator(tar, skip_meta=None, select_files=is_image)
            files = [member["data"] for member in islice(images, len(rows))]
    if len(files) < len(rows):  # webdataset ends silently at a damaged header
        what = "is not where the index says, since a header is damaged; copy the shard again"
        raise DataError(f"{shards.place(shard, rows[len(files)])} {what}")
    return [shards.decode(shard, row, data) for row, data in zip(rows, files, strict=True)]
