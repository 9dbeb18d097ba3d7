"""Labels in files, and splits. Neither is taken for folders of classes."""

from pathlib import Path

import pytest

from jitscale.data.tar_members import holds_labels
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from tests.preparation.inputs import CONTENT, inputs_of, refused, tree
from tests.support.pictures import tar_bytes, write_tar


@pytest.mark.parametrize(
    "name",
    [
        "00000/dataset.json",
        "00000/metadata.jsonl",
        "00000/Labels.TXT",
        "image_class_labels.txt",
        "train-annotations.parquet",
        "train-00000-of-00001.parquet",
        "train.csv",
        "LOC_val_solution.csv",
        "list_attr_celeba.csv",
        "_annotations.coco.json",
        "instances_train2017.json",
        "ILSVRC2012_validation_ground_truth.txt",
        "val_annotations.txt",
        "trainLabels.csv",
        "imagelabels.mat",
        "labels.npy",
        "test_labels.xlsx",
    ],
)
def test_files_that_seem_to_hold_labels_are_refused(tmp_path: Path, name: str) -> None:
    """The user chooses between the files and the folders."""
    tree(tmp_path / "folders", "x/a.png", "00000/b.png", name)
    message = (
        f"{name}: lies among the images and seems to hold labels; pass --labels FILE with their table, --labels fo"
    )
    refused(message, tmp_path / "folders")
    assert inputs_of(tmp_path / "folders", labels="folders").class_names == ["00000", "x"]
    assert inputs_of(tmp_path / "folders", labels="none").num_classes == 0
    if "/" not in name:
        refused(message, tree(tmp_path / "flat", "a.png", name))
        assert inputs_of(tmp_path / "flat", labels="none").num_classes == 0
        refused("no folder in it holds images, which --labels folders needs", tmp_path / "flat", labels="folders")


@pytest.mark.parametrize("row", ["img/a.png,cat", '"a.JPG"; 3', "cat\ta.webp", "1,0.5,a.jpeg,"])
def test_a_table_of_images_is_taken_for_labels_whatever_its_name(tmp_path: Path, row: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "data.csv").write_text(f"a,b\n{row}\n")
    refused("data.csv: lies among the images and seems to hold labels;", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl", '{"file_name": "a.png", "label": 3}\n'),
        ("data.jsonl", '{"label": 3, "file_name": "a.png"}\n'),
        ("train.txt", "cat/a.png 0\ndog/b.JPEG 1\n"),
        ("val_list.txt", "cat/a.png\tcat"),
    ],
)
def test_lists_of_images_are_taken_for_labels(tmp_path: Path, name: str, text: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / name).write_text(text)
    refused(f"{name}: lies among the images and seems to hold labels;", tmp_path)
    (tmp_path / name).rename(tmp_path / "cat" / name)
    refused(f"{name}: lies among the images", tmp_path)


def test_a_table_may_name_images_without_extension(tmp_path: Path) -> None:
    tree(tmp_path / "flat", "a.png", "b.c.png")
    (tmp_path / "flat" / "breeds.csv").write_text('id,breed\n"a",cat\nb.c , dog\n')
    refused("breeds.csv: lies among the images and seems to hold labels;", tmp_path / "flat")
    # The ids differ from the names.
    (tmp_path / "flat" / "breeds.csv").write_text("number,name\n1,cat\n2,dog\n3,cow\n")
    assert len(find_sources([str(tmp_path / "flat")])) == 2
    tree(tmp_path / "numbered", *(f"{number}.png" for number in range(9)))
    for classes in (2, 100):
        text = "".join(f"{number},cat\n" for number in range(classes))
        (tmp_path / "numbered" / "classes.csv").write_text(text)
        assert len(find_sources([str(tmp_path / "numbered")])) == 9
    table = b"".join(b"%d,cat\n" % number for number in range(1 << 15))
    images = [f"x/{number}.png" for number in range(1 << 15)]
    # The beginning of the table names only few of the images.
    assert holds_labels("ids.csv", lambda most: table[:most], images)
    assert not holds_labels("ids.csv", lambda most: table[: most // 2], images)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.csv", "a.png\nb.png\n"),
        ("data.csv", "class,number\ncat,3\n"),
        ("data.csv", ""),
        ("data.jsonl", '{"file_name": "a.png"}\n{"classes": ["cat", "dog"]}\n'),
        ("train.txt", "cat/a.png\ndog/b.png\n"),
        ("train.txt", ""),
        ("list.txt", "a.png a black cat\nb.png one dog\n"),
        ("n01_boxes.txt", "a.png 0\nb.png 1\n"),
        ("notes.txt", "a.png renamed\n"),
    ],
)
def test_other_tables_are_ignored(tmp_path: Path, name: str, text: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / name).write_text(text)
    assert len(find_sources([str(tmp_path)])) == 2


