"""The peak that utilization is counted against."""

import pytest
import torch

from jitscale.model.flops import peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 NVL", 835.0), ("NVIDIA RTX A4000", None), ("NVIDIA H200", 989.0)]
)
def test_the_peak_is_that_of_the_board(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak
