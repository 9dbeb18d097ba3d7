"""Arrow files of the library `datasets` (`save_to_disk` and its cache), and Arrow files of other programs."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, ipc

from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import Storage
from tests.preparation.packing_jobs import alone, images_and_labels, refused_input
from tests.preparation.row_inputs import NAMES, SIZE, data_set, found, labels_of, pictures, rows, stored
from tests.support.pictures import file_bytes

LABELS = [2, 0, 1, 0, 2, 1, 1]


def saved(folder: Path) -> Path:
    data_set(LABELS).save_to_disk(str(folder), num_shards=2)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_stream(table: pa.Table, path: Path, rows_of_batch: int | None = None) -> Path:
    with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, rows_of_batch)
    return path


def test_a_saved_data_set_is_packed(tmp_path: Path) -> None:
    done = alone(saved(tmp_path / "saved"), tmp_path / "out", "--resolution", str(SIZE), "--samples-per-shard", "3")
    assert "7 images, 3 classes (0 zebra, 1 ant, 2 moth), 3 shards" in done.out, done.err
    images, labels = images_and_labels(tmp_path / "out")
    assert np.array_equal(images, pictures(7))
    assert labels == LABELS


def test_the_files_are_read_in_the_order_of_state_json(tmp_path: Path) -> None:
    source = saved(tmp_path / "saved")
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (1, 0)]
    change(source / "state.json", _data_files=files)
    assert labels_of(source) == [*LABELS[4:], *LABELS[:4]]
    (source / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: is missing, though state.json names it" in refused_input("--input", source)


def test_one_split_of_a_dictionary_must_be_named(tmp_path: Path) -> None:
    source = tmp_path / "saved"
    datasets.DatasetDict(test=data_set([1]), train=data_set(LABELS)).save_to_disk(str(source))
    assert refused_input("--input", source).endswith("saved: holds the splits test, train; pass --split train")
    assert "test, train, not dev; pass" in refused_input("--input", source, "--split", "dev")
    inputs = found(source, split="train")
    assert stored(inputs) == [file_bytes(image) for image in pictures(7)]
    assert inputs.notes == [f"{source}: the split train of test, train"]
    assert labels_of(source / "test") == [1]


def test_older_forms_of_saved_data_sets_are_read(tmp_path: Path) -> None:
    source = saved(tmp_path / "saved")
    change(source / "state.json", _indices_data_files=[{"filename": "indices.arrow"}])
    line = refused_input("--input", source)
    assert "the order of the rows lies in another file (_indices_data_files), which is not read" in line
    change(source / "state.json", _indices_data_files=[], _data_files=[])
    write_stream(rows(2, label=[1, 0]), source / "dataset.arrow")
    assert labels_of(source) == [1, 0]
    assert found(source).class_names == NAMES  # from dataset_info.json
    (source / "state.json").write_text("[]")
    assert "state.json: is no object of JSON; copy the whole folder again" in refused_input("--input", source)


def test_the_cache_of_the_library_is_read(tmp_path: Path) -> None:
    for split, labels in (("train", LABELS), ("test", [1])):
        data_set(labels).to_parquet(tmp_path / f"{split}.parquet")
    names = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    cache = tmp_path / "cache"
    loaded = datasets.load_dataset("parquet", data_files=names, cache_dir=str(cache))
    loaded["train"].filter(lambda row: row["label"] == 0)  # This writes cache-HASH.arrow.
    assert "holds the splits test, train by the names" in refused_input("--input", cache / "parquet")
    inputs = found(cache / "parquet", split="train")
    assert inputs.table["label"].tolist() == LABELS
    assert inputs.class_names == NAMES
    assert stored(inputs) == [file_bytes(image) for image in pictures(7)]
    assert any("ignored: cache-" in note for note in inputs.notes)


@pytest.mark.parametrize("compression", ["uncompressed", "zstd"])
def test_arrow_files_with_a_footer_are_read(tmp_path: Path, compression: str) -> None:
    feather.write_feather(rows(9, label=["b", "a", "c"] * 3), tmp_path / "a.feather", compression, chunksize=4)
    inputs = found(tmp_path / "a.feather")
    assert inputs.class_names == ["a", "b", "c"]
    assert stored(inputs) == [file_bytes(image) for image in pictures(9)]
    assert alone(tmp_path, tmp_path / "out", "--resolution", str(SIZE)).code == 0
    assert images_and_labels(tmp_path / "out")[1] == [1, 0, 2] * 3


def test_rows_stay_neighbours_in_blocks_of_a_stream_and_in_a_whole_file(tmp_path: Path) -> None:
    table = rows(2500, label=[0] * 2500)
    stream = found(write_stream(table, tmp_path / "a.arrow", 30))
    order = stream.order(seed=1)
    starts = order[::100]
    assert np.array_equal(order, (starts[:, None] + np.arange(100)).ravel())
    assert sorted(starts) == list(range(0, 2500, 100)) != starts.tolist()
    assert stream[0].storage == Storage.ARROW
    assert stream.notes == []
    feather.write_feather(table, tmp_path / "a.feather", chunksize=30)
    file = found(tmp_path / "a.feather")
    assert file.order(seed=1).tolist() == list(range(2500))
    assert "many rows stay in their order, because that costs least to read; if they are sorted" in file.notes[0]
    contents = [file_bytes(image) for image in pictures(2500)]
    reader = SourceReader("/")
    for inputs in (stream, file):
        for number in order[:300]:
            assert reader.read(inputs[int(number)])[0] == contents[number]


def test_damaged_streams_are_refused(tmp_path: Path) -> None:
    whole = write_stream(rows(30, label=[0] * 30), tmp_path / "a.arrow", 5).read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:-8])
    assert "a.arrow: ends without the end of an Arrow stream; copy or write" in refused_input("--input", tmp_path)
    (tmp_path / "a.arrow").write_bytes(whole[:-5000] + whole[-8:])
    assert "a.arrow: is damaged, or pyarrow cannot read it" in refused_input("--input", tmp_path)