def test_other_files_next_to_images_are_ignored(tmp_path: Path) -> None:
    names = ("README.csv", "sizes.csv", "trains.csv", "class_names.txt", "info.json", "cat/1.json", "train.txt")
    assert len(find_sources([str(tree(tmp_path, "cat/1.png", "dog/2.png", *names))])) == 2


@pytest.mark.parametrize(
    "splits", [["train", "val"], ["train"], ["Train", "TEST", "extra"], ["train", "unlabeled"], ["testA", "trainA"]]
)
def test_splits_of_a_data_set_are_not_classes(tmp_path: Path, splits: list[str]) -> None:
    tree(tmp_path, *(f"{split}/{label}/a.png" for split in splits for label in ("cat", "dog")))
    refused("would become classes; pass --split (train|Train|TRAIN|TEST|trainA) for one of them; if they are", tmp_path)
    refused("are parts of a data set|is a split", tmp_path, labels="none")
    assert inputs_of(tmp_path, class_names=splits).class_names == splits  # The user names these classes on purpose.
    assert inputs_of(tmp_path / splits[0]).class_names == ["cat", "dog"]
    for split in splits:
        inputs = inputs_of(tmp_path, split=split)
        assert (len(inputs), inputs.class_names) == (2, ["cat", "dog"])
        assert inputs[0].path.startswith(f"{tmp_path}/{split}/")
        assert inputs.notes == [f"{tmp_path}: of {', '.join(sorted_parts(splits))}, only {split} is read"]
    refused("not (dev|test); pass --split", tmp_path, split="dev" if "val" not in splits else "test")


def sorted_parts(splits: list[str]) -> list[str]:
    return sorted(splits, key=lambda name: (name in ("extra", "unlabeled"), name))


def test_splits_may_have_other_names(tmp_path: Path) -> None:
    tree(tmp_path, "training_set/cat/a.png", "valid/cat/b.png", "Testing/cat/c.png")
    for split, folder in (("train", "training_set"), ("val", "valid"), ("validation", "valid"), ("test", "Testing")):
        assert inputs_of(tmp_path, split=split)[0].path.startswith(f"{tmp_path}/{folder}/")
    tree(tmp_path, "train/cat/d.png")
    refused("holds Testing, train, training_set, .* \\(4\\), not training; pass", tmp_path, split="training")
    assert inputs_of(tmp_path, split="train")[0].path == f"{tmp_path}/train/cat/d.png"


