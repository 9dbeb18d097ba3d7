"""Writing and opening shards, and the shards that are refused."""

import json
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset

from jitscale.config import load_config
from jitscale.data.manifest import Manifest
from jitscale.data.shards import ShardSet, open_training_shards
from jitscale.data.tar_index import NO_LABEL, index_tar
from jitscale.data.tar_labels import NOWHERE
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from tests.support.pictures import number_of, numbered, numbered_png, samples_of, write_tar

CLASSES = 10


def pack(folder: Path, count: int = 20, per_shard: int = 8, codec: str = "png") -> Manifest:
    labels = np.arange(count) % CLASSES
    return write_shards(numbered(count), labels, folder, codec=codec, samples_per_shard=per_shard)


# Writing


@pytest.mark.parametrize("codec", ["raw", "png", "webp"])
def test_written_samples_are_read_back(tmp_path: Path, codec: str) -> None:
    manifest = pack(tmp_path, codec=codec)
    shards = ShardSet.open(tmp_path, CLASSES, 8)
    assert [record.samples for record in manifest.shards] == shards.samples_per_shard.tolist() == [8, 8, 4]
    assert manifest.total == shards.num_samples == 20
    samples = samples_of(shards)
    assert sorted(samples) == [(number, number % CLASSES) for number in range(20)]
    assert samples != sorted(samples)  # The order is shuffled.


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    pack(tmp_path / "a")
    pack(tmp_path / "b")
    names = sorted(os.listdir(tmp_path / "a"))
    assert len(names) == 3 * 3 + 1
    assert names == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert Manifest.read(tmp_path / "a" / "manifest.json") == Manifest.read(tmp_path / "b" / "manifest.json")


def test_the_index_on_disk_equals_that_of_a_scan(tmp_path: Path) -> None:
    pack(tmp_path)
    for path in tmp_path.glob("*.tar"):
        np.testing.assert_array_equal(np.load(path.with_suffix(".index.npy")), index_tar(path))


def test_a_failed_write_leaves_no_shard_that_looks_complete(tmp_path: Path) -> None:
    images = list(numbered(20))
    images[7] = numbered(1, size=9)[0]
    with pytest.raises(DataError, match=r"image 7: has shape \(9, 9, 3\)"):
        write_shards(images, [0] * 20, tmp_path, samples_per_shard=20)
    assert os.listdir(tmp_path) == []


def test_writing_refuses_unsuitable_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 images and 1 labels"):
        write_shards(numbered(2), [0], tmp_path)
    with pytest.raises(DataError, match=r"image 1: label 2 is not in 0\.\.1"):
        write_shards(numbered(2), [0, 2], tmp_path, class_names=["a", "b"])
    with pytest.raises(DataError, match=r"codec 'gif'.*raw, png, webp"):
        write_shards(numbered(2), [0, 1], tmp_path, codec="gif")
    pack(tmp_path)
    with pytest.raises(DataError, match="holds shards already"):
        pack(tmp_path)


# Exchange with webdataset


@pytest.mark.parametrize(("codec", "extension"), [("png", "png"), ("raw", "npy"), ("webp", "webp")])
def test_webdataset_reads_our_shards(tmp_path: Path, codec: str, extension: str) -> None:
    pack(tmp_path, codec=codec)
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple(extension, "cls", "__key__")
    samples = [(number_of(image), label, int(key)) for image, label, key in theirs]
    assert [sample[:2] for sample in samples] == samples_of(ShardSet.open(tmp_path, CLASSES))
    assert all(number == key for number, _, key in samples)


def test_we_read_webdataset_shards(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "theirs-%04d.tar"), maxcount=6, verbose=0) as writer:
        for number, image in enumerate(numbered(16)):
            sample = {"png": image, "cls": number % CLASSES, "seg.png": image * 0, "json": {"a": 1}}
            writer.write({"__key__": f"folder.v2/n{number:04d}", **sample})
    shards = ShardSet.open(tmp_path, CLASSES)
    assert shards.samples_per_shard.tolist() == [6, 6, 4]
    assert samples_of(shards) == [(number, number % CLASSES) for number in range(16)]


