"""The peak that utilisation refers to, and the operations that it counts."""

import pytest
import torch

from jitscale.config import Config
from jitscale.model.flops import model_flops_utilisation, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 NVL", 835.0), ("NVIDIA RTX A4000", None), ("NVIDIA H200", 989.0)]
)
def test_the_peak_is_that_of_the_board(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak


def test_utilisation_counts_only_the_tokens_in_each_block() -> None:
    """JiT-B/16 at 256 px: half of the tokens skip eight of twelve blocks.

    A step then has 0.69 of the work, until routing ends.
    """
    config = Config()
    plain = model_flops_utilisation(config, 100, 1000.0, 989.0)
    assert plain == pytest.approx(1000 * 3 * 2 * 25.1e9 / 989e12, rel=0.01)
    config.model.route_share, config.run.route_until_images = 0.5, 100
    assert model_flops_utilisation(config, 100, 1000.0, 989.0) == pytest.approx(0.69 * plain, rel=0.01)
    assert model_flops_utilisation(config, 101, 1000.0, 989.0) == plain
