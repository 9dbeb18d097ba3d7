"""Images that are found in folders, tars and tables, and refusals. No image is opened."""

import gzip
from pathlib import Path

import pytest
import webdataset

from jitscale.data.manifest import read_class_names
from jitscale.data.tar_index import LARGEST_LABEL, NO_LABEL
from jitscale.errors import DataError
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.sources import Source, SourceTable
from tests.preparation.inputs import CONTENT, refused, tree
from tests.support.pictures import tar_bytes, write_tar


def found(inputs: SourceTable, root: Path) -> list[tuple[str, int]]:
    """The path below `root` and the label of every image, in order."""
    return [
        (str(Path(source.path).relative_to(root)), source.label)
        for source in map(inputs.__getitem__, range(len(inputs)))
    ]


# Folders


def test_top_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "cat/deep/er/2.webp",
        "cat/10.PNG",
        "bird/1.JPEG",
        "ant/x.jpg",
        "cat/notes.txt",
        ".git/a.png",
        "cat/.b.png",
    )
    (tmp_path / "empty").mkdir()
    inputs = find_sources([str(tmp_path)])
    assert found(inputs, tmp_path) == [
        ("ant/x.jpg", 0),
        ("bird/1.JPEG", 1),
        ("cat/10.PNG", 2),
        ("cat/deep/er/2.webp", 2),
    ]
    assert (inputs.num_classes, inputs.class_names) == (3, ["ant", "bird", "cat"])
    assert inputs[1] == Source(str(tmp_path / "bird/1.JPEG"), "jpeg", 1)
    assert dict(inputs.ignored) == {"txt": 1}


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    tree(tmp_path, "b.png", "a.jpg", "notes.txt")
    (tmp_path / "empty").mkdir()
    inputs = find_sources([str(tmp_path)])
    assert found(inputs, tmp_path) == [("a.jpg", NO_LABEL), ("b.png", NO_LABEL)]
    assert (inputs.num_classes, inputs.class_names) == (0, None)


def test_folders_are_class_names_even_if_they_look_like_numbers(tmp_path: Path) -> None:
    tree(tmp_path, "2/a.png", "10/a.png")
    inputs = find_sources([str(tmp_path)])
    assert inputs.class_names == ["2", "10"]
    assert found(inputs, tmp_path) == [("10/a.png", 1), ("2/a.png", 0)]
    assert find_sources([str(tmp_path)], FindOptions(["2", "10"])).table["label"].tolist() == [1, 0]


def test_several_folders_share_their_classes(tmp_path: Path) -> None:
    tree(tmp_path, "one/b/1.png", "one/c/2.png", "two/a/3.png", "two/b/4.png")
    inputs = find_sources([str(tmp_path / "two"), str(tmp_path / "one")])
    assert found(inputs, tmp_path) == [("two/a/3.png", 0), ("two/b/4.png", 1), ("one/b/1.png", 1), ("one/c/2.png", 2)]


def test_links_are_followed_except_in_cycles(tmp_path: Path) -> None:
    tree(tmp_path / "far", "1.png")
    tree(tmp_path / "near", "a/2.png")
    (tmp_path / "near" / "b").symlink_to(tmp_path / "far")
    # This dangling link counts as a bad image later.
    (tmp_path / "near" / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    inputs = find_sources([str(tmp_path / "near")])
    assert found(inputs, tmp_path / "near") == [("a/2.png", 0), ("a/gone.png", 0), ("b/1.png", 1)]
    (tmp_path / "near" / "a" / "up").symlink_to(tmp_path / "near")
    refused("up: is a link to a folder around it", tmp_path / "near")
    tree(tmp_path / "round", "a/3.png", "c/4.png")
    (tmp_path / "round" / "a" / "x").symlink_to("../c")
    (tmp_path / "round" / "c" / "y").symlink_to("../a")
    refused("y: is a link to a folder around it", tmp_path / "round")


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "b/1.png", "2.png")
    refused(r"holds folders of classes \(2\) and images without a class \(1\); keep one kind", tmp_path)
    (tmp_path / "2.png").unlink()
    write_tar(tmp_path / "x.tar", ("k.png", CONTENT))
    refused(r"holds images, such as .*a/1.png, and tars \(1\)", tmp_path)


