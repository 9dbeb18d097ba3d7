"""One weight set in several files, as transformers and diffusers split it.

It is read, or a message names the bad key or file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jitscale.checkpoints.opening import open_weights
from jitscale.errors import CheckpointError
from tests.support.weights import convert, run_of, settings

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
FIRST, LAST = "blocks.0.adaLN_modulation.1.bias", "y_embedder.embedding_table.weight"


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    stored = open_weights(run_of(tmp_path / "run", settings()))
    return {name: stored.tensor("model", name) for name in sorted(stored.shapes)}


@pytest.fixture
def folder(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """Two files with half of the tensors each, and an index."""
    (folder := tmp_path / "split").mkdir()
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, half in zip(PARTS, halves, strict=True):
        save_file({f"module.{name}": tensors[name] for name in half}, folder / file)
    weight_map = {f"module.{name}": file for file, half in zip(PARTS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_split_weights_are_read_and_converted(folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stored = open_weights(folder, settings())
    assert stored.weight_sets == ["model"]
    assert stored.network().state_dict().keys() == tensors.keys()
    again = open_weights(convert(folder, "safetensors", tmp_path / "one", "--config", _config(tmp_path)))
    for name, tensor in tensors.items():
        assert torch.equal(stored.tensor("model", name), tensor)
        assert torch.equal(again.tensor("model", name), tensor)


def _config(folder: Path) -> Path:
    return next((folder / "run/checkpoints").glob("*")) / "config.yaml"


def _mapped(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content: dict[str, Any] = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def _with(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file)

    return edit


def _twins(folder: Path) -> None:
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{PARTS[0]}", "a": "{PARTS[1]}"}}}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / PARTS[1]).unlink(), rf"{INDEX}: names {PARTS[1]}, which is missing"),
        (lambda folder: (folder / INDEX).unlink(), rf"{PARTS[0]}: is one part of several, but no index"),
        (lambda folder: (folder / INDEX).write_text("{}"), "is not an index of safetensors.*weight_map' is missing"),
        (lambda folder: (folder / INDEX).write_text("[" * 100_000), "is not an index of safetensors files"),
        (lambda folder: (folder / PARTS[0]).write_bytes(b"x"), rf"{PARTS[0]}: not a readable safetensors file"),
        (_twins, "'a' appears twice"),
        (
            _mapped(lambda names: names.update({"extra": PARTS[0]})),
            rf"says that extra is in {PARTS[0]}, but it is in no file",
        ),
        (_mapped(lambda names: names.pop(f"module.{FIRST}")), rf"{FIRST} is in no file, but it is in {PARTS[0]}"),
        (_mapped(lambda names: names.update({f"module.{FIRST}": PARTS[1]})), rf"{PARTS[1]}, but it is in {PARTS[0]}"),
        (_mapped(lambda names: names.update({"a": "../a.safetensors"})), r"a is in '\.\./a\.safetensors', which is no"),
        (_mapped(lambda names: names.update({"a": "code.py"})), r"in 'code\.py', which is not a \.safetensors file"),
        (
            _with(PARTS[1], lambda held: held.update({f"module.{FIRST}": torch.zeros(3)})),
            rf"module\.{FIRST} is in {PARTS[0]} and in {PARTS[1]}",
        ),
        (
            _with(PARTS[1], lambda held: held.pop(f"module.{LAST}")),
            rf"module\.{LAST} is in {PARTS[1]}, but it is in no file",
        ),
        (
            lambda folder: save_file({"a": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors"),
            r"model-00003-of-00003\.safetensors: is one part of several",
        ),
        (
            lambda folder: (folder / "other.safetensors.index.json").write_bytes((folder / INDEX).read_bytes()),
            rf"{PARTS[0]} belongs to two indexes",
        ),
    ],
)
def test_files_that_contradict_the_index_are_a_one_line_error(
    damage: Callable[[Path], object], message: str, folder: Path, tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(folder, settings())
    assert "\n" not in str(error.value)
