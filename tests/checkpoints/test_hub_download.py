"""hf://OWNER/NAME with the real huggingface_hub, against a server and a cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jitscale.checkpoints.hub_download import fetched, is_hub_address
from jitscale.checkpoints.opening import open_weights
from jitscale.errors import UserError
from tests.support import ROOT
from tests.support.hub import hub_of
from tests.support.weights import convert, run_of, settings

# Loads all addresses in one process, so that torch is imported only once.
PROGRAM = """
import sys
from LOADER
from jitscale.errors import UserError
for address in sys.argv[1:]:
    try:
        print("ok", *load(address))
    except UserError as error:
        print(type(error).__name__, error)
"""
LOAD = "jitscale import load_model; load = lambda a: [(m := load_model(a)).weights_name, m.config.image_size]"
FETCH = "jitscale.checkpoints.hub_download import fetched; load = lambda a: [fetched(a)]"  # imports no torch


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a diffusers folder, a Hugging Face folder inside it, and code that no reader needs."""
    folder = tmp_path_factory.mktemp("hub")
    run = run_of(folder / "run", settings())
    convert(run, "diffusers", folder / "repository", "--samples", 0)
    convert(run, "safetensors", folder / "repository/exported", "--weights", "model")
    (folder / "repository/pipeline.py").write_text("raise SystemExit('executed')")
    return folder / "repository"


def run(loader: str, cache: Path, *addresses: str, **environment: str) -> list[str]:
    own = {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("LOADER", loader), *addresses],
        env={**os.environ, "PYTHONPATH": str(ROOT), **own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_files_are_fetched_once_and_then_read_without_a_network(repository: Path, tmp_path: Path) -> None:
    got: list[str] = []
    with hub_of(repository, "owner/name", got, ("main", "refs/pr/1")) as endpoint:
        whole, tagged, inside, file, absent, revision, empty = run(
            LOAD,
            tmp_path,
            "hf://owner/name",
            "hf://owner/name@refs%2Fpr%2F1",
            "hf://owner/name/exported",
            "hf:/owner/name/exported/model.safetensors",  # `Path` collapses the two slashes
            "hf://owner/other",
            "hf://owner/name@v9",
            "hf://owner/name/nothing",
            HF_ENDPOINT=endpoint,
        )
    assert [whole, tagged] == ["ok ema_0.9 16"] * 2
    assert [inside, file] == ["ok model 16"] * 2
    assert absent.startswith("CheckpointError hf://owner/other: no such repository, or a private one;")
    assert revision.startswith("CheckpointError hf://owner/name@v9: the repository has no such revision;")
    assert empty.startswith("CheckpointError hf://owner/name: has no nothing with weights;")
    assert len(got) == len(set(got)), "each file is fetched once"
    assert "transformer/diffusion_pytorch_model.safetensors" in got
    assert not any(name.endswith((".py", ".md")) for name in got), "code is not fetched"
    again, unknown = run(FETCH, tmp_path, "hf://owner/name", "hf://owner/unknown", HF_HUB_OFFLINE="1")
    assert open_weights(again.removeprefix("ok ")).weight_sets == ["ema_0.9"]
    assert unknown.startswith("StorageError hf://owner/unknown: not in the local cache, and the hub cannot be reached")


def test_without_huggingface_hub(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ModuleNotFoundError('no', name='huggingface_hub')")
    (line,) = run(FETCH, tmp_path, "hf://owner/name", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert line == "UserError hf://owner/name: needs huggingface_hub; pip install 'jitscale[hub]'"


@pytest.mark.parametrize(
    "address", ["hf://", "hf://owner", "hf://owner/name@", "hf://-/-.-", "hf://o/n@a@b", "hf://o/n/../x"]
)
def test_an_invalid_address_is_a_one_line_error(address: str) -> None:
    assert is_hub_address(address)
    with pytest.raises(UserError, match=r"is not an address|cannot be downloaded") as error:
        fetched(address)
    assert "\n" not in str(error.value)


def test_local_paths_are_not_taken_for_addresses() -> None:
    assert not any(map(is_hub_address, ("runs/hf", "./hf:/x", Path("/hf:/o/n"), "hf.safetensors")))
