"""tools/new_config.py makes a configuration that trains from shards, or gives a one-line error."""

from pathlib import Path

import numpy as np
import pytest

from jitscale.config import Config, load_config
from jitscale.data.manifest import MANIFEST, Manifest
from jitscale.preparation.array_shards import write_shards
from tests.support.tools import run_tool

COUNT = 250


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "shards"
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
    write_shards(images, np.arange(COUNT) % 3, folder, class_names=["ant", "bee", "cat"])
    return folder


def made(shards: Path, output: Path, *options: object) -> Config:
    done = run_tool("new_config", "--shards", shards, "--output", output, *options)
    assert done.code == 0, done.err
    return load_config(output, needs_shards=True, world_size=8)


def test_a_configuration_from_the_manifest(shards: Path, tmp_path: Path) -> None:
    done = run_tool("new_config", "--shards", shards, "--output", tmp_path / "insects.yaml", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"{tmp_path}/insects.yaml: 250 pictures of 32 px; a network 128 wide, 6 blocks",
        "start it with:",
        f"  python -m jitscale.train --config {tmp_path}/insects.yaml",
    ]
    config = load_config(tmp_path / "insects.yaml", needs_shards=True)
    assert (config.model.num_classes, config.model.image_size, config.run.dir) == (3, 32, "runs/insects")
    assert config.data.shards == str(shards)
    refused = run_tool("new_config", "--shards", shards, "--output", tmp_path / "insects.yaml")
    assert refused.code == 2
    assert "insects.yaml: exists already; remove it or choose another --output" in refused.err


def test_grey_shards_get_a_grey_network(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 1), np.uint8)
    write_shards(images, np.arange(COUNT) % 3, tmp_path / "grey")
    config = made(tmp_path / "grey", tmp_path / "grey.yaml", "--device", "cpu")
    assert config.model.in_channels == 1


def test_for_another_machine_with_gpus(shards: Path, tmp_path: Path) -> None:
    options = ("--device", "cuda", "--gpus", 8, "--gpu-memory", "80GB", "--size", "medium")
    config = made(shards, tmp_path / "cluster.yaml", *options)
    assert (config.run.device, config.model.hidden_size, config.data.batch_size) == ("cuda", 384, 256)
    assert config.engine.micro_batch_size == 32


def test_pictures_of_their_own_sizes(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for file in shards.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    manifest = Manifest.read(shards / MANIFEST)
    Manifest("original", None, 3, manifest.class_names, COUNT, manifest.shards).write(tmp_path / "own" / MANIFEST)
    assert made(tmp_path / "own", tmp_path / "16.yaml", "--resolution", 16).model.patch_size == 2
    refused = run_tool("new_config", "--shards", tmp_path / "own", "--output", tmp_path / "none.yaml")
    assert "own: its pictures have mixed sizes; give --resolution, for example 256" in refused.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resolution", "64"], "--resolution"),
        (["--device", "cpu", "--gpus", "2"], "--gpus: there is no GPU here, or --device cpu; give --device cuda"),
        (["--size", "b", "--device", "cuda", "--gpu-memory", "1GB"], "does not fit in 1 GB; give a smaller --size"),
        (["--output", "own.txt"], "--output own.txt: must be called .yaml"),
    ],
)
def test_a_mistake_is_a_one_line_error_and_writes_nothing(
    options: list[str], said: str, shards: Path, tmp_path: Path
) -> None:
    refused = run_tool("new_config", "--shards", shards, "--output", tmp_path / "own.yaml", *options)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert said in refused.err
    assert not list(tmp_path.iterdir())


def test_the_file_is_read_as_a_run_reads_it_before_it_is_written(shards: Path, tmp_path: Path) -> None:
    """A run would evaluate this name as an interpolation, and find nothing there."""
    (tmp_path / "odd${model.depth}").symlink_to(shards)
    options = ("--output", tmp_path / "own.yaml", "--device", "cpu")
    refused = run_tool("new_config", "--shards", tmp_path / "odd${model.depth}", *options)
    assert refused.code == 2
    assert refused.err.endswith("odd6: missing (1 of 1 shards are); copy it again or correct data.shards\n")
    assert not (tmp_path / "own.yaml").exists()


def test_shards_without_facts_about_their_images_are_refused(shards: Path, tmp_path: Path) -> None:
    for file in shards.glob("*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    refused = run_tool("new_config", "--shards", tmp_path, "--output", tmp_path / "own.yaml")
    assert f"write one with: python tools/index_shards.py {tmp_path}" in refused.err
    refused = run_tool("new_config", "--shards", tmp_path / "none", "--output", tmp_path / "own.yaml")
    assert refused.code == 2
    assert refused.err.endswith("none: missing (1 of 1 shards are); copy it again or correct --shards\n")
