"""ImageNet-32 and 64 and other .npz files, and CIFAR's binary version."""

import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from jitscale.data.images import ImageError, decode
from jitscale.preparation.array_rows import ArrayRows
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import Storage
from tests.preparation.imagenet_files import SORTED, WNIDS, write_devkit
from tests.preparation.inputs import inputs_of
from tests.preparation.packing_jobs import images_and_labels, packed, refused_input
from tests.support.pictures import noise

COUNT, SIZE = 9, 16
IMAGES = np.stack([noise(number, SIZE, SIZE) for number in range(COUNT)])
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(COUNT, -1)
IDS = np.array([1, 2, 3, 4, 4, 3, 2, 1, 2])
LABELS = [SORTED.index(WNIDS[number - 1]) for number in IDS]

Save = Callable[..., None]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_devkit(tmp_path / "devkit").parent / "map_clsloc.txt")


@pytest.mark.parametrize(("save", "storage"), [(np.savez, Storage.PLANES), (np.savez_compressed, Storage.ARRAY)])
def test_imagenet_32_with_the_devkits_table(tmp_path: Path, table: str, save: Save, storage: Storage) -> None:
    folder = tmp_path / "npz"
    folder.mkdir()
    mean = PLANES.mean(axis=0)
    save(folder / "train_data_batch_1.npz", data=PLANES[:5], labels=IDS[:5], mean=mean)
    save(folder / "train_data_batch_2.npz", data=PLANES[5:], labels=IDS[5:], mean=mean)
    options = ("--ground-truth", table, "--samples-per-shard", "4")
    assert packed(folder, tmp_path / "out", *options).class_names == SORTED
    pixels, labels = images_and_labels(tmp_path / "out")
    np.testing.assert_array_equal(pixels, IMAGES)
    assert labels == LABELS
    found = find_sources([str(folder)], FindOptions(ground_truth=table))
    assert {found[number].storage for number in range(COUNT)} == {storage}
    # The images of one compressed file follow each other, so it is inflated only once.
    in_turn = [0, 1, 2, 3, 4], [5, 6, 7, 8]
    orders = ([*in_turn[0], *in_turn[1]], [*in_turn[1], *in_turn[0]])
    assert (found.order(0).tolist() in orders) is (storage == Storage.ARRAY)


def test_imagenet_32_without_the_table_is_refused(tmp_path: Path, table: str) -> None:
    path = tmp_path / "val_data.npz"
    np.savez(path, data=PLANES, labels=IDS)
    line = refused_input("--input", path)
    assert (
        f"{path}: labels are 1 to 4; in ImageNet-32 and 64 these are the devkit's IDs, 1 to 1000, which are not in"
        in line
    )
    assert "pass --ground-truth map_clsloc.txt, or --labels none" in line
    assert find_sources([str(path)], FindOptions(labels="none")).num_classes == 0
    np.savez(path, data=PLANES, labels=IDS + 1)
    assert "has the label 5, but" in refused_input("--input", path, "--ground-truth", table)


def test_an_older_set_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "val.npz", data=PLANES)
    assert "holds no labels, like the older ImageNet-32" in refused_input("--input", tmp_path / "val.npz")
    packed(tmp_path / "val.npz", tmp_path / "out", "--labels", "none")
    pixels, labels = images_and_labels(tmp_path / "out")
    np.testing.assert_array_equal(pixels, IMAGES)
    assert labels == [None] * COUNT


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_stack_of_images_has_labels_from_0(tmp_path: Path, save: Save) -> None:
    wide = np.stack([noise(number, 16, 24) for number in range(5)])
    save(tmp_path / "own.npz", data=wide, labels=np.arange(1, 6))
    found = find_sources([str(tmp_path / "own.npz")])
    assert (found.table["label"].tolist(), found.num_classes) == ([1, 2, 3, 4, 5], 6)
    reader = SourceReader("/")
    for number in range(5):
        np.testing.assert_array_equal(decode(*reader.read(found[number])), wide[number])


def test_the_split_of_arrays_must_be_named(tmp_path: Path, table: str) -> None:
    (folder := tmp_path / "npz").mkdir()
    np.savez(folder / "train_data_batch_1.npz", data=PLANES, labels=IDS)
    np.savez(folder / "val_data.npz", data=PLANES[:2], labels=IDS[:2])
    assert "holds files of the splits train and val; pass --split train" in refused_input("--input", folder)
    assert "train and val, not test; pass" in refused_input("--input", folder, "--split", "test")
    found = find_sources([str(folder)], FindOptions(split="val", ground_truth=table))
    assert found.table["label"].tolist() == LABELS[:2]


