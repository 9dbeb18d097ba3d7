"""Writes one shard: a tar by webdataset, with its index and keys next to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jitscale.data import images, tar_index
from jitscale.data.background import WHITE, Background
from jitscale.data.images import ImageError
from jitscale.data.manifest import BadInput, ShardRecord
from jitscale.data.tar_index import NO_LABEL
from jitscale.errors import DataError
from jitscale.files import atomic_write, sha256_of
from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import Source

ORIGINAL = "original"  # a codec of `pack_shard`: the files as they are

Sample = dict[str, "str | bytes"]  # for webdataset: __key__, the image under its extension, and maybe cls


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written, from images in any files. It is small enough to be sent to another process."""

    path: Path  # path of the shard
    root: str  # relative paths of sources start here
    sources: dict[int, Source]  # key: number, which becomes the key of the sample
    codec: str  # one of CODECS, or ORIGINAL
    resolution: int  # pixels per side; with ORIGINAL, only smaller images are counted
    most_bad: int  # most inputs that may be bad
    background: Background = WHITE  # background of transparent images
    channels: int = images.RGB  # channels of the images that are stored
    image_column: str | None = None  # for inputs with several columns of images


@dataclass(frozen=True)
class PackedShard:
    """The result of a `ShardTask`."""

    record: ShardRecord
    enlarged: int  # images whose short side was smaller than the resolution
    transparent: int  # images with transparent pixels
    bad: list[BadInput]  # inputs that were left out


class TooManyBadError(Exception):
    """A shard was abandoned, because more of its inputs are bad than its task allows."""

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
    """Write one shard with its index and keys. It may have no samples. Equal samples give equal bytes."""
    from webdataset import TarWriter  # noqa: PLC0415  # it imports torch, which only processes that write shards need

    with atomic_write(path) as file, TarWriter(file, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    found = tar_index.scan_tar(path)
    index = tar_index.index_of(found, [int(sample.label or NO_LABEL) for sample in found])
    tar_index.save_array(tar_index.keys_path(path), tar_index.key_hashes(found))
    tar_index.save_array(tar_index.index_path(path), index)
    return ShardRecord(path.name, len(found), path.stat().st_size, sha256_of(path))


def pack_shard(task: ShardTask) -> PackedShard:
    """Read, check, crop and store the images of one shard. Images that cannot be used are left out and listed.

    Raises a TooManyBadError if more than `task.most_bad` images cannot be used, an OSError if the shard cannot be
    written, a StorageError if the storage of an image fails, and a DataError if this process is the reason, for example
    if it has too little memory.
    """
    bad: list[BadInput] = []
    enlarged = transparent = 0

    def samples() -> Iterator[Sample]:
        nonlocal enlarged, transparent
        reader = SourceReader(task.root, task.image_column)
        for number, source in task.sources.items():
            try:
                data, extension = reader.read(source)
                image, see_through = images.decode_file(
                    data, extension, background=task.background, channels=task.channels
                )
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
                raise DataError(f"{source.place}: needs more memory than there is; {remedy}") from error
            enlarged += min(image.shape[:2]) < task.resolution
            transparent += see_through
            sample: Sample = {"__key__": f"{number:09d}", extension: data}
            if source.label != NO_LABEL:
                sample["cls"] = str(source.label)
            yield sample

    return PackedShard(write_shard(task.path, samples()), enlarged, transparent, bad)
