"""Members of tars that are not plain images: links, sparse files, and files next to the images."""

import io
import logging
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from jitscale.data.find import find_tars
from jitscale.data.passes import read_once
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import survey_tar
from jitscale.data.tar_members import LOST_LINK
from jitscale.errors import DataError
from jitscale.preparation.finding import find_sources
from jitscale.preparation.survey import survey
from jitscale.preparation.verification import verify
from tests.support.pictures import number_of, numbered_png, samples_of, write_tar

Member = tuple[str, bytes | str]  # name, and content; a text is the target of a link


def with_links(path: Path, *members: Member, kind: bytes = tarfile.LNKTYPE) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def deduplicated(path: Path) -> Path:
    """The images 1, 2, 1, 3, 1. Equal files are hard links, one of them to another link."""
    one, two, three = (numbered_png(8, number) for number in (1, 2, 3))
    members: list[Member] = [("a.png", one), ("a.cls", b"1"), ("b.png", two), ("b.cls", b"2"), ("c.png", "a.png")]
    members += [("c.cls", "a.cls"), ("d.png", three), ("d.cls", "b.cls"), ("e.png", "c.png"), ("e.cls", b"0")]
    return with_links(path, *members)


EXPECTED = [(1, 1), (2, 2), (1, 1), (3, 2), (1, 0)]


def test_links_are_read_as_the_members_they_point_to(tmp_path: Path) -> None:
    deduplicated(tmp_path / "a.tar")
    assert samples_of(ShardSet.open(tmp_path, 3)) == EXPECTED
    found = survey(find_tars(str(tmp_path)), None, 1)
    assert (found.defects, found.manifest.total, found.skipped) == ([], 5, Counter())
    found.write()
    assert verify(find_tars(str(tmp_path)), 1).defects == []
    inputs = find_sources([str(tmp_path / "a.tar")])
    data = (tmp_path / "a.tar").read_bytes()
    assert data[inputs[2].offset :][: inputs[2].size] == numbered_png(8, 1)
    assert inputs.table["label"].tolist() == [label for _, label in EXPECTED]


def test_a_pass_in_tar_order_reads_links(tmp_path: Path) -> None:
    deduplicated(tmp_path / "a.tar")
    shards = ShardSet.open(tmp_path, 3)
    for first in range(5):
        blocks = read_once(shards, range(first, 5), 2, 0)
        assert [number_of(image) for image in chain(*blocks)] == [number for number, _ in EXPECTED[first:]]