def test_numeric_class_names_are_ordered_by_number_and_others_are_sorted(tmp_path: Path) -> None:
    tree(tmp_path / "numbers", *(f"{number}/a.png" for number in range(12)))
    assert find_sources([str(tmp_path / "numbers")]).class_names == [str(number) for number in range(12)]
    tree(tmp_path / "mixed", "2/a.png", "10/a.png", "x/a.png")
    assert find_sources([str(tmp_path / "mixed")]).class_names == ["10", "2", "x"]


def test_names_of_any_bytes_survive(tmp_path: Path) -> None:
    name = b"line\nbreak \xff.png"
    (tmp_path / "c").mkdir()
    Path(bytes(tmp_path / "c").decode(), name.decode("utf-8", "surrogateescape")).write_bytes(CONTENT)
    source = find_sources([str(tmp_path)])[0]
    assert Path(source.path).read_bytes() == CONTENT
    assert source.place == rf"{tmp_path}/c/line\nbreak \xff.png"


# Tars


def imagenet_like(path: Path) -> Path:
    """A tar of tars whose outer and inner members are not ordered. Each member's content states its place."""
    inner = {
        label: tar_bytes(*[(f"{label}_{number}.JPEG", f"{label}/{number}".encode()) for number in (3, 1, 2)])
        for label in ("n02", "n01")
    }
    return write_tar(path, ("n02.tar", inner["n02"]), ("n01.tar", inner["n01"]))


def test_a_tar_of_tars_is_read_in_place(tmp_path: Path) -> None:
    path = imagenet_like(tmp_path / "train.tar")
    inputs = find_sources([str(path)])
    content = path.read_bytes()
    sources = [inputs[number] for number in range(len(inputs))]
    texts = [content[source.offset : source.offset + source.size].decode() for source in sources]
    assert texts == ["n01/1", "n01/2", "n01/3", "n02/1", "n02/2", "n02/3"]  # The order is that of folders.
    assert [source.label for source in sources] == [0, 0, 0, 1, 1, 1]
    assert inputs.class_names == ["n01", "n02"]
    assert sources[0].place == f"{path}: byte {sources[0].offset}"
    assert len(inputs.path_ends) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.tar"]


def test_damaged_tars_of_tars_are_refused(tmp_path: Path) -> None:
    whole = imagenet_like(tmp_path / "train.tar").read_bytes()
    inner = tar_bytes(("a.png", CONTENT))
    for damaged, message in [
        (whole[:-10_000], r"cut\.tar: (ends at byte|bytes 0\.\.)"),
        (whole[:6000], r"cut\.tar: bytes 0\.\.6000: no whole tar"),
        (
            tar_bytes(("a.tar", inner[:1024]), ("b.tar", inner)),
            r"cut\.tar: bytes 512\.\.1536: no whole tar",
        ),
        (tar_bytes(("a.tar", inner), ("b.tar", inner[:700])), r"cut\.tar: ends at byte \d+ without an end"),
        (tar_bytes(("a.tar", gzip.compress(inner, 0))), r"cut\.tar: byte 512: is neither a tar header nor"),
        (
            tar_bytes(("a.tar", inner), ("b.png", CONTENT)),
            r"cut\.tar: byte \d+: 'b.png' is no tar, but others in it are",
        ),
    ]:
        (tmp_path / "cut.tar").write_bytes(damaged)
        refused(message, tmp_path / "cut.tar")


def written_by_webdataset(folder: Path, labels: list[int] | list[str] | list[None]) -> Path:
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "theirs-%04d.tar"), maxcount=2, verbose=0) as writer:
        for number, label in enumerate(labels):
            sample = {"__key__": f"k{number}", "jpg": b"image %d" % number, "json": {}}
            writer.write(sample if label is None else {**sample, "cls": label})
    return folder


@pytest.mark.parametrize("pattern", ["", "*.tar", "theirs-{0000..0001}.tar"])
def test_webdataset_tars_with_numbers(tmp_path: Path, pattern: str) -> None:
    folder = written_by_webdataset(tmp_path / "wds", [7, 0, 3])
    inputs = find_sources([str(folder / pattern)])
    sources = [inputs[number] for number in range(3)]
    texts = [Path(source.path).read_bytes()[source.offset : source.offset + source.size] for source in sources]
    assert texts == [b"image 0", b"image 1", b"image 2"]
    assert [(source.label, source.extension) for source in sources] == [(7, "jpg"), (0, "jpg"), (3, "jpg")]
    assert (inputs.num_classes, inputs.class_names) == (8, None)
    named = find_sources([str(folder / pattern)], FindOptions(list("abcdefghij")))
    assert (named.num_classes, named.class_names) == (10, list("abcdefghij"))


