"""Shards whose samples state their own number. Some of the samples are held out."""

from pathlib import Path

import numpy as np
import torch

from jitscale.config import Config, DataConfig
from jitscale.data.images import encode
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.data.shards import ShardSet
from jitscale.parallel import World
from jitscale.preparation.packing import shard_name, write_shard

COUNT = 120
CPU = World(0, 1, 0, torch.device("cpu"))


def write(folder: Path, numbers: list[int], per_shard: int, codec: str = "raw", size: int = 4) -> Path:
    """Write shards whose samples have their number as key, label and pixels. The last column is brighter by one."""
    folder.mkdir()
    records = []
    for shard, first in enumerate(range(0, len(numbers), per_shard)):
        samples = []
        for number in numbers[first : first + per_shard]:
            pixels = np.full((size, size, 3), number, np.uint8)
            pixels[:, -1] += 1
            extension, data = encode(pixels, codec)
            samples.append({"__key__": f"photo{number:05d}", extension: data, "cls": str(number).encode()})
        records.append(write_shard(folder / shard_name(shard), samples))
    Manifest(codec, size, COUNT, None, len(numbers), records).write(folder / MANIFEST)
    return folder


def config_of(shards: Path | str, held_out: str | None = None, size: int = 4) -> Config:
    config = Config(data=DataConfig(shards=str(shards), held_out=held_out))
    config.model.image_size, config.model.patch_size, config.model.num_classes = size, 2, COUNT
    return config


def members(shards: ShardSet) -> list[int]:
    """The numbers of a set's samples in the set's order. Pixels and label must agree."""
    found = []
    for sample in range(shards.num_samples):
        image, label = shards.read(*shards.shard_and_index(sample))
        assert bool((image[:, :-1] == label).all())
        found.append(label)
    return found


def held(shards: ShardSet) -> set[int]:
    assert shards.held_out is not None
    return set(members(shards.held_out))


def damage(tar: Path, sample: int) -> None:
    entry = np.load(tar.with_suffix(".index.npy"))[sample]
    with tar.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(bytes(int(entry["size"])))