def test_rows_are_read_in_any_order_and_never_beyond_the_end(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", data=PLANES)
    rows, order = ArrayRows(str(tmp_path / "a.npz")), list(range(COUNT)) * 2
    random.Random(0).shuffle(order)
    for row in order:
        np.testing.assert_array_equal(rows.image(row), IMAGES[row])
    with pytest.raises(ImageError, match=f"ends after 0 of {PLANES.shape[1]} bytes"):
        rows.image(COUNT)


def test_a_compressed_array_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    stack = np.arange(8192, dtype=np.uint8)[:, None].repeat(3072, axis=1)  # The stack has 25 MB.
    np.savez_compressed(tmp_path / "a.npz", data=stack)
    tracemalloc.start()
    try:
        rows = ArrayRows(str(tmp_path / "a.npz"))
        assert [int(rows.image(row)[0, 0, 0]) for row in (5, 300, 8191)] == [5, 44, 255]
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PLANES}, "holds x.npy, no data.npy; write data as uint8"),
        ({"data": PLANES.astype(np.float32), "labels": IDS}, "data is float32 (9, 768); write data as uint8"),
        ({"data": PLANES[:, :-1], "labels": IDS}, "data is uint8 (9, 767)"),
        ({"data": np.asfortranarray(PLANES), "labels": IDS}, "data is uint8 (9, 768) in column order"),
        ({"data": PLANES, "labels": IDS[1:]}, "labels are int64 (8,) for 9 images"),
        ({"data": PLANES, "labels": IDS / 1}, "labels are float64 (9,) for 9 images"),
        ({"data": PLANES, "labels": IDS - 2}, "has the label -1; write labels from 0"),
        ({"data": PLANES, "labels": IDS.astype(object)}, "cannot be read as arrays (Object arrays cannot be loaded"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, npt.NDArray[np.uint8]], message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, allow_pickle=True, **arrays)
    assert f"{path}: {message}" in refused_input("--input", path)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, data=PLANES, labels=IDS - 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    assert f"{path}: cannot be read as arrays (File is not a zip file)" in refused_input("--input", path)
    path.write_bytes(whole[:3000] + bytes(1000) + whole[4000:])
    manifest = packed(path, tmp_path / "out")
    reasons = {bad.source: bad.reason for bad in manifest.bad}
    assert 0 < len(reasons) < COUNT
    assert all(f"{path}: row " in source for source in reasons)


# CIFAR


def write_cifar(folder: Path, name: str, label_bytes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Write a batch of records with these label bytes (records, kinds); returns the images."""
    folder.mkdir(exist_ok=True)
    images = np.stack([noise(number + len(name), 32, 32) for number in range(len(label_bytes))])
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    (folder / name).write_bytes(np.concatenate([label_bytes, planes], axis=1).tobytes())
    return images


TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_cifar_10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    labels = np.array([[3], [9], [0], [1]], np.uint8)
    images = [write_cifar(folder, f"data_batch_{number}.bin", labels) for number in (1, 2)]
    test = write_cifar(folder, "test_batch.bin", labels[::-1])
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    (folder / "readme.html").write_text("<html>")
    assert "holds files of the splits test and train; pass --split test" in refused_input("--input", folder)
    manifest = packed(folder, tmp_path / "out", "--split", "train", "--resolution", "32")
    assert (manifest.class_names, manifest.total) == (TEN, 8)
    pixels, found = images_and_labels(tmp_path / "out")
    np.testing.assert_array_equal(pixels, np.concatenate(images))
    assert found == [3, 9, 0, 1] * 2
    packed(folder / "test_batch.bin", tmp_path / "test", "--resolution", "32")
    pixels, found = images_and_labels(tmp_path / "test")
    np.testing.assert_array_equal(pixels, test)
    assert found == [1, 0, 9, 3]
    assert "--label-column fine does not apply" in refused_input(
        "--input", folder / "test_batch.bin", "--label-column", "fine"
    )
    in_order = inputs_of(folder, split="train", class_names=TEN[::-1])  # A class keeps its name, but not its number.
    assert in_order.table["label"].tolist() == [6, 0, 9, 8] * 2
    (folder / "batches.meta.txt").write_text("airplane\n")
    assert "batches.meta.txt: names 1 classes, not 10" in refused_input("--input", folder / "test_batch.bin")


def test_cifar_100_with_either_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    images = write_cifar(folder, "train.bin", np.array([[19, 99], [4, 0], [0, 51]], np.uint8))
    (folder / "fine_label_names.txt").write_text("".join(f"fine{number}\n" for number in range(100)))
    found = {column: find_sources([str(folder)], FindOptions(label_column=column)) for column in ("fine", "coarse")}
    assert found["fine"].table["label"].tolist() == [99, 0, 51]
    assert (found["fine"].class_names or [])[51] == "fine51"
    assert found["coarse"].table["label"].tolist() == [19, 4, 0]
    assert found["coarse"].class_names is None
    assert found["coarse"].notes == [f"{folder}: no coarse_label_names.txt here, so classes have no names"]
    default = find_sources([str(folder)])
    assert default.table["label"].tolist() == [99, 0, 51]
    assert default.notes == [
        f"{folder}: CIFAR-100 with its 100 fine labels; --label-column coarse gives the 20 coarse ones"
    ]
    np.testing.assert_array_equal(decode(*SourceReader("/").read(default[1])), images[1])
    assert "has no labels called x; pass --label-column coarse or fine" in refused_input(
        "--input", folder, "--label-column", "x"
    )


def test_a_file_with_the_size_of_cifar_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xc8" * 3073)
    assert "has the size of a batch of CIFAR, but its labels are not" in refused_input(
        "--input", tmp_path / "weights.bin"
    )


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "opened"),)

    (tmp_path / "cifar-10-batches-py").mkdir()
    for path in (tmp_path / "cifar-10-batches-py" / "data_batch_1", tmp_path / "train_data_batch_1"):
        path.write_bytes(pickle.dumps(Trap(), 2))
    said = "is a pickle, which can run any code and is never opened; give"
    assert f"{said} CIFAR-10's binary version" in refused_input("--input", tmp_path / "cifar-10-batches-py")
    assert f"{said} the .npz files of ImageNet-32" in refused_input("--input", tmp_path / "train_data_batch_1")
    np.savez(tmp_path / "a.npz", data=PLANES, labels=np.array([Trap()] * COUNT, object))
    assert "Object arrays cannot be loaded" in refused_input("--input", tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Trap(), 2))
    assert "is a file of PyTorch, a pickle, which is never opened" in refused_input("--input", tmp_path / "model.pt")
    assert not (tmp_path / "opened").exists()