def test_splits_may_lie_inside_of_classes(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{label}/{split}/a.png" for label in ("cat", "dog") for split in ("test", "train")))
    refused("each folder in it holds test, train, splits of a data set; pass --split test for one", tmp_path)
    inputs = inputs_of(tmp_path, split="train")
    assert [inputs[row].path for row in range(2)] == [f"{tmp_path}/{label}/train/a.png" for label in ("cat", "dog")]
    assert inputs.class_names == ["cat", "dog"]
    assert len(inputs_of(tmp_path, labels="folders")) == 4
    refused("each folder in it holds test, train", tmp_path, labels="none")  # That would mix the splits.


def test_folders_that_hold_the_same_folders_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{part}/{label}/a.png" for part in ("old", "new") for label in ("cat", "dog")))
    message = (
        r"the folders new, old hold the same folders \(cat, dog\); pass --split new for one of these, or --labels fo"
    )
    refused(message, tmp_path)
    assert inputs_of(tmp_path, split="old").class_names == ["cat", "dog"]
    assert inputs_of(tmp_path, labels="folders").class_names == ["new", "old"]
    assert inputs_of(tmp_path, class_names=["old", "new"]).class_names == ["old", "new"]
    # The folders no longer hold the same ones.
    assert inputs_of(tree(tmp_path, "old/cow/a.png")).class_names == ["new", "old"]
    one = tree(tmp_path / "tiny", "n1/images/a.png", "n2/images/a.png")  # the layout of Tiny ImageNet
    assert inputs_of(one).class_names == ["n1", "n2"]


@pytest.mark.parametrize("parts", [["images", "masks"], ["annotations", "img"], ["SegmentationClass", "imgs"]])
def test_folders_of_images_and_masks_are_not_classes(tmp_path: Path, parts: list[str]) -> None:
    tree(tmp_path, *(f"{part}/a.png" for part in parts))
    refused("are parts of a data set, and would become classes; pass --split im", tmp_path)
    assert inputs_of(tmp_path, split=next(part for part in parts if part.startswith("im"))).num_classes == 0
    tree(tmp_path, "cat/a.png")
    assert len(inputs_of(tmp_path)) == 3
    assert inputs_of(tree(tmp_path / "one", "images/a.png")).class_names == ["images"]


@pytest.mark.parametrize(
    ("images", "others"),
    [("JPEGImages", ["Annotations/a.xml", "ImageSets/Main/train.txt"]), ("images", ["labels/a.txt"])],
)
def test_images_next_to_folders_of_labels_are_not_a_class(tmp_path: Path, images: str, others: list[str]) -> None:
    """These are the layouts of Pascal VOC and YOLO."""
    tree(tmp_path, f"{images}/a.png", *others)
    refused(f": {images} and .* are parts of a data set, .*; pass --split {images} for one", tmp_path)
    assert inputs_of(tmp_path / images).num_classes == 0
    assert inputs_of(tmp_path, split=images).num_classes == 0
    assert inputs_of(tmp_path, class_names=[images]).class_names == [images]
    tree(tmp_path, "cat/a.png")
    assert inputs_of(tmp_path).class_names == sorted([images, "cat"])


def test_a_single_class_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder may contain the real classes."""
    tree(tmp_path, "ILSVRC/Data/cat/a.png", "ILSVRC/Data/dog/b.png")
    assert find_sources([str(tmp_path)]).class_names == ["ILSVRC"]
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}: all images are taken for one class, 'ILSVRC', ")
    assert said.endswith(f"give {tmp_path / 'ILSVRC'}")
    caplog.clear()
    find_sources([str(tmp_path)], FindOptions(["ILSVRC"]))  # The user names this class on purpose.
    find_sources([str(tmp_path / "ILSVRC" / "Data")])
    assert caplog.messages == []


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    tree(tmp_path, "bus/a.png", "train/a.png", "trainer/a.png")
    (tmp_path / "val").mkdir()  # This folder holds no image.
    assert find_sources([str(tmp_path)]).class_names == ["bus", "train", "trainer"]


def test_tars_of_several_splits_are_refused(tmp_path: Path) -> None:
    names = ["in1k-train-0000.tar", "in1k-train-0001.tar", "in1k-validation-00.tar"]
    for name in names:
        write_tar(tmp_path / name, (f"{name[:-4]}.png", CONTENT), (f"{name[:-4]}.cls", b"1"))
    refused(r"several splits \(in1k-train-0000.tar and in1k-validation-00.tar\); pass --split train for one", tmp_path)
    assert len(find_sources([f"{tmp_path}/*train*.tar"])) == len(inputs_of(tmp_path, split="training")) == 2
    assert len(inputs_of(tmp_path, split="val")) == 1
    inner = tar_bytes(("a.JPEG", CONTENT))
    write_tar(tmp_path / "whole", ("train.tar", inner), ("val.tar", inner)).rename(tmp_path / "whole.tar")
    refused("train and val are parts of a data set", tmp_path / "whole.tar")


# Messages


def test_numbers_as_class_names_are_reported(tmp_path: Path) -> None:
    inputs = inputs_of(tree(tmp_path / "whole", *(f"{number}/a.png" for number in range(11))))
    assert inputs.notes == ["the classes are called 0 to 10, and each has that number"]
    assert [inputs[row].label for row in range(11)] == [0, 1, 10, *range(2, 10)]
    (note,) = inputs_of(tree(tmp_path / "gaps", "2/a.png", "10/a.png")).notes
    assert "warning: the names of the classes are numbers, but not 0, 1, 2, ...: class 0 is 2, class 1 is 10" in note
    assert inputs_of(tmp_path / "gaps", class_names=["10", "2"]).notes == []


def test_skipped_folders_and_unsupported_pictures_are_reported(tmp_path: Path) -> None:
    tree(tmp_path, "cat/a.jpg", "cat/b.bmp", "cat/c.BMP", "dog/d.png", "dog/e.tif", "dog/f.txt")
    tree(tmp_path, "cat/.ipynb_checkpoints/a.jpg", ".hidden/a.png", "empty/README")
    inputs = inputs_of(tmp_path)
    assert inputs.class_names == ["cat", "dog"]
    hidden = f"{tmp_path}/.hidden (hidden), {tmp_path}/cat/.ipynb_checkpoints (hidden)"
    assert inputs.notes == [
        "not read: .bmp 2, .tif 1; convert these images to .png to use them",
        f"skipped: {hidden}, {tmp_path}/empty/ (no image)",
    ]
    for number in range(6):
        (tmp_path / f"more{number}").mkdir()
    assert inputs_of(tmp_path).notes[1].endswith("/more1/ (no image) and 4 more")
