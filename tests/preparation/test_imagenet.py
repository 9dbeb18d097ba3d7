"""ImageNet as users have it: its tars, flat validation images with a separate file of labels, Kaggle's tree."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from jitscale.data.tar_index import NO_LABEL
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from tests.preparation.imagenet_files import (
    IDS,
    LABELS,
    PICTURES,
    SORTED,
    WNIDS,
    validation_images,
    write_devkit,
    write_solution,
    write_validation,
)
from tests.preparation.inputs import CONTENT, tree
from tests.preparation.packing_jobs import alone, images_and_labels, packed, refused_input
from tests.support.pictures import file_bytes, noise, tar_bytes, write_tar


def labels_of(source: Path, **options: str) -> tuple[list[int], list[str] | None]:
    found = find_sources([str(source)], FindOptions(**options))  # type: ignore[arg-type]
    return found.table["label"].tolist(), found.class_names


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_flat_validation_images_with_the_devkits_labels(tmp_path: Path, form: str) -> None:
    source = write_validation(tmp_path / "val")
    if form == "tar":
        source = write_tar(tmp_path / "ILSVRC2012_img_val.tar", *reversed(validation_images()))
    manifest = packed(source, tmp_path / "out", "--ground-truth", str(write_devkit(tmp_path / "devkit")))
    assert (manifest.class_names, manifest.num_classes) == (SORTED, len(WNIDS))
    pixels, labels = images_and_labels(tmp_path / "out")
    order = slice(None, None, -1 if form == "tar" else 1)  # the tar's own order
    np.testing.assert_array_equal(pixels, np.stack(PICTURES[order]))
    assert labels == LABELS[order]


def test_flat_validation_images_in_a_zip_or_a_split(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for name, content in validation_images():
            archive.writestr(name, content)
    write_validation(tmp_path / "tree" / "val")
    truth = str(write_devkit(tmp_path / "devkit"))
    said = "holds 6 images of ImageNet's validation set, whose names do not say the class; pass --ground-truth"
    for source, split in ((tmp_path / "val.zip", []), (tmp_path / "tree", ["--split", "val"])):
        assert said in refused_input("--input", source, *split)
    assert labels_of(tmp_path / "val.zip", ground_truth=truth) == (LABELS, SORTED)
    assert labels_of(tmp_path / "tree", ground_truth=truth, split="val") == (LABELS, SORTED)
    assert set(labels_of(tmp_path / "val.zip", labels="none")[0]) == {NO_LABEL}


def test_classes_have_the_numbers_of_the_training_tar(tmp_path: Path) -> None:
    """So one of them can be trained on and the other one held out."""
    inner = [(f"{wnid}.tar", tar_bytes((f"{wnid}_1.JPEG", CONTENT))) for wnid in WNIDS]
    found = find_sources([str(write_tar(tmp_path / "ILSVRC2012_img_train.tar", *inner))])
    truth = write_devkit(tmp_path / "devkit")
    assert labels_of(write_validation(tmp_path / "val"), ground_truth=str(truth)) == (LABELS, found.class_names)
    assert labels_of(tmp_path / "ILSVRC2012_img_train.tar", labels="none") == ([NO_LABEL] * len(WNIDS), None)
    (note,) = found.notes
    assert note.endswith("a tar of 4 tars, each a class; ImageNet's training set has 1000, "
                         "ILSVRC2012_img_train_t3.tar has 120 (dogs)")  # fmt: skip


def test_a_training_tar_of_all_classes_reports_their_number(tmp_path: Path) -> None:
    inner = tar_bytes(("a.JPEG", CONTENT))
    whole = write_tar(tmp_path / "train.tar", *((f"n{number:08d}.tar", inner) for number in range(1000)))
    assert find_sources([str(whole)]).notes == [f"{whole}: a tar of 1000 tars, each a class"]


@pytest.mark.parametrize("place", ["option", "beside"])
def test_flat_validation_images_with_kaggles_labels(tmp_path: Path, place: str) -> None:
    source = write_validation(tmp_path / "val")
    solution = write_solution(source if place == "beside" else tmp_path)
    options = {} if place == "beside" else {"ground_truth": str(solution)}
    assert labels_of(source, **options) == (LABELS, SORTED)
    finished = alone(source, tmp_path / "out", *(["--ground-truth", str(solution)] if options else []))
    assert f"the classes are those of {solution}, numbered by sorted WNID" in finished.out
    assert "4 classes (0 n01440764, 1 n02100735, 2 n02119789, 3 n03461385)" in finished.out


def test_the_devkits_own_table_of_classes(tmp_path: Path) -> None:
    """meta.mat also lists groups of classes, which have children and larger numbers."""
    text = write_devkit(tmp_path / "devkit", table=False)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [*((number, wnid, "w", "g", 0) for number, wnid in enumerate(WNIDS, start=1)), (5, "n00000001", "w", "g", 2)]
    scipy.io.savemat(text.parent / "meta.mat", {"synsets": np.array(rows, fields)})
    assert labels_of(write_validation(tmp_path / "val"), ground_truth=str(text)) == (LABELS, SORTED)


def test_validation_images_without_their_labels_are_refused(tmp_path: Path) -> None:
    source = write_validation(tmp_path / "val")
    what = "holds 6 images of ImageNet's validation set, whose names do not say the class; pass --ground-truth with "
    assert f"{source}: {what}Kaggle's LOC_val_solution.csv, or the devkit's ILSVRC" in refused_input("--input", source)
    tar = write_tar(tmp_path / "val.tar", *validation_images())
    assert f"{tar}: {what}" in refused_input("--input", tar)
    for place in (source, tar):
        assert labels_of(place, labels="none") == ([-1] * len(IDS), None)
    folder = tree(tmp_path / "test", "ILSVRC2012_test_00000001.JPEG")
    assert "test set, whose labels are not published; pass --labels none" in refused_input("--input", folder)
    assert labels_of(folder, labels="none") == ([-1], None)


def test_files_that_do_not_label_the_images_are_refused(tmp_path: Path) -> None:
    source, folder = write_validation(tmp_path / "val"), tmp_path / "devkit"
    text = write_devkit(folder)

    def said(truth: Path) -> str:
        return refused_input("--input", source, "--ground-truth", truth)

    assert "holds 'n02119789', where ILSVRC2012_validation_ground_truth.txt has" in said(text.parent / "map_clsloc.txt")
    assert "cannot be read" in said(tmp_path / "nowhere.txt")
    text.write_text("3\n9\n")
    assert "line 2: no class has the ID 9; it is in 1..4" in said(text)
    text.write_text("3\n1\n")
    assert f"holds ILSVRC2012_val_00000003, which is none of the 2 images of {text}" in said(text)
    (text.parent / "map_clsloc.txt").write_text("n02119789 1 a\nn01440764 3 b\n")
    assert "its IDs are not 1..2, each with a WNID of its own" in said(text)
    (text.parent / "map_clsloc.txt").unlink()
    assert "need a table of their WNIDs; put map_clsloc.txt (of a later devkit) or meta.mat next to it" in said(text)
    (text.parent / "meta.mat").write_bytes(b"MATLAB")
    assert "meta.mat: cannot be read as the devkit's table of classes" in said(text)
    (tmp_path / "own.csv").write_text("image,label\na,1\n")
    assert "line 2: has no ImageId and PredictionString" in said(tmp_path / "own.csv")


def test_an_image_with_another_name_is_refused(tmp_path: Path) -> None:
    source, solution = write_validation(tmp_path / "val"), write_solution(tmp_path)
    (source / "cover.png").write_bytes(CONTENT)
    line = refused_input("--input", source, "--ground-truth", solution)
    assert f"{source}: cover.png is not called like the other images; move it away" in line


def test_other_labels_next_to_validation_images_are_refused(tmp_path: Path) -> None:
    source = write_validation(tmp_path / "val")
    for name in ("n01440764_1_n01440764", "n01440764_2_n01440764"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{name}.JPEG").write_bytes(CONTENT)
    for folder in (source, tmp_path / "flat"):
        (folder / "labels.csv").write_text("a,b\n")
    write_solution(source)
    assert "labels.csv: lies among the images" in refused_input("--input", tmp_path / "flat")
    assert "labels.csv: lies among the images" in refused_input("--input", source)


def test_the_hubs_older_tars_have_classes_in_file_names(tmp_path: Path) -> None:
    images = [noise(number, 16, 16) for number in range(4)]
    names = [f"{wnid}_{number}_{wnid}.JPEG" for number, wnid in enumerate(WNIDS[:2] * 2)]
    members = [(name, file_bytes(image)) for name, image in zip(names, images, strict=True)]
    (tmp_path / "hub").mkdir()
    write_tar(tmp_path / "hub" / "train_images_0.tar", *members[:2])
    write_tar(tmp_path / "hub" / "train_images_1.tar", *members[2:])
    assert packed(tmp_path / "hub", tmp_path / "out").class_names == sorted(WNIDS[:2])
    pixels, labels = images_and_labels(tmp_path / "out")
    np.testing.assert_array_equal(pixels, np.stack(images))
    assert labels == [1, 0, 1, 0]
    validation = write_tar(tmp_path / "val.tar", (f"ILSVRC2012_val_00000293_{WNIDS[0]}.JPEG", CONTENT))
    assert labels_of(validation) == ([0], WNIDS[:1])
    assert labels_of(validation, labels="none") == ([-1], None)


def kaggle(folder: Path) -> Path:
    data = folder / "ILSVRC" / "Data" / "CLS-LOC"
    write_validation(data / "val")
    for wnid in WNIDS:
        tree(data / "train" / wnid, f"{wnid}_10.JPEG")
    tree(data / "test", "ILSVRC2012_test_00000001.JPEG")
    tree(folder / "ILSVRC" / "Annotations", "a.xml")
    write_solution(folder)
    return folder


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree(tmp_path: Path, below: str) -> None:
    source = kaggle(tmp_path) / below
    assert labels_of(source, split="train") == ([0, 1, 2, 3], SORTED)
    assert labels_of(source, split="val") == (LABELS, SORTED)
    assert "holds the splits test, train, val of ImageNet; pass --split train" in refused_input("--input", source)
    assert "of ImageNet, not dev; pass" in refused_input("--input", source, "--split", "dev")
    assert "--labels none" in refused_input("--input", source, "--split", "test")
    assert labels_of(source, split="test", labels="none") == ([-1], None)


def test_a_split_of_kaggles_tree_alone(tmp_path: Path) -> None:
    data = kaggle(tmp_path) / "ILSVRC" / "Data" / "CLS-LOC"
    assert labels_of(data / "val") == (LABELS, SORTED)
    assert labels_of(data / "train") == ([0, 1, 2, 3], SORTED)


def test_an_option_that_does_not_apply_to_the_data_is_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "cat/a.png", "dog/b.png")
    for option in ("--split", "--label-column", "--ground-truth", "--label-key"):
        line = refused_input("--input", source, option, "x")
        assert f"{source}: {option} x does not apply to this form of data; leave it out" in line
