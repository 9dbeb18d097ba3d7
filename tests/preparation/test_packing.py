"""tools/make_shards.py in real processes: its output, the images that it leaves out, and its refusals."""

import errno
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from jitscale.data.images import CODECS, center_crop, decode
from jitscale.data.manifest import BadInput, Manifest
from jitscale.data.shards import ShardSet
from jitscale.errors import DataError, StorageError
from jitscale.keyed_random import Purpose, permutation
from jitscale.preparation.finding import find_sources
from jitscale.preparation.packing import ShardTask, pack_shard
from jitscale.preparation.packing_job import PackingJob, default_most_bad
from jitscale.preparation.packing_plan import PackingOptions
from tests.preparation.packing_jobs import (
    CLASSES,
    PER_CLASS,
    PER_SHARD,
    RESOLUTION,
    command,
    committed,
    contents,
    finish,
    packed,
    refused,
    samples,
    start,
    write_tree,
)
from tests.support import ROOT
from tests.support.pictures import file_bytes, noise, tar_bytes
from tests.support.slow import slow_unless


def test_folders_become_shards(tree: Path, clean: Path) -> None:
    manifest = Manifest.read(clean / "manifest.json")
    total = len(CLASSES) * PER_CLASS
    assert (manifest.codec, manifest.resolution, manifest.crop) == ("raw", RESOLUTION, "adm")
    assert (manifest.num_classes, manifest.class_names, manifest.enlarged) == (3, CLASSES, 1)
    assert (manifest.total, manifest.transparent, manifest.background) == (total - 2, 3, "white")
    assert manifest.bad == [
        BadInput(f"{tree}/ant/03.png", manifest.bad[0].reason),
        BadInput(f"{tree}/cat/05.png", "cannot be decoded as png (none of PNG, WEBP, JPEG)"),
    ]
    written = samples(clean)
    assert sorted(written) == [number for number in range(total) if number not in (3, 2 * PER_CLASS + 5)]
    for number, sample in written.items():
        file = tree / CLASSES[number // PER_CLASS] / f"{number % PER_CLASS:02d}.png"
        picture = Image.open(file).convert("RGBA")
        shown = np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3]
        np.testing.assert_array_equal(decode(sample["npy"], "npy"), center_crop(shown, RESOLUTION))
        assert sample["cls"] == str(number // PER_CLASS).encode()
    ends = (".tar", ".index.npy", ".keys.npy")
    expected = {f"shard-{shard:06d}{end}" for shard in range(-(-total // PER_SHARD)) for end in ends}
    assert set(contents(clean)) == expected | {"manifest.json"}
    assert ShardSet.open(clean, 3).num_samples == manifest.total


def test_the_order_is_a_global_shuffle(tree: Path, clean: Path, tmp_path: Path) -> None:
    def order(folder: Path) -> list[list[int]]:
        return [[int(Path(name).stem) for name in names(path) if name.endswith(".npy")] for path in tars(folder)]

    def tars(folder: Path) -> list[Path]:
        return sorted(folder.glob("*.tar"))

    def names(path: Path) -> list[str]:
        with tarfile.open(path) as archive:
            return archive.getnames()

    total, bad = len(CLASSES) * PER_CLASS, (3, 2 * PER_CLASS + 5)
    whole = permutation(total, 0, Purpose.PACKING_ORDER).tolist()
    slices = [whole[first : first + PER_SHARD] for first in range(0, total, PER_SHARD)]
    assert order(clean) == [[number for number in numbers if number not in bad] for numbers in slices]
    packed(tree, tmp_path / "other", "--seed", "1")
    assert order(tmp_path / "other") != order(clean)
    assert samples(tmp_path / "other") == samples(clean)


def test_imagenet_is_packed_in_place(tmp_path: Path) -> None:
    """The tar of tars has the oddities of the real one: a PNG and a CMYK JPEG named .JPEG, and a truncated file."""
    ordinary = file_bytes(noise(1, 40, 50), "JPEG")
    cmyk = file_bytes(Image.fromarray(noise(2, 30, 30)).convert("CMYK"), "JPEG")
    png = file_bytes(noise(3, 20, 33))
    inner = {
        "n02": tar_bytes(("n02_1.JPEG", png), ("n02_2.JPEG", ordinary[: len(ordinary) // 2])),
        "n01": tar_bytes(("n01_2.JPEG", cmyk), ("n01_1.JPEG", ordinary)),
    }
    source = tmp_path / "train.tar"
    source.write_bytes(tar_bytes(*[(f"{name}.tar", data) for name, data in inner.items()]))
    at_bad = source.read_bytes().index(ordinary[: len(ordinary) // 2], source.read_bytes().index(png))

    manifest = packed(source, tmp_path / "raw")
    written = samples(tmp_path / "raw")
    assert (manifest.class_names, sorted(written)) == (["n01", "n02"], [0, 1, 2])
    assert [bad.source for bad in manifest.bad] == [f"{source}: byte {at_bad}"]
    for number, (data, label) in enumerate([(ordinary, b"0"), (cmyk, b"0"), (png, b"1")]):
        image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode(written[number]["npy"], "npy"), center_crop(image, RESOLUTION))
        assert written[number]["cls"] == label

    original = packed(source, tmp_path / "original", codec="original")
    assert (original.codec, original.resolution, original.crop) == ("original", None, None)
    assert samples(tmp_path / "original") == {
        0: {"jpg": ordinary, "cls": b"0"},
        1: {"jpg": cmyk, "cls": b"0"},
        2: {"png": png, "cls": b"1"},
    }
    assert ShardSet.open(tmp_path / "original", 2, RESOLUTION).num_samples == 3
    assert {path.name for path in tmp_path.iterdir()} == {"train.tar", "raw", "original"}


def test_folders_and_a_tar_of_tars_give_the_same_shards(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    inner = {name: [(path.name, path.read_bytes()) for path in (tree / name).iterdir()] for name in reversed(CLASSES)}
    source = tmp_path / "in.tar"
    source.write_bytes(tar_bytes(*[(f"{name}.tar", tar_bytes(*members)) for name, members in inner.items()]))
    packed(source, tmp_path / "from_tar")
    packed(tree, tmp_path / "from_folders", "--workers", "1")
    assert contents(tmp_path / "from_tar") == contents(tmp_path / "from_folders")


@pytest.mark.parametrize("codec", [slow_unless(codec in ("raw", "jpeg"), codec) for codec in CODECS])
def test_exchange_with_webdataset_in_both_directions(tmp_path: Path, codec: str) -> None:
    """webdataset's tars are packed, and webdataset reads the packed shards. Class names become numbers."""
    with webdataset.ShardWriter(str(tmp_path / "theirs-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            writer.write({"__key__": f"k{number}", "png": noise(number), "cls": CLASSES[number % 3]})
    names = tmp_path / "names.txt"
    names.write_text("cat\nbee\nant\n")
    pattern = str(tmp_path / "theirs-{0000..0001}.tar")
    manifest = packed(pattern, tmp_path / "ours", "--class-names", str(names), codec=codec)
    assert manifest.class_names == ["cat", "bee", "ant"]
    urls = sorted(str(path) for path in (tmp_path / "ours").glob("*.tar"))
    extension = {"raw": "npy", "jpeg": "jpg"}.get(codec, codec)
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", extension, "cls")
    read = {int(key): (image, label) for key, image, label in theirs}
    assert {number: label for number, (_, label) in read.items()} == {0: 2, 1: 1, 2: 0, 3: 2, 4: 1, 5: 0}
    for number, (image, _) in read.items():
        expected = center_crop(noise(number), RESOLUTION)
        if codec == "jpeg":
            assert np.abs(image.astype(int) - expected).mean() < 12
        else:
            np.testing.assert_array_equal(image, expected)
    again = packed(tmp_path / "ours" / "*.tar", tmp_path / "again")  # Raw members are images too.
    assert (again.total, again.num_classes, again.class_names) == (6, 3, None)


def test_tables_with_paths_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.png").write_bytes(file_bytes(noise(number)))
    rows = [("data/2.png", 4), ("data/0.png", 1), (str(tmp_path / "data" / "1.png"), 0), ("data/gone.png", 2)]
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"path": path, "label": label}) + "\n" for path, label in rows)
    )
    for name in ("a.csv", "a.jsonl"):
        output = tmp_path / f"{name}.out"
        manifest = packed(tmp_path / name, output)
        written = samples(output)
        assert manifest.bad == [BadInput(f"{tmp_path}/data/gone.png", "cannot be read (No such file or directory)")]
        assert (manifest.num_classes, manifest.class_names) == (5, None)
        for number, (image, label) in enumerate([(2, 4), (0, 1), (1, 0)]):
            expected = center_crop(noise(image), RESOLUTION)
            np.testing.assert_array_equal(decode(written[number]["npy"], "npy"), expected)
            assert written[number]["cls"] == str(label).encode()


def test_images_without_labels_are_packed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(file_bytes(noise(number)))
    os.mkfifo(tmp_path / "in" / "pipe.png")
    manifest = packed(tmp_path / "in", tmp_path / "out", codec="webp")
    assert (manifest.num_classes, manifest.class_names, manifest.total) == (0, None, 3)
    assert manifest.bad == [BadInput(f"{tmp_path}/in/pipe.png", "is no regular file")]
    assert {extension for sample in samples(tmp_path / "out").values() for extension in sample} == {"webp"}
    assert ShardSet.open(tmp_path / "out", 0).num_samples == 3


def test_names_in_tars_are_not_used_as_paths(tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    image = file_bytes(noise(1))
    members = [("../../x.png", image), ("/../../y.png", image), (f"{tmp_path}/z.png", image)]
    (inside / "in.tar").write_bytes(tar_bytes(*members))
    (inside / "inner.tar").write_bytes(tar_bytes(("../../n01.tar", tar_bytes(*members))))
    for name in ("in", "inner"):
        assert packed(inside / f"{name}.tar", inside / name, codec="original").total == 3
        assert {key for sample in samples(inside / name).values() for key in sample} <= {"png", "cls"}
    assert Manifest.read(inside / "inner" / "manifest.json").class_names == ["n01"]
    outside = {path for path in tmp_path.rglob("*") if inside not in (path, *path.parents)}
    assert outside == {tmp_path / "a", tmp_path / "a" / "b"}


# Refusals


def test_too_many_bad_images_stop_the_job(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    for number in range(PER_CLASS - 2):
        (tree / "bee" / f"{number:02d}.png").write_bytes(b"no image")
    output = tmp_path / "out"
    message = refused(*command(tree, output))
    count = int(message.removeprefix(f"error: {output}: ").split()[0])
    assert 10 < count <= PER_CLASS - 2
    assert f"{count} of 42 images cannot be used, the limit is 10 ({tree}/bee/" in message
    assert f"--max-bad {count} or more" in message
    before = committed(output)
    manifest = packed(tree, output, "--max-bad", str(PER_CLASS - 2))
    assert len(manifest.bad) == PER_CLASS - 2
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())
    packed(tree, tmp_path / "at_once", "--max-bad", str(PER_CLASS - 2))
    assert contents(tmp_path / "at_once") == contents(output)


def test_a_job_with_nothing_but_bad_images_stops_early(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(600):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"no image")
    message = refused(*command(tmp_path / "in", tmp_path / "out", "--samples-per-shard", "1000"))
    assert int(message.removeprefix(f"error: {tmp_path}/out: ").split()[0]) < 100


def test_bad_images_of_other_parts_are_counted(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "in", dirty=False)
    for name in ("ant", "bee", "cat"):
        for number in range(PER_CLASS - 1):
            (tree / name / f"{number:02d}.png").write_bytes(b"no image")
    output = tmp_path / "out"
    assert finish(start(command(tree, output, "--part", "1/2", "--max-bad", "100")))[0] == 0
    found = len(json.loads(next(output.glob(".packing/shard-*.json")).read_text())["bad"])
    assert found
    message = refused(*command(tree, output, "--part", "2/2", "--max-bad", "15"))
    assert len(committed(output)) == 6  # The missing shards belong to part 2.
    assert "the limit is 15" in message


def test_the_default_limit_of_bad_images() -> None:
    assert [default_most_bad(images) for images in (1, 100_000, 110_000, 1_281_167)] == [10, 10, 11, 128]


def test_nothing_but_bad_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\ngone.png\n")
    assert "none of the 1 images can be used" in refused(*command(tmp_path / "a.csv", tmp_path / "out"))


def test_a_mistake_is_a_one_line_error(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x.png,1\n")
    assert "no/where: there is no such file or folder" in refused(*command("no/where", output))
    assert "empty: no image in it" in refused(*command(tmp_path / "empty", output))
    assert "a.csv: has no lines with images below the columns 'x.png', '1'; begin it" in refused(
        *command(tmp_path / "a.csv", output)
    )
    assert "'0/4' is not I/N" in refused(*command(tree, output, "--part", "0/4"))
    assert "'5/4' is not I/N" in refused(*command(tree, output, "--part", "5/4"))
    assert "'gif' (choose from" in refused(*command(tree, output, codec="gif"))
    assert "resolution 0: is not in 1..13377" in refused(*command(tree, output, "--resolution", "0"))
    assert "'0' is not a positive integer" in refused(*command(tree, output, "--workers", "0"))
    assert "required: --input, --output" in refused(*command(tree, output)[:2])
    assert list(output.glob("**/*.tar")) == []
    (tmp_path / "file").write_bytes(b"")
    message = refused(*command(tree, tmp_path / "file" / "out"))
    assert "file/out: cannot be written to (Not a directory); " in message
    (output / "old.tar").write_bytes(b"")
    assert "old.tar: is there, but belongs to no packing job" in refused(*command(tree, output))


def test_an_output_without_room_is_refused_before_writing(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\n" + "".join(f"{number}.png\n" for number in range(20_000)))
    message = refused(*command(tmp_path / "a.csv", tmp_path / "out", "--resolution", "13000"))
    assert "10.1TB to write" in message
    options = PackingOptions([str(tmp_path / "in")], "raw", RESOLUTION, PER_SHARD, 0)
    write_tree(tmp_path / "in", dirty=False)
    job = PackingJob(tmp_path / "exact", options, most_bad=0)
    needed = job.bytes_to_write()
    assert needed == sum(shard.record.bytes for shard in job.run(job.shards, workers=1))
    assert job.finish() is not None


def test_help_shows_the_usual_commands() -> None:
    code, out, _ = finish(start([sys.executable, str(ROOT / "tools" / "make_shards.py"), "--help"]))
    assert code == 0
    assert "ILSVRC2012_img_train.tar" in out
    assert "--part 1/16" in out
    assert "slurm/pack_shards.sh" in out


def test_a_picture_that_needs_too_much_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise MemoryError

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.png").write_bytes(file_bytes(noise(1)))
    monkeypatch.setattr("jitscale.data.images.decode_file", exhausted)
    task = ShardTask(tmp_path / "a.tar", "/", {0: find_sources([str(tmp_path / "in")])[0]}, "raw", 8, 0)
    with pytest.raises(DataError, match=r"in/large.png: needs more memory than there is; .* fewer --workers"):
        pack_shard(task)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_failing_storage_is_not_a_bad_image(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the shards would lack a sound image. The same command continues the job."""

    def fail(*arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(file_bytes(noise(1)))
    task = ShardTask(tmp_path / "a.tar", "/", {0: find_sources([str(tmp_path / "in")])[0]}, "raw", 8, 1)
    with monkeypatch.context() as patch:
        patch.setattr("jitscale.data.tar_index.OffsetReader.read", fail)
        with pytest.raises(StorageError, match=r"in/a.png: cannot be read \(.*same command") as met:
            pack_shard(task)
    assert not met.value.is_wrong
    assert pack_shard(task).record.samples == 1
    (tmp_path / "in" / "a.png").unlink()
    assert [bad.reason for bad in pack_shard(task).bad] == ["cannot be read (No such file or directory)"]