def test_keys_with_dots_are_split_as_webdataset_does(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", ("x/a.b/k.JPEG", numbered_png()), ("x/a.b/k.cls", b"3\n"), (".hidden.png", numbered_png())
    )
    (theirs,) = webdataset.WebDataset(str(path), shardshuffle=False)
    assert theirs["__key__"] == "x/a.b/k"
    assert index_tar(path)[["label", "extension"]].tolist() == [(3, b"jpeg")]


# Opening


def test_different_patterns_can_name_the_same_shards(tmp_path: Path) -> None:
    manifest = pack(tmp_path)
    opened = [
        ShardSet.open(pattern, CLASSES)
        for pattern in (tmp_path, tmp_path / "*.tar", tmp_path / "shard-{000000..000002}.tar")
    ]
    assert [record.name for record in manifest.shards] == [f"shard-00000{number}.tar" for number in range(3)]
    assert len({shards.manifest_hash for shards in opened}) == 1
    assert all(shards.num_samples == 20 for shards in opened)
    assert ShardSet.open(tmp_path / "shard-000001.tar", CLASSES).manifest_hash != opened[0].manifest_hash


def test_the_hash_depends_on_the_content_of_the_shards(tmp_path: Path) -> None:
    """The names, counts and sizes are equal, but pixels or order differ."""
    hashes = set()
    for number, image in enumerate([numbered(6), numbered(6) + 1]):
        for seed in (0, 1):
            folder = tmp_path / f"{number}_{seed}"
            write_shards(image, [0] * 6, folder, codec="raw", seed=seed)
            hashes.add(ShardSet.open(folder, 1).manifest_hash)
    assert len(hashes) == 4


def test_without_classes_labels_are_neither_needed_nor_returned(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("a.png", numbered_png()), ("b.png", numbered_png()), ("b.cls", b"seven"))
    assert ShardSet.open(tmp_path, 0).read(0, 1)[1] == 0
    assert index_tar(tmp_path / "a.tar", NOWHERE)["label"].tolist() == [NO_LABEL, NO_LABEL]
    pack(tmp_path / "labelled")
    assert {label for _, label in samples_of(ShardSet.open(tmp_path / "labelled", 0))} == {0}


def test_larger_images_are_cropped_and_smaller_ones_refused(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        ("a.png", numbered_png(size=16, number=5)),
        ("a.cls", b"0"),
        ("b.png", numbered_png(size=4)),
        ("b.cls", b"0"),
    )
    shards = ShardSet.open(tmp_path, 1, 8)
    image, _ = shards.read(0, 0)
    assert image.shape == (8, 8, 3)
    assert number_of(image) == 5
    with pytest.raises(DataError, match=r"a\.tar: byte \d+: sample 1 is 4 x 4 pixels, smaller than the image size 8"):
        shards.read(0, 1)
    with pytest.raises(DataError, match=r"sample 0 is 16 x 16 pixels.*size 32.*lower model.image_size"):
        ShardSet.open(tmp_path, 1, 32)
    with pytest.raises(DataError, match=r"sample 0 is 16 x 16 pixels.*lower evaluation.reference_size"):
        ShardSet.open(tmp_path, 1, 32, size_setting="evaluation.reference_size")
    assert ShardSet.open(tmp_path, 1).image_size == 16


def test_shards_that_differ_from_the_manifest_are_refused(tmp_path: Path) -> None:
    manifest = pack(tmp_path)
    path, size = tmp_path / "shard-000001.tar", manifest.shards[1].bytes
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"shard-000001.tar: has {size - 512} bytes, the manifest says {size}; copy"):
        ShardSet.open(tmp_path, CLASSES)
    path.unlink()
    for pattern in (tmp_path, tmp_path / "shard-{000000..000002}.tar"):
        with pytest.raises(DataError, match=r"shard-000001.tar: missing \(1 of 3 shards are\)"):
            ShardSet.open(pattern, CLASSES)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"the manifest says 10 classes, the model has 3; set model.num_classes=10"):
        ShardSet.open(tmp_path, 3)


