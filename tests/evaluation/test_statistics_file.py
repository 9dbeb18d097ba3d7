"""Statistics from other programs: valid files are read unchanged, invalid ones are refused in one line."""

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitscale.config import EvaluationConfig
from jitscale.errors import DataError, UserError
from jitscale.evaluation.networks import NetworkFile, find_network
from jitscale.evaluation.statistics_file import is_statistics, read_statistics
from tests.support import ROOT
from tools import make_reference

F = 64  # the number of features of the digits network
FEATURES = np.random.default_rng(0).standard_normal((200, F)) * np.logspace(0, -3, F)
MU, SIGMA = FEATURES.mean(axis=0), np.cov(FEATURES.T)


@pytest.fixture(scope="module")
def digits() -> list[NetworkFile]:
    return [find_network("digits", EvaluationConfig())]


def with_entry(row: int, column: int, value: float) -> np.ndarray:
    changed = SIGMA.copy()
    changed[row, column] = value
    return changed


def test_files_of_other_programs_are_read(tmp_path: Path, digits: list[NetworkFile]) -> None:
    """Files of pytorch-fid, and of ADM with images and spatial statistics.

    They may be float32, or have fewer images than features.
    """
    few = np.cov(FEATURES[:20].T)
    for name, arrays in (
        ("plain.npz", {"mu": MU, "sigma": SIGMA}),
        ("adm.npz", {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": few}),
        ("single.npz", {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float32)}),
        ("few.npz", {"mu": MU, "sigma": few.astype(np.float32)}),
        ("same_image.npz", {"mu": MU, "sigma": np.zeros((F, F))}),
    ):
        np.savez(tmp_path / name, **arrays)
        found = read_statistics(str(tmp_path / name), digits)
        assert list(found.statistics) == ["features"]
        mean, covariance = found.statistics["features"]
        assert (mean.dtype, covariance.dtype) == (np.float64, np.float64)
        np.testing.assert_array_equal(mean, arrays["mu"].astype(np.float64))
        np.testing.assert_array_equal(covariance, arrays["sigma"].astype(np.float64))
        assert found.facts["source"] == name
    (tmp_path / "plain.npz").rename(tmp_path / "imagenet_stats")
    assert is_statistics(str(tmp_path / "imagenet_stats")), "the content of the file decides"
    assert read_statistics(str(tmp_path / "imagenet_stats"), digits).statistics


@pytest.mark.parametrize(("said", "channels"), [({}, 3), ({"channels": 1}, 1)])
def test_our_files_must_have_the_channels_of_the_network(
    tmp_path: Path, digits: list[NetworkFile], said: dict[str, int], channels: int
) -> None:
    """A file of ours that states no channels has three. A file of others fits networks of either number."""
    facts = json.dumps({"manifest": "0" * 64, **said})
    for name, more in (("ours.npz", {"facts": np.array(facts)}), ("theirs.npz", {})):
        np.savez(tmp_path / name, mu=MU, sigma=SIGMA, **more)
        assert read_statistics(str(tmp_path / name), digits, channels).statistics
    assert read_statistics(str(tmp_path / "theirs.npz"), digits, 4 - channels).statistics
    refused = rf"npz: made from images with {channels} channels, but model.in_channels={4 - channels}; make it again"
    with pytest.raises(DataError, match=refused):
        read_statistics(str(tmp_path / "ours.npz"), digits, 4 - channels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.where(np.arange(F) == 3, np.nan, MU)}, r"mu has 1 of 64 values that are not finite"),
        ({"sigma": with_entry(2, 2, np.inf)}, r"sigma has 1 of 4096 values that are not finite"),
        ({"sigma": with_entry(0, 1, 0.5)}, r"sigma is not symmetric \(entries differ by up to 0\.\d+"),
        ({"sigma": SIGMA - 0.01 * np.eye(F)}, r"sigma has negative eigenvalues \(the least is -0\.01"),
        ({"sigma": -SIGMA}, r"sigma has negative eigenvalues"),
        ({"sigma": SIGMA.astype(complex)}, "sigma holds complex128, not real numbers"),
        ({"mu": MU.astype(str)}, "mu holds <U32, not real numbers"),
        ({"mu": MU[None]}, r"shapes \(1, 64\) and \(64, 64\), the network digits has 64 features"),
        ({"sigma": SIGMA.diagonal()}, r"shapes \(64,\) and \(64,\), the network digits has 64"),
        ({"mu": np.array(1.0)}, r"shapes \(\) and \(64, 64\)"),
        ({"mu": np.array([{}], object)}, "Object arrays cannot be loaded"),
        ({"facts": np.array("{")}, "no statistics of features"),
        ({"facts": np.array("[1]")}, "no statistics of features"),
        ({"facts": np.array(json.dumps({"floors": {"features": "low"}}))}, "could not convert string to float"),
        ({"facts": np.array(json.dumps({"floors": {"features": float("nan")}}))}, "not finite"),
        (
            {"facts": np.array(json.dumps({"features": ["inception"]}))},
            "made with features=.*evaluation.features=digits",
        ),
    ],
)
def test_invalid_statistics_are_refused(
    tmp_path: Path, digits: list[NetworkFile], arrays: dict[str, Any], message: str
) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, **{"mu": MU, "sigma": SIGMA, **arrays})
    with pytest.raises(DataError, match=message) as caught:
        read_statistics(str(path), digits)
    assert str(caught.value).startswith(f"evaluation.reference={path}: ")
    assert "\n" not in str(caught.value)


