"""How ranks agree, and on what they compute."""

import os

import pytest
import torch

from jitscale import parallel
from jitscale.errors import ConfigError
from jitscale.training.engine import _name_device_as_deepspeed_does


def test_cuda_that_is_not_there_is_refused() -> None:
    assert parallel.choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        parallel.choose_device("cuda")


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (8, 1)])
def test_a_task_that_sees_its_own_gpu_only_takes_that_one(
    monkeypatch: pytest.MonkeyPatch, visible: int, index: int
) -> None:
    """The second rank of a node, with --gpus-per-task=1 and without: DeepSpeed reads LOCAL_RANK as a device's index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")  # of mpirun, which has started torchrun
    device = parallel.choose_device("auto")
    assert device == torch.device("cuda", index)
    _name_device_as_deepspeed_does(device)
    assert os.environ["LOCAL_RANK"] == str(index)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    assert parallel.choose_device("auto") == device, "asked again"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(ConfigError, match="local rank 5 sees 4 GPUs: two ranks would share one; start 4 tasks a node"):
        parallel.choose_device("auto")


def test_everything_works_in_one_process() -> None:
    assert parallel.gather_objects("a") == ["a"]
    assert parallel.broadcast_object("a") == "a"
    assert parallel.any_rank(True)
    assert not parallel.any_rank(False)
    assert parallel.raise_together(lambda: 3) == 3
