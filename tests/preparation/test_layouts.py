"""Labels in files and splits, which are not taken for folders of classes."""

from pathlib import Path

import pytest

from jitscale.data.tar_members import holds_labels
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from tests.preparation.inputs import CONTENT, refused, tree
from tests.support.pictures import tar_bytes, write_tar


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dataset.json", r"\(a StyleGAN or EDM data set, whose folders are no classes\)"),
        ("metadata.csv", r"\(a Hugging Face image folder\)"),
        ("00000/metadata.jsonl", r"\(a Hugging Face image folder\)"),
        ("00000/Labels.TXT", ""),
        ("image_class_labels.txt", ""),
        ("train-annotations.parquet", ""),
        ("train.csv", ""),
        ("LOC_val_solution.csv", ""),
        ("list_attr_celeba.csv", ""),
        ("_annotations.coco.json", ""),
        ("instances_train2017.json", ""),
        ("ILSVRC2012_validation_ground_truth.txt", ""),
        ("val_annotations.txt", ""),
        ("trainLabels.csv", ""),
        ("imagelabels.mat", ""),
        ("labels.npy", ""),
        ("test_labels.xlsx", ""),
    ],
)
def test_files_of_labels_are_not_passed_over(tmp_path: Path, name: str, kind: str) -> None:
    tree(tmp_path / "folders", "00000/a.png", "00001/b.png", name)
    refused(f"{name}: lies among the images and seems to hold labels.*{kind}.*columns path,label", tmp_path / "folders")
    tree(tmp_path / "flat", "a.png", name.rpartition("/")[2])
    refused("seems to hold labels", tmp_path / "flat")


@pytest.mark.parametrize("row", ["img/a.png,cat", '"a.JPG"; 3', "cat\ta.webp", "1,0.5,a.jpeg,"])
def test_a_table_of_images_holds_their_labels_whatever_its_name(tmp_path: Path, row: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "data.csv").write_text(f"a,b\n{row}\n")
    refused("data.csv: lies among the images and seems to hold labels, which", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl", '{"file_name": "a.png", "label": 3}\n'),
        ("data.jsonl", '{"label": 3, "file_name": "a.png"}\n'),
        ("train.txt", "cat/a.png 0\ndog/b.JPEG 1\n"),
        ("val_list.txt", "cat/a.png\tcat"),
    ],
)
def test_lists_of_images_hold_their_labels(tmp_path: Path, name: str, text: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / name).write_text(text)
    refused(f"{name}: lies among the images and seems to hold labels, which", tmp_path)
    (tmp_path / name).rename(tmp_path / "cat" / name)
    refused(f"{name}: lies among the images", tmp_path)


def test_a_table_may_name_images_without_extension(tmp_path: Path) -> None:
    tree(tmp_path / "flat", "a.png", "b.c.png")
    (tmp_path / "flat" / "breeds.csv").write_text('id,breed\n"a",cat\nb.c , dog\n')
    refused("breeds.csv: lies among the images and seems to hold labels, which", tmp_path / "flat")
    (tmp_path / "flat" / "breeds.csv").write_text("number,name\n1,cat\n2,dog\n3,cow\n")  # other ids
    assert len(find_sources([str(tmp_path / "flat")])) == 2
    tree(tmp_path / "numbered", *(f"{number}.png" for number in range(9)))
    for classes in (2, 100):
        text = "".join(f"{number},cat\n" for number in range(classes))
        (tmp_path / "numbered" / "classes.csv").write_text(text)
        assert len(find_sources([str(tmp_path / "numbered")])) == 9
    table = b"".join(b"%d,cat\n" % number for number in range(1 << 15))
    images = [f"x/{number}.png" for number in range(1 << 15)]
    assert holds_labels("ids.csv", lambda most: table[:most], images)  # though few of them are in its beginning
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
def test_other_tables_are_passed_over(tmp_path: Path, name: str, text: str) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / name).write_text(text)
    assert len(find_sources([str(tmp_path)])) == 2


def test_other_files_beside_images_are_passed_over(tmp_path: Path) -> None:
    names = ("README.csv", "sizes.csv", "trains.csv", "class_names.txt", "info.json", "cat/1.json", "train.txt")
    assert len(find_sources([str(tree(tmp_path, "cat/1.png", "dog/2.png", *names))])) == 2


