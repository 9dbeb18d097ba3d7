"""The statements of a checkpoint are checked against its content, and its files are verified before they are read."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jitscale
from jitscale.checkpoints import format as layout
from jitscale.checkpoints.format import (
    MARKER,
    Checkpoint,
    Progress,
    complete_checkpoints,
    latest_checkpoint,
    step_folder,
    whole_fragments,
)
from jitscale.checkpoints.opening import open_weights, read_guide
from jitscale.checkpoints.saving import prune, snapshot_folder, write_folder
from jitscale.checkpoints.weights import shapes_of
from jitscale.config import Config, EvaluationConfig, ModelConfig, RunConfig
from jitscale.errors import CheckpointError, StorageError
from jitscale.files import sha256_of

TINY = ModelConfig(
    image_size=16,
    patch_size=8,
    hidden_size=16,
    depth=1,
    num_heads=1,
    bottleneck_dim=4,
    in_context_start=0,
    num_classes=3,
)
CONFIG = Config(model=TINY, evaluation=EvaluationConfig(weights="model"), run=RunConfig(max_steps=9))


def write(folder: Path, step: int) -> Path:
    """Write a checkpoint of a whole network; step 1 has 8 images."""
    fragments = whole_fragments(shapes_of(CONFIG))
    flats = [torch.full((f.length,), 0.5) for f in fragments]
    return write_folder(folder, Progress(step, 8 * step, step, {"seed": 0}), CONFIG, fragments, {"model": flats})


def rewrite(folder: Path, change: Callable[[Any], object], name: str = "index.json") -> None:
    """Change index.json and update COMPLETE accordingly, as an attacker could."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    if name != MARKER:
        rewrite(folder, lambda hashes: hashes.update({name: sha256_of(folder / name)}), MARKER)


def flip(file: Path) -> None:
    """Flip one bit of the last weight."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FIRST = next(iter(shapes_of(CONFIG)))


def set_fragments(*fragments: Any) -> Callable[[Any], object]:
    return lambda index: index["parameters"][FIRST].update(fragments=list(fragments))


def rename_file(name: str) -> Callable[[Any], object]:
    def change(index: Any) -> None:
        for key in ("files", "sha256"):
            index[key] = {name: next(iter(index[key].values()))}

    return change


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "parent": (rename_file("../other"), "is not a plain file name"),
    "absolute": (rename_file("/dev/zero"), "is not a plain file name"),
    "dots": (rename_file(".."), "is not a plain file name"),
    "absent": (rename_file("rank_7.safetensors"), "is missing"),
    "negative": (set_fragments([0, -1, 4]), "is not a whole number from 0 on"),
    "short": (set_fragments([0, 0, 1]), "the fragments hold 1 of"),
    "long": (set_fragments([0, 0, 10**9]), "the fragments hold 1000000000 of"),
    "overlap": (set_fragments([0, 0, 4], [0, 2, 4]), "overlap at 4"),
    "gap": (set_fragments([0, 0, 4], [0, 6, 4]), "have a gap at 4"),
    "file number": (set_fragments([1, 0, 4]), "a fragment in file 1 of 1"),
    "pair": (set_fragments([0, 0]), "has a fragment"),
    "text": (set_fragments([0, 0, "4"]), "is not a whole number"),
    "shape": (lambda index: index["parameters"][FIRST].update(shape=[2.0, 2]), "the shape of"),
    "huge": (
        lambda index: index["parameters"][FIRST].update(shape=[10**12], fragments=[[0, 0, 10**12]]),
        "larger than its files",
    ),
    "parameters": (lambda index: index.update(parameters=[]), "parameters is not a dict"),
    "sets": (lambda index: index.update(sets="model"), "sets is not a list"),
    "set": (lambda index: index.update(sets=["model", "../x"]), "is not a name of a weight set"),
    "no set": (lambda index: index.update(sets=["exp_avg"]), "its weight sets are exp_avg"),
    "no hashes": (lambda index: index.pop("sha256"), "is not a dict"),
    "no hash": (lambda index: index.update(sha256={}), "its hashes do not match its files"),
    "size": (lambda index: index["files"].update({"rank_00000.safetensors": True}), "is not a whole number"),
    "progress": (lambda index: index["progress"].update(images="8"), "progress.images is not a whole number"),
    "data": (lambda index: index["progress"].update(data={"seed": [0]}), "progress.data.seed is"),
    "more progress": (lambda index: index["progress"].update(other=1), "unexpected keyword argument 'other'"),
    "step": (lambda index: index["progress"].update(step=2), "belongs to step 2, but the folder's name says 1"),
    "format": (lambda index: index.update(format=None), "format is not a whole number"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_contradicts_its_folder_is_damage(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    folder = write(step_folder(tmp_path, 1), 1)
    Checkpoint(folder)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder)
    text = str(error.value)
    assert message in text
    assert text.endswith(f"; the file is damaged, remove {folder} to fall back to the checkpoint before it")
    assert "\n" not in text


def test_a_newer_format_is_not_reported_as_damage(tmp_path: Path) -> None:
    folder = write(step_folder(tmp_path, 1), 1)
    rewrite(folder, lambda index: index.update(format=3))
    with pytest.raises(CheckpointError, match=r"format 3, this version reads format 2; use the version .* wrote it$"):
        Checkpoint(folder)


@pytest.mark.parametrize("marker", ["", "{}", "[]", "[" * 100_000, '{"index.json": 1}', '{"index.json": "00"}', "\0"])
def test_a_marker_without_hashes_is_damage(tmp_path: Path, marker: str) -> None:
    folder = write(step_folder(tmp_path, 1), 1)
    (folder / MARKER).write_text(marker)
    with pytest.raises(CheckpointError, match=r"COMPLETE: .*; the file is damaged, remove"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", [MARKER, "index.json", "config.yaml", "rank_00000.safetensors"])
@pytest.mark.parametrize("target", ["/dev/zero", "elsewhere", "pipe"])
def test_only_regular_files_inside_the_folder_are_read(tmp_path: Path, name: str, target: str) -> None:
    folder = write(step_folder(tmp_path, 1), 1)
    shutil.copyfile(folder / name, tmp_path / "elsewhere")
    (folder / name).unlink()
    if target == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / target)
    reason = "" if target == "pipe" else ": a link; .* copy the folder with cp -rL"
    with pytest.raises(CheckpointError, match=rf"{name}: is not a regular file inside the folder{reason}; the file is"):
        Checkpoint(folder)


def test_a_copy_under_another_step_number_is_ignored(tmp_path: Path) -> None:
    """The copy would be the newest checkpoint: a start would return to step 1, and pruning would remove all others."""
    for step in (1, 2, 3):
        write(step_folder(tmp_path, step), step)
    shutil.copytree(step_folder(tmp_path, 1), step_folder(tmp_path, 9))
    with pytest.raises(CheckpointError, match=r"belongs to step 1, but the folder's name says 9"):
        latest_checkpoint(tmp_path)
    prune(tmp_path, keep_last=2)
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (2, 3, 9)]
    shutil.copytree(step_folder(tmp_path, 2), tmp_path / "best")
    assert Checkpoint(tmp_path / "best").progress.step == 2
    snapshot = write(snapshot_folder(tmp_path, 8), 1)
    assert Checkpoint(snapshot).progress.images == 8
    with pytest.raises(CheckpointError, match=r"belongs to images 8, but the folder's name says 16"):
        Checkpoint(snapshot.rename(snapshot_folder(tmp_path, 16)))


def test_a_damaged_checkpoint_is_not_counted_and_does_not_stop_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(step_folder(tmp_path, step), step)
    (step_folder(tmp_path, 4) / MARKER).write_text("")
    prune(tmp_path, keep_last=1, keep_every_images=100)
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (3, 4)]


def test_failing_storage_of_one_checkpoint_does_not_block_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old index has a bad sector, a marker cannot be read, or a folder cannot be removed."""
    for step in range(1, 7):
        write(step_folder(tmp_path, step), step)
    reads, looks, removes = sha256_of, Path.stat, shutil.rmtree

    def failing(step: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Path, *arguments: Any, **named: Any) -> Any:
            if str(path).startswith(str(step_folder(tmp_path, step))):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return call(path, *arguments, **named)

        return called

    listed = complete_checkpoints(tmp_path)
    monkeypatch.setattr(layout, "complete_checkpoints", lambda run_dir: listed)
    monkeypatch.setattr(layout, "sha256_of", failing(1, reads))
    monkeypatch.setattr(Path, "stat", failing(2, looks))
    monkeypatch.setattr(shutil, "rmtree", failing(3, removes))
    with pytest.raises(OSError, match="step_00000003"):
        prune(tmp_path, keep_last=1)
    monkeypatch.undo()
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (1, 2, 6)]