def test_a_wrong_index_is_refused_and_a_lost_one_is_rebuilt(tmp_path: Path) -> None:
    pack(tmp_path)
    before = samples_of(ShardSet.open(tmp_path, CLASSES))
    path = tmp_path / "shard-000001.index.npy"
    index = np.load(path)
    np.save(path, index[:-1])
    with pytest.raises(DataError, match="holds 7 samples, the manifest says 8"):
        ShardSet.open(tmp_path, CLASSES)
    index["offset"][3] = 1 << 40
    np.save(path, index)
    with pytest.raises(DataError, match=r"index.npy: points beyond the tar's \d+ bytes; remove it"):
        ShardSet.open(tmp_path, CLASSES)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"index.npy: cannot be mapped.*remove it"):
        ShardSet.open(tmp_path, CLASSES)
    path.unlink()
    assert samples_of(ShardSet.open(tmp_path, CLASSES)) == before


def test_invalid_patterns_and_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tar shards here; correct data"):
        ShardSet.open(tmp_path, CLASSES)
    pack(tmp_path)
    with pytest.raises(DataError, match="names a shard twice"):
        ShardSet.open(tmp_path / "shard-00000{0,0}.tar", CLASSES)
    with pytest.raises(DataError, match="unbalanced braces"):
        ShardSet.open(tmp_path / "shard-{000000..000002.tar", CLASSES)
    with pytest.raises(DataError, match=r"pipe: would run a command; give a folder"):
        ShardSet.open("pipe:cat /tmp/a.tar", CLASSES)
    with pytest.raises(DataError, match=r"hdfs: is an unknown kind of storage"):
        ShardSet.open("hdfs://host/a.tar", CLASSES)
    for name in ("a", "b"):
        write_shards(numbered(1), [0], tmp_path / name, class_names=[name])
    with pytest.raises(DataError, match="class 0 is 'a' here and 'b' in another of its folders"):
        ShardSet.open(tmp_path / "{a,b}" / "*.tar", CLASSES)
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"name": "a.tar"}]}))
    with pytest.raises(DataError, match=r"manifest.json: cannot be read as a manifest"):
        ShardSet.open(tmp_path, CLASSES)


# Processes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shards_are_read_in_other_processes(tmp_path: Path, method: str) -> None:
    pack(tmp_path)
    shards = ShardSet.open(tmp_path, CLASSES)
    here = [shards.read(shard, index) for shard, index in [(0, 0), (1, 3), (2, 1)]]
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap(shards.read, [(0, 0), (1, 3), (2, 1)])
    for (image, label), (other_image, other_label) in zip(here, there, strict=True):
        np.testing.assert_array_equal(image, other_image)
        assert label == other_label


def test_open_files_stay_below_the_limit_of_the_process(tmp_path: Path) -> None:
    pack(tmp_path, count=60, per_shard=1, codec="raw")

    # Files of other tests may be closed at the same time.
    def opened() -> int:
        return sum(file.path.startswith(str(tmp_path)) for file in psutil.Process().open_files())

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        shards = ShardSet.open(tmp_path, CLASSES)
        assert sorted(number for number, _ in samples_of(shards)) == list(range(60))
        assert 0 < opened() <= 32
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    del shards
    assert opened() == 0


def test_fewer_classes_than_the_model_are_refused_unless_on_purpose(tmp_path: Path) -> None:
    pack(tmp_path / "shards")
    (tmp_path / "own.yaml").write_text(
        f"data: {{shards: {tmp_path}/shards}}\nrun: {{max_steps: 1}}\n"
        "model: {image_size: 8, patch_size: 4, num_classes: 1000}\n"
    )
    remedy = f"the model has 1000; set model.num_classes={CLASSES}, or data.classes=subset"
    with pytest.raises(DataError, match=f"the manifest says {CLASSES} classes, {remedy}"):
        open_training_shards(load_config(tmp_path / "own.yaml"))
    assert open_training_shards(load_config(tmp_path / "own.yaml", ["data.classes=subset"])).num_samples == 20
    (tmp_path / "shards" / "manifest.json").unlink()  # Tars alone do not state the number of classes.
    assert open_training_shards(load_config(tmp_path / "own.yaml")).num_samples == 20