@pytest.mark.parametrize(
    "splits", [["train", "val"], ["train"], ["Train", "TEST", "extra"], ["train", "unlabeled"], ["testA", "trainA"]]
)
def test_splits_of_a_data_set_are_no_classes(tmp_path: Path, splits: list[str]) -> None:
    tree(tmp_path, *(f"{split}/{label}/a.png" for split in splits for label in ("cat", "dog")))
    refused(f"would become classes; give one of them, such as {tmp_path}/(train|Train|TEST|testA)", tmp_path)
    assert find_sources([str(tmp_path)], FindOptions(splits)).class_names == splits  # on purpose
    assert find_sources([str(tmp_path / splits[0])]).class_names == ["cat", "dog"]


@pytest.mark.parametrize("parts", [["images", "masks"], ["annotations", "img"], ["SegmentationClass", "imgs"]])
def test_images_beside_masks_are_no_classes(tmp_path: Path, parts: list[str]) -> None:
    tree(tmp_path, *(f"{part}/a.png" for part in parts))
    refused(f"are parts of a data set, and would become classes; give one of them, such as {tmp_path}/im", tmp_path)
    tree(tmp_path, "cat/a.png")
    assert len(find_sources([str(tmp_path)])) == 3
    assert find_sources([str(tree(tmp_path / "one", "images/a.png"))]).class_names == ["images"]


@pytest.mark.parametrize(
    ("images", "others"),
    [("JPEGImages", ["Annotations/a.xml", "ImageSets/Main/train.txt"]), ("images", ["labels/a.txt"])],
)
def test_images_beside_folders_of_labels_are_no_class(tmp_path: Path, images: str, others: list[str]) -> None:
    """As of Pascal VOC and YOLO."""
    tree(tmp_path, f"{images}/a.png", *others)
    refused(f": {images} and .* are parts of a data set, .* such as {tmp_path}/{images};", tmp_path)
    assert find_sources([str(tmp_path / images)]).num_classes == 0
    assert find_sources([str(tmp_path)], FindOptions([images])).class_names == [images]
    tree(tmp_path, "cat/a.png")
    assert find_sources([str(tmp_path)]).class_names == sorted([images, "cat"])


def test_one_class_alone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be a folder around the classes."""
    tree(tmp_path, "ILSVRC/Data/cat/a.png", "ILSVRC/Data/dog/b.png")
    assert find_sources([str(tmp_path)]).class_names == ["ILSVRC"]
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}: all images are taken for one class, 'ILSVRC', ")
    assert said.endswith(f"give {tmp_path / 'ILSVRC'}")
    caplog.clear()
    find_sources([str(tmp_path)], FindOptions(["ILSVRC"]))  # on purpose
    find_sources([str(tmp_path / "ILSVRC" / "Data")])
    assert caplog.messages == []


def test_classes_that_are_called_like_a_split(tmp_path: Path) -> None:
    tree(tmp_path, "bus/a.png", "train/a.png", "trainer/a.png")
    (tmp_path / "val").mkdir()  # without an image
    assert find_sources([str(tmp_path)]).class_names == ["bus", "train", "trainer"]


def test_tars_of_several_splits(tmp_path: Path) -> None:
    names = ["in1k-train-0000.tar", "in1k-train-0001.tar", "in1k-validation-00.tar"]
    for name in names:
        write_tar(tmp_path / name, (f"{name[:-4]}.png", CONTENT), (f"{name[:-4]}.cls", b"1"))
    splits = r"several splits \(in1k-train-0000.tar and in1k-validation-00.tar\); give those of one, for example '"
    refused(splits + f"{tmp_path}/", tmp_path)
    assert len(find_sources([f"{tmp_path}/*train*.tar"])) == 2
    inner = tar_bytes(("a.JPEG", CONTENT))
    write_tar(tmp_path / "whole", ("train.tar", inner), ("val.tar", inner)).rename(tmp_path / "whole.tar")
    refused("train and val are parts of a data set", tmp_path / "whole.tar")
