"""Published weights are checked by hash. They come from a real HTTP server."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitscale.config import EvaluationConfig
from jitscale.errors import DataError
from jitscale.evaluation.networks import PUBLISHED
from jitscale.evaluation.published import Published, fetch, published_folder
from tests.support.servers import serving
from tools.fetch_weights import main

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/weights.pth").write_bytes(CONTENT)
    with serving(tmp_path / "served") as address:
        yield f"{address}/weights.pth"


@pytest.mark.parametrize("features", ["inception", "auto"])
def test_weights_are_downloaded_once_and_checked(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    monkeypatch.setitem(PUBLISHED, "inception", Published(url, SHA256[:8]))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {{max_steps: 1}}\nevaluation: {{features: {features}, features_dir: {tmp_path / 'weights'}}}\n"
    )
    assert main(["--config", str(config)]) == 0
    file = tmp_path / "weights/weights.pth"
    assert file.read_bytes() == CONTENT
    (tmp_path / "served/weights.pth").unlink()
    assert main(["--output", str(tmp_path / "weights"), "inception"]) == 0, "an existing file is not downloaded again"
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=rf"its sha256 begins with .* expected {SHA256[:8]}; remove it"):
        main(["--output", str(tmp_path / "weights"), "inception"])


def test_a_wrong_hash_and_a_missing_network_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the file with sha256 0000"):
        fetch(Published(url, "0000"), tmp_path / "weights")
    with pytest.raises(
        DataError, match=r"on a machine with a network: python tools/fetch_weights\.py --output .*/weights inception"
    ):
        fetch(Published("http://127.0.0.1:9/weights.pth", SHA256, "inception"), tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


def test_the_default_is_torch_hubs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert published_folder(EvaluationConfig()) == tmp_path / "hub/checkpoints"
    assert published_folder(EvaluationConfig(features_dir="weights")) == Path("weights")