def test_webdataset_tars_with_names_and_without_labels(tmp_path: Path) -> None:
    names = written_by_webdataset(tmp_path / "names", ["dog", "cat", "dog"])
    assert find_sources([str(names)]).table["label"].tolist() == [1, 0, 1]
    assert find_sources([str(names)], FindOptions(["dog", "ant", "cat"])).table["label"].tolist() == [0, 2, 0]
    none = find_sources([str(written_by_webdataset(tmp_path / "none", [None, None]))])
    assert (none.table["label"].tolist(), none.num_classes) == ([NO_LABEL] * 2, 0)


def test_raw_shards_can_be_packed_again(tmp_path: Path) -> None:
    inputs = find_sources([str(write_tar(tmp_path / "a.tar", ("k.npy", CONTENT), ("k.cls", b"1")))])
    assert (inputs[0].extension, inputs[0].label) == ("npy", 1)


# Tables


def test_csv_and_jsonl_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufefflabel,path,note\ndog,x/1.png,\ncat,/far/2.JPG,hm\n")
    (tmp_path / "b.jsonl").write_text('{"path": "x/1.png", "label": "dog"}\n\n{"path": "/far/2.JPG", "label": "cat"}\n')
    for name in ("a.csv", "b.jsonl"):
        inputs = find_sources([str(tmp_path / name)])
        assert [inputs[0].path, inputs[1].path] == [str(tmp_path / "x/1.png"), "/far/2.JPG"]
        assert (inputs.table["label"].tolist(), inputs.class_names) == ([1, 0], ["cat", "dog"])
        assert inputs[1] == Source("/far/2.JPG", "jpg", 0)
    (tmp_path / "c.jsonl").write_text('{"path": "1.png", "label": 4}\n{"path": "2.png", "label": "2"}\n')
    assert find_sources([str(tmp_path / "c.jsonl")]).table["label"].tolist() == [4, 2]
    (tmp_path / "e.csv").write_text("file_name,breed\n1.png,cat\n2.png,dog\n")
    assert find_sources([str(tmp_path / "e.csv")], FindOptions(label_column="breed")).class_names == ["cat", "dog"]
    assert find_sources([str(tmp_path / "e.csv")], FindOptions(labels="none")).num_classes == 0
    (tmp_path / "d.csv").write_text("path\n1.png\n")
    assert find_sources([str(tmp_path / "d.csv")]).num_classes == 0


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("a.png,1\nb.png,2\n", None, r"line 1: no column 'path' among 'a.png', '1'; begin the file with.*path,label"),
        ("path;label\na.png;1\n", None, "line 1: no column 'path'"),
        ("", None, "line 1: no column 'path' among nothing"),
        ("path,label\n", None, "has no lines with images"),
        (
            "path,label\na.png,1\nb.png,\n",
            None,
            "line 3: has no label where a number is expected, as in .*line 2; make all",
        ),
        (
            "path,label\na.png,1\nb.png,cat\n",
            None,
            "line 3: has label 'cat' where a number is expected, as in .*line 2; make all labels of one kind",
        ),
        (
            "path,label\na.png,-1\n",
            None,
            rf"line 2: label '-1' is neither a class number, an integer in 0\.\.{LARGEST_LABEL}",
        ),
        ("path,label\na.png,1.5\n", None, "line 2: label '1.5' is neither"),
        ("path,label\na.png,3000000000\n", None, "line 2: label '3000000000' is neither"),
        ("path,label\na.png,2\n", ["x", "y"], "line 2: has label 2, none of the 2 classes"),
        ("path,label\na.png,z\n", ["x", "y"], "line 2: has label 'z', none of the 2 classes"),
        ("path\na.png\n", ["x"], "line 2: has no label, but class names are given"),
        ("path,label\na.gif,2\n", None, "line 2: 'a.gif' is no image by its name; expected npy, png"),
        ("path,label\n,2\n", None, "line 2: has no path"),
        ("path,class\na.png,2\n", None, "line 1: no 'label' among 'path', 'class'"),
        ("path,label\n\xff.png,2\n", None, "cannot be read as a table"),
        ("path,label\na.png,1\nb.png,0\na.png,0\n", None, "line 4: lists 'a.png' again; every image must come once"),
    ],
)
def test_invalid_tables_are_refused(tmp_path: Path, text: str, names: list[str] | None, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    refused(message, tmp_path / "a.csv", names=names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.png"}\n{"path": \n', "line 2: no JSON"),
        ("[" * 200_000, "line 1: no JSON"),
        ('{"path": "a.png", "label": ' + "1" * 5000 + "}", "line 1: no JSON"),
        ('{"path": "a.png", "label": "' + "1" * 5000 + '"}', "line 1: label '1+' is neither a class number"),
        ('["a.png"]\n', "line 1: no object; write"),
        ('{"label": 1}\n', "line 1: no column 'path' among 'label'; begin"),
        ('{"path": "a.png", "class": 1}\n', "line 1: no 'label' among 'path', 'class'"),
        ('{"path": "a.png", "label": 1.5}\n', "line 1: label 1.5 is neither an integer nor a name"),
        ('{"path": "a.png", "label": true}\n', "line 1: label True is neither"),
        ('{"path": "a.png", "label": ""}\n', "line 1: label '' is neither"),
    ],
)
def test_invalid_json_lines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    refused(message, tmp_path / "a.jsonl")