def test_every_reader_verifies_the_hashes(tmp_path: Path) -> None:
    """A flipped bit changes the weights. No reader may use them."""
    folder = write(step_folder(tmp_path, 1), 1)
    jitscale.load_model(tmp_path)
    flip(folder / "rank_00000.safetensors")
    message = r"rank_00000\.safetensors: its content has changed since it was written"
    for path in (tmp_path, folder):
        with pytest.raises(CheckpointError, match=message):
            jitscale.load_model(path)
        guided = Config(model=TINY, evaluation=EvaluationConfig(guide=str(path)))
        with pytest.raises(CheckpointError, match=message):
            read_guide(guided, None)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder).tensor("model", FIRST)


def test_each_process_hashes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(step_folder(tmp_path, 1), 1)
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(layout, "sha256_of", counting)
    for _ in range(2):
        Checkpoint(folder).network()
    assert hashed.count("rank_00000.safetensors") == 1
    Checkpoint(folder).verify()
    assert hashed.count("rank_00000.safetensors") == 2, "a full verification reads the disk again"
    other = write(step_folder(tmp_path, 2), 2)
    Checkpoint(other).verify(1, 2)
    Checkpoint(other).network()
    assert hashed.count("rank_00000.safetensors") == 2, "rank 0 already hashed the only file"


def test_failing_storage_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message must not advise to remove a sound checkpoint, and the job must be restarted."""
    checkpoint = Checkpoint(write(tmp_path, 1))

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(layout, "sha256_of", fail)
    remedy = f"start again when the storage works; if only this file stays unreadable, remove {checkpoint.path}"
    with pytest.raises(StorageError, match=rf"cannot be read \(Input/output error\); {remedy}") as met:
        checkpoint.verify()
    assert not met.value.is_wrong


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint-last.pth", "folder/weights.safetensors"])
def test_failing_storage_of_weight_files_is_not_reported_as_damage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, number = tmp_path / name, errno.EIO
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"PK")

    def fail(path: Path, *arguments: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", fail)
    given = file if file.parent == tmp_path else file.parent
    with pytest.raises(StorageError, match=rf"{name}: cannot be read \(Input/output error\); start again") as met:
        open_weights(given)
    assert not met.value.is_wrong
    number = errno.EACCES
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_weights(given)