def saved(path: Path) -> None:
    np.save(path.with_suffix(".npy"), MU)
    path.with_suffix(".npy").rename(path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}))


def archived(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("00000/img00000000.png", b"")


def cut(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), mu=MU, sigma=SIGMA)
    path.write_bytes(path.with_suffix(".npz").read_bytes()[:20_000])


def claiming(path: Path) -> None:
    """An array whose header claims 7 EiB."""
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 999999999)}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", header.ljust(128, b" "))
        archive.writestr("sigma.npy", header.ljust(128, b" "))


@pytest.mark.parametrize("name", ["reference.npz", "reference.pkl", "reference"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved, r"is a \.npy, a single array; write mu and sigma together with numpy\.savez"),
        (pickled, r"is a pickle \(EDM2's format\); it is not opened, because it could run any code; if you trust it"),
        (archived, r"no statistics of features \(no mu; it holds 00000/img00000000\.png\)"),
        (cut, "no statistics of features"),
        (claiming, "no statistics of features"),
    ],
)
def test_the_kind_of_a_wrong_file_is_named(
    tmp_path: Path, digits: list[NetworkFile], name: str, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / name
    write(path)
    assert is_statistics(str(path))
    with pytest.raises(DataError, match=message):
        read_statistics(str(path), digits)


def test_tars_folders_and_patterns_are_read_as_shards(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.npz", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "shard.tar").write_bytes(b"")
    for name in ("shard.npz", "folder.npz", "shard.tar", "shard-{000..007}.tar", "absent"):
        assert not is_statistics(str(tmp_path / name)), name
    assert is_statistics(str(tmp_path / "absent.npz"))
    assert is_statistics("https://example.org/imagenet.pkl")


def test_remote_statistics_are_refused(digits: list[NetworkFile]) -> None:
    with pytest.raises(DataError, match="copy the file here"):
        read_statistics("https://example.org/imagenet.npz", digits)


@pytest.mark.parametrize(
    ("output", "real", "refusal"),
    [
        ("new.npy", "evaluation.reference=shards", r"--output .*new\.npy: must end in \.npz"),
        (
            "new.npz",
            "evaluation.reference=mine.npz",
            r"evaluation\.reference=.*mine\.npz: is already a statistics file",
        ),
    ],
)
def test_the_tool_writes_statistics_from_shards_only(tmp_path: Path, output: str, real: str, refusal: str) -> None:
    command = ["--config", str(ROOT / "configs/demo.yaml"), "--output", str(tmp_path / output)]
    with pytest.raises(UserError, match=refusal):
        make_reference.main([*command, "evaluation.features=digits", real])