# Other inputs


def test_other_sources_are_refused(tmp_path: Path) -> None:
    refused("no/where: there is no such file or folder; give a folder of images, tars", "no/where")
    refused("no image in it; give a folder of images, tars", tmp_path)
    refused(r"\*.tar: matches no file", tmp_path / "*.tar")
    refused(r"a-1.tar: there is no such file; correct the pattern", tmp_path / "a-{1..2}.tar")
    refused("unbalanced braces", tmp_path / "a-{1..2.tar")
    tree(tmp_path, "x.tar.gz", "x.png", "sub/y.png")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(CONTENT))
    refused(r"x.tar.gz: is compressed with gzip; gunzip it", tmp_path / "x.tar.gz")
    refused("x.png: is neither", tmp_path / "x.png")
    refused(r"is given twice", tmp_path / "sub", tmp_path / "sub" / ".." / "sub")
    (tmp_path / "a.tar").write_bytes(b"")
    refused("a.tar: is empty", tmp_path / "a.tar")
    refused("b.tar: no image in it", write_tar(tmp_path / "b.tar"))


def test_all_sources_must_have_the_same_kind_of_labels(tmp_path: Path) -> None:
    tree(tmp_path / "folders", "cat/1.png")
    write_tar(tmp_path / "a.tar", ("k.png", CONTENT), ("k.cls", b"3"))
    refused(
        r"1.png: has label 'cat' where a number is expected, as in .*a.tar: byte 1536",
        tmp_path / "folders",
        tmp_path / "a.tar",
    )
    write_tar(tmp_path / "b.tar", ("k.png", CONTENT))
    refused(
        r"b.tar: byte 512: has no label where a class name is expected, as in .*1.png",
        tmp_path / "folders",
        tmp_path / "b.tar",
    )


def test_class_names_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tabby cat\r\ndog \n\n")
    assert read_class_names(path) == ["tabby cat", "dog"]
    for text, message in [
        ("a\n\nb\n", "line 2: is empty"),
        ("a\nb\na\n", "line 3: 'a' is in line 1 too"),
        ("", "line 1: is empty"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    with pytest.raises(DataError, match="cannot be read as class names"):
        read_class_names(tmp_path / "nothing")


def test_inputs_are_stored_compactly_and_read_back(tmp_path: Path) -> None:
    tree(tmp_path / "in", "a/1.png", "b/2.jpeg")
    write_tar(tmp_path / "in.tar", ("k.webp", CONTENT))
    inputs = find_sources([str(tmp_path / "in")])
    contents = []
    for name in ("one", "two"):
        with (tmp_path / name).open("wb") as file:
            inputs.write(file)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    (tmp_path / "one").rename(tmp_path / "one.npz")
    again = SourceTable.read(tmp_path / "one.npz", inputs.num_classes, inputs.class_names)
    assert [again[number] for number in range(2)] == [inputs[number] for number in range(2)]
    assert inputs.table.itemsize == 33
