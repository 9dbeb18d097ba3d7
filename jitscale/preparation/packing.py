"""Writing one shard: a tar by webdataset, with its index and keys beside it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from jitscale.data import images, tar_index
from jitscale.data.images import ImageError
from jitscale.data.manifest import BadInput, ShardRecord
from jitscale.data.tar_index import NO_LABEL, OffsetReader
from jitscale.errors import DataError, StorageError, is_wrong_path
from jitscale.files import atomic_write, sha256_of
from jitscale.preparation.sources import WHOLE_FILE, Source

ORIGINAL = "original"  # a codec of `pack_shard`: the files as they came

_MOST_BYTES = 1 << 30  # of one image's file; larger files are not images, and are never loaded
_MOST_OPEN_FILES = 256  # of a process; 1024 is a usual limit
# The process is at fault, not the file: going on would drop good images.
_OUR_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Sample = dict[str, "str | bytes"]  # as webdataset writes it: __key__, the image under its extension, and maybe cls


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written from images that lie anywhere. Small enough to be sent to another process."""

    path: Path  # of the shard
    root: str  # relative paths of sources start here
    sources: dict[int, Source]  # by number, which becomes the key
    codec: str  # one of CODECS, or ORIGINAL
    resolution: int  # pixels a side; with ORIGINAL, only smaller images are counted
    most_bad: int  # inputs that may be bad


@dataclass(frozen=True)
class PackedShard:
    """The result of a `ShardTask`."""

    record: ShardRecord
    enlarged: int  # images whose short side was smaller than the resolution
    bad: list[BadInput]  # left out


class TooManyBadError(Exception):
    """A shard was given up, because more of its inputs are bad than its task allows."""

    def __init__(self, bad: list[BadInput]) -> None:
        super().__init__(bad)
        self.bad = bad


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:06d}.tar"


def shard_number(name: str) -> int:
    """The number of the shard that `shard_name` gave this name."""
    return int(Path(name).stem.removeprefix("shard-"))


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardRecord:
    """Write one shard, maybe without samples, with its index and keys; equal samples give equal bytes."""
    from webdataset import TarWriter  # noqa: PLC0415  # imports torch, which only processes that write shards need

    with atomic_write(path) as file, TarWriter(file, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    found = tar_index.scan_tar(path)
    index = tar_index.index_of(found, [int(sample.label or NO_LABEL) for sample in found])
    tar_index.save_array(tar_index.keys_path(path), tar_index.key_hashes(found))
    tar_index.save_array(tar_index.index_path(path), index)
    return ShardRecord(path.name, len(found), path.stat().st_size, sha256_of(path))


def pack_shard(task: ShardTask) -> PackedShard:
    """Read, check, crop and store the images of one shard; those that cannot be used are left out and listed.

    Raises a TooManyBadError if more than `task.most_bad` cannot be used, an OSError if the shard cannot be written, a
    StorageError if the storage of an image fails, and a DataError if images cannot be read for a reason that lies in
    this process, such as too little memory.
    """
    bad: list[BadInput] = []
    enlarged = 0

    def samples() -> Iterator[Sample]:
        nonlocal enlarged
        open_file = lru_cache(_MOST_OPEN_FILES)(partial(_open, task.root))
        for number, source in task.sources.items():
            try:
                data = _read(source, open_file)
                image = images.decode(data, source.extension)
                if task.codec == ORIGINAL:
                    extension = images.content_extension(data)
                else:
                    extension, data = images.encode(images.center_crop(image, task.resolution), task.codec)
            except ImageError as error:
                bad.append(BadInput(source.place, str(error)))
                if len(bad) > task.most_bad:
                    raise TooManyBadError(bad) from error
                continue
            except MemoryError as error:
                remedy = "give the same command with fewer --workers"
                raise DataError(f"{source.place}: takes more memory than there is; {remedy}") from error
            enlarged += min(image.shape[:2]) < task.resolution
            sample: Sample = {"__key__": f"{number:09d}", extension: data}
            if source.label != NO_LABEL:
                sample["cls"] = str(source.label)
            yield sample

    return PackedShard(write_shard(task.path, samples()), enlarged, bad)


def _read(source: Source, open_file: Callable[[str], OffsetReader]) -> bytes:
    """The bytes of one image. An `ImageError` is its fault, a StorageError the disk's, a DataError this process's."""
    try:
        file = open_file(source.path)
        size = file.status().st_size if source.size == WHOLE_FILE else source.size
        if size > _MOST_BYTES:
            raise ImageError(f"has {size} bytes; the limit is {_MOST_BYTES}")
        return file.read(source.offset, size)
    except tar_index.ShortReadError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        if error.errno in _OUR_FAULT:
            remedy = "raise the limits of the process, or use fewer workers"
            raise DataError(f"{source.place}: {what}; {remedy}") from error
        if not is_wrong_path(error):  # good images must not be left out because a file server was away
            remedy = "give the same command when the storage works; a file that is removed is listed as a bad image"
            raise StorageError.of(error, f"{source.place}: {what}; {remedy}") from error
        raise ImageError(what) from error


def _open(root: str, path: str) -> OffsetReader:
    if "\0" in path:
        raise ImageError("has a name that no file can have")
    file = OffsetReader(os.path.join(root, path))
    if not stat.S_ISREG(file.status().st_mode):
        raise ImageError("is no regular file")
    return file