def test_a_link_may_point_to_a_member_without_an_image_name(tmp_path: Path) -> None:
    """Some tools keep files under a hash of their content. Here some images are members of their own."""
    one, two, three, four = (numbered_png(8, number) for number in (1, 2, 3, 4))
    long_name = 96 * "x" + ".png"  # Only a part of the name is in its header.
    members: list[Member] = [("store/1.bin", one), ("store/2", two), ("store/l", b"2"), ("a.png", "store/1.bin")]
    members += [("a.cls", "store/l"), ("b.png", three), ("b.cls", b"1"), ("c.png", "store/2"), ("c.cls", b"0")]
    members += [(long_name, four), (long_name.replace("png", "cls"), b"1")]
    expected = [(1, 2), (3, 1), (2, 0), (4, 1)]
    # The second tar has its members in order.
    for number, kept in enumerate([members, members[:1] + members[3:4] + members[5:6]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with_links(folder / "a.tar", *kept)
        shards = ShardSet.open(folder, 0 if number else 3)
        here = [(image, 0) for image, _ in expected[:2]] if number else expected
        assert samples_of(shards) == here
        for first in range(len(here)):
            blocks = read_once(shards, range(first, len(here)), 2, 0)
            assert [number_of(image) for image in chain(*blocks)] == [image for image, _ in here[first:]]


def test_members_of_hidden_folders_are_not_samples(tmp_path: Path) -> None:
    """git-annex keeps the images in a hidden folder, with names of images.

    Each image must be read once, through its link.
    """
    one, two, three = (numbered_png(8, number) for number in (1, 2, 3))
    members: list[Member] = [("./.git/annex/1.png", one), ("./a.png", ".git/annex/1.png"), ("./b.png", two)]
    members += [(".git/annex/3.png", three), ("c.png", ".git/annex/3.png"), ("../d.png", one)]
    tar = with_links(tmp_path / "a.tar", *members, kind=tarfile.SYMTYPE)
    assert [sample.key for sample in survey_tar(tar).samples] == ["./a", "./b", "c", "../d"]
    shards, expected = ShardSet.open(tmp_path, 0), [1, 2, 3, 1]
    assert [number for number, _ in samples_of(shards)] == expected
    for first in range(4):
        for last in range(first + 1, 5):
            blocks = read_once(shards, range(first, last), 2, 0)
            assert [number_of(image) for image in chain(*blocks)] == expected[first:last]
    inputs = find_sources([str(tar)])
    assert (len(inputs), inputs.ignored) == (4, {"": 2})
    whole = write_tar(tmp_path / "whole", ("n1.tar", tar.read_bytes())).rename(tmp_path / "whole.tar")
    assert len(find_sources([str(whole)])) == 4


def test_a_pass_in_tar_order_skips_hidden_folders(tmp_path: Path) -> None:
    """If no image is a link, the pass does not look at offsets."""
    members = [(f"{folder}{n}.png", numbered_png(8, n)) for n in range(4) for folder in ("", ".thumbnails/")]
    write_tar(tmp_path / "a.tar", *members)
    blocks = read_once(ShardSet.open(tmp_path, 0), range(4), 2, 0)
    assert [number_of(image) for image in chain(*blocks)] == [0, 1, 2, 3]


def test_symbolic_links_are_relative_to_their_folder(tmp_path: Path) -> None:
    members = ("x/a.png", numbered_png(8, 1)), ("y/b.png", "../x/a.png"), ("y/c.png", "a.png"), ("y/d.png", "/dev/zero")
    scan = survey_tar(with_links(tmp_path / "a.tar", *members, kind=tarfile.SYMTYPE))
    assert [(sample.key, sample.offset) for sample in scan.samples] == [("x/a", 512), ("y/b", 512)]
    assert scan.skipped == {f"png{LOST_LINK}": 2}


def test_links_without_their_target_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = numbered_png(8, 1)
    members: list[Member] = [("a.png", one), ("a.cls", b"1"), ("b.png", "gone.png"), ("b.cls", b"2")]
    members += [("c.txt", "gone.txt"), ("d.png", "lost.cls"), ("d.cls", b"1"), ("e.png", one), ("e.cls", b"0")]
    with_links(tmp_path / "a.tar", *members)
    with caplog.at_level(logging.WARNING, "jitscale"):
        assert samples_of(ShardSet.open(tmp_path, 3)) == [(1, 1), (1, 0)]
    assert "2 images or labels are links without a target; they are left out" in caplog.text
    expected = Counter({f"png{LOST_LINK}": 2, "cls": 2, "txt": 1})
    found = survey(find_tars(str(tmp_path)), None, 1)
    found.write()
    assert found.skipped == expected
    assert verify(find_tars(str(tmp_path)), 1).skipped == expected
    assert find_sources([str(tmp_path / "a.tar")]).ignored == expected


def test_a_label_with_a_dangling_link_is_refused(tmp_path: Path) -> None:
    """The image must not become unlabelled, and a pass in tar order would fail at it later."""
    with_links(tmp_path / "a.tar", ("a.png", numbered_png(8, 1)), ("a.cls", "gone.cls"))
    with pytest.raises(DataError, match="byte 0: sample 'a' has a label that is a link without a target"):
        ShardSet.open(tmp_path, 3)


def test_a_tar_with_nothing_but_links_is_refused(tmp_path: Path) -> None:
    with_links(tmp_path / "a.tar", ("a.txt", b"pictures"), ("a.png", "store/1.bin"))
    with pytest.raises(DataError, match=r"no image in it, but \.png as a link without a target 1, "):
        find_sources([str(tmp_path / "a.tar")])


def test_links_in_a_tar_of_tars(tmp_path: Path) -> None:
    with_links(tmp_path / "n1", ("1.png", numbered_png()), ("2.png", "1.png"), ("3.png", "gone.png"))
    write_tar(tmp_path / "all.tar", ("n1.tar", (tmp_path / "n1").read_bytes()))
    inputs = find_sources([str(tmp_path / "all.tar")])
    assert [(inputs[row].offset, inputs[row].label) for row in range(len(inputs))] == [(1024, 0), (1024, 0)]
    assert inputs.ignored == {f"png{LOST_LINK}": 1}


def sparse(path: Path, name: str) -> Path:
    """A file as GNU tar -S writes it in pax format: a map, then all bytes outside of holes."""
    info, data = tarfile.TarInfo(name), b"1\n600\n4\n".ljust(512, b"\0") + b"data"
    info.size = len(data)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "604"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    return path


def old_sparse(path: Path, name: str) -> Path:
    """A file as GNU tar -S writes it in its own format: the map is in the header."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 4, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # the place of the bytes in the file, and their number
    header[386:410] = b"%011o\0%011o\0" % (600, 4)
    header[483:495] = b"%011o\0" % 604  # the real size
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    path.write_bytes(bytes(header) + b"data".ljust(512, b"\0") + bytes(1024))
    return path


@pytest.mark.parametrize("write", [sparse, old_sparse])
def test_sparse_members_are_refused(tmp_path: Path, write: object) -> None:
    """This also holds in a tar of tars. A sparse member that is never read does no harm."""
    assert callable(write)
    write(tmp_path / "a.tar", "k.png")
    for read in (lambda: ShardSet.open(tmp_path / "a.tar", 0), lambda: find_sources([str(tmp_path / "a.tar")])):
        with pytest.raises(
            DataError, match=r"a.tar: byte \d+: 'k.png' is sparse.*write the tar again without --sparse"
        ):
            read()
    write_tar(tmp_path / "all.tar", ("n1.tar", (tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=r"all.tar: byte .* 'k.png' is sparse"):
        find_sources([str(tmp_path / "all.tar")])
    assert survey_tar(write(tmp_path / "b.tar", "k.txt")).defects == []


def test_other_members_are_ignored_and_counted(tmp_path: Path) -> None:
    members = [("README.md", b"x"), ("LICENSE", b"x"), ("k.png", numbered_png()), ("k.cls", b"1"), ("k.txt", b"x")]
    write_tar(tmp_path / "a.tar", *members, ("k.seg.png", numbered_png()))
    assert len(ShardSet.open(tmp_path, 2).read(0, 0)[0]) == 8
    found = survey(find_tars(str(tmp_path)), None, 1)
    assert found.defects == []
    assert found.skipped == {"md": 1, "": 1, "txt": 1, "seg.png": 1}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("22.05.png", b"")], r"sample '22' has 0 images among \['05.png'\], .* write 22_05.png for 22.05.png"),
        (
            [("k.png", b""), ("k.json", b'{"label": 3}')],
            "1 members .json; k.json has the fields 'label'; pass --label-key json:label",
        ),
        (
            [("n01/1.png", b""), ("n02/2.png", b""), ("README.md", b"x")],
            r"has no cls members, but images lie in 2 folders \(n01, n02\); pass --labels folders",
        ),
        ([("train/cat/1.png", b""), ("val/cat/2.png", b""), ("3.png", b"")], r"2 folders \(train/cat, val/cat\)"),
        (
            [("k.png", b""), ("x/dataset.json", b"{}")],
            r"but x/dataset.json, which seems to hold .* as --labels FILE; or pass --label-key none",
        ),
        ([("k.png", b""), ("metadata.csv", b"")], "but metadata.csv, which seems to hold labels"),
        ([("k.png", b""), ("k.label", b"1")], "but k.label, which seems to hold labels"),
        ([("k.png", b""), ("k.cls.txt", b"1")], "but k.cls.txt, which seems"),
        ([("k.png", b""), ("data.csv", b"path,label\nk.png,1\n")], "but data.csv, which seems"),
        (
            [("x/k.png", b""), ("l.png", b""), ("x/breeds.csv", b"id,breed\nk,1\nl,2\n")],
            "but x/breeds.csv, which seems",
        ),
        ([("k.png", b""), ("list.jsonl", b'{"image": "k.png", "class": 3}')], "but list.jsonl, which seems"),
        ([("images/k.png", b""), ("val_annotations.txt", b"k.png\tn01\t0\t0\t9\t9")], "but val_annotations.txt, which"),
        ([("k.png", b""), ("labels.npy", b"")], "but labels.npy, which seems"),
        (
            [("k.png", b""), ("k.json", b"{}"), ("l.png", b""), ("l.json", b'{"label": 3}')],
            "l.json has the fields 'label'",
        ),
        ([("train/cat/1.png", b""), ("train/dog/2.png", b""), ("val/3.png", b"")], "but images lie in 3 folders"),
    ],
)
def test_members_that_look_like_labels_are_reported(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "a.tar", *members)
    with pytest.raises(DataError, match=message) as caught:
        find_sources([str(tmp_path / "a.tar")])
    assert str(caught.value).startswith(f"{tmp_path}/a.tar: ")
    (defect,) = survey(find_tars(str(tmp_path)), None, 1).defects
    assert str(defect) == str(caught.value)


def test_tables_that_do_not_describe_the_images_are_ignored(tmp_path: Path) -> None:
    members = [("./k.png", b""), ("./data.csv", b"class,number\ncat,3\n"), ("./files.jsonl", b'{"image": "k.png"}\n')]
    members += [("./x/train.txt", b"k.png a cat"), ("./x/l.png", b"")]
    inputs = find_sources([str(write_tar(tmp_path / "a.tar", *members))])
    assert (len(inputs), inputs.ignored) == (2, {"csv": 1, "jsonl": 1, "txt": 1})


def test_a_json_without_labels_is_taken_for_a_caption(tmp_path: Path) -> None:
    members = [("k.png", numbered_png()), ("k.json", b'{"caption": "x"}'), ("l.png", numbered_png()), ("l.json", b"[")]
    assert len(find_sources([str(write_tar(tmp_path / "a.tar", *members))])) == 2
    assert np.isin(ShardSet.open(tmp_path, 0).read(0, 1)[1], [0])
