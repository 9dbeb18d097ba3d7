"""How ranks agree, and on which device they compute."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jitscale import parallel
from jitscale.config import Config
from jitscale.data.workers import naming_dead_workers
from jitscale.errors import ConfigError, DataError, ExitCode, exit_with_message
from jitscale.training.engine import _name_device_as_deepspeed_does
from jitscale.training.feed import Feed


def test_missing_cuda_is_refused() -> None:
    assert parallel.choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        parallel.choose_device("cuda")


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (8, 1)])
def test_a_task_with_one_visible_gpu_takes_that_one(monkeypatch: pytest.MonkeyPatch, visible: int, index: int) -> None:
    """The second rank of a node, with and without --gpus-per-task=1.

    DeepSpeed reads LOCAL_RANK as the index of a device.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "1")
    # mpirun sets this variable, and mpirun may have started torchrun.
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    device = parallel.choose_device("auto")
    assert device == torch.device("cuda", index)
    _name_device_as_deepspeed_does(device)
    assert os.environ["LOCAL_RANK"] == str(index)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    assert parallel.choose_device("auto") == device, "a second call gives the same device"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(ConfigError, match=r"local rank 5 sees 4 GPUs: two .* start 4 tasks per node"):
        parallel.choose_device("auto")


def test_everything_works_in_one_process() -> None:
    assert parallel.gather_objects("a") == ["a"]
    assert parallel.broadcast_object("a") == "a"
    assert parallel.any_rank(True)
    assert not parallel.any_rank(False)
    assert parallel.raise_together(lambda: 3) == 3


@pytest.mark.parametrize(("rank", "said"), [(0, []), (3, ["rank 3: /data/a.tar: cannot be read; restore it"])])
def test_an_error_of_one_rank_is_logged_with_its_number(
    rank: int, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 has no such line: it prints its error as the command's message."""

    def broken() -> Iterator[Any]:
        raise DataError("/data/a.tar: cannot be read; restore it")
        yield

    monkeypatch.setattr(parallel, "this_rank", lambda: rank)
    feed = Feed.__new__(Feed)
    feed._config, feed._prepared = Config(), broken()
    with pytest.raises(DataError):
        next(feed)
    assert caplog.messages == said
    with pytest.raises(DataError), naming_dead_workers(parallel.said_by_this_rank):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    dead = "DataLoader worker (pid 7) is killed by signal: Killed. Out of memory"
    assert [text[: len(dead) + 26] for text in caplog.messages[1:]] == [f"rank 3: data.num_workers: {dead}"] * len(said)


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms", False),
    ],
)
def test_a_lost_peer_is_a_one_line_error(
    text: str, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        with parallel.joined(torch.device("cpu")):
            raise RuntimeError(text)

    world = parallel.World(2, 4, 0, torch.device("cpu"))
    monkeypatch.setattr(parallel, "start", lambda device: world)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit if is_lost else RuntimeError) as met:
        exit_with_message(command)
    if is_lost:
        assert met.value.code == ExitCode.FAILED
    said = capsys.readouterr().err.splitlines()
    assert [line[:47] for line in said] == ["error: rank 2: ends because another rank has en"] * is_lost
    assert not (tmp_path / "error.json").exists(), "torchrun must name another rank as the cause"


@pytest.mark.parametrize(
    ("reserved", "code", "remedy"),
    [
        (77, ExitCode.USER_ERROR, "lower engine.micro_batch_size (training) or evaluation.block_size"),
        (20, ExitCode.FAILED, "another process holds memory there: end it, and start"),
    ],
)
def test_a_gpu_whose_memory_is_full_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reserved: int, code: ExitCode, remedy: str
) -> None:
    def command() -> int:
        with parallel.joined(torch.device("cpu")):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.5 "
                "GiB is free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF.\nMore"
            )

    world = parallel.World(2, 4, 0, torch.device("cpu"))
    monkeypatch.setattr(parallel, "start", lambda device: world)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 79))
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit) as met:
        exit_with_message(command)
    assert met.value.code == code, "a job must not try again with settings that do not fit"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: rank 2: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert f"1.5 GiB is free; {remedy}" in said


@pytest.mark.parametrize("hang_timeout", [0.0, 8.0, 1700.0, 1800.0, 7200.0, 1e6])
def test_stacks_are_written_before_a_collective_fails(hang_timeout: float) -> None:
    """A watch takes a twentieth of its time more, and then some seconds to write."""
    assert parallel.collective_seconds(hang_timeout) >= max(1800.0, 1.05 * hang_timeout + 60.0)
    assert parallel.collective_seconds(1e300) < float("inf")


def test_every_process_group_outlasts_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"):
        monkeypatch.delenv(name, raising=False)
    limits = set()
    with parallel.joined(torch.device("cpu"), hang_timeout=7200.0):
        of_deepspeed = dist.new_group([0])  # DeepSpeed makes its groups like this, without a limit.
        parallel.let_collectives_outlast(7200.0)
        for group in (dist.group.WORLD, of_deepspeed):
            limits.add(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())  # type: ignore[union-attr]
        assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > 7200
    assert limits == {parallel.collective_seconds(7200.0)}


def test_a_difference_between_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.require_alike("the kernel", "sdpa", "repair it")
    monkeypatch.setattr(parallel, "gather_objects", lambda value: ["flash"] * 12 + ["sdpa"] + ["flash"])
    said = "the kernel is not the same on all ranks (ranks 0, 1, 2, 3, 4, 5, 6, 7 and 5 more: flash; rank 12: sdpa); "
    with pytest.raises(ConfigError) as met:
        parallel.require_alike("the kernel", "flash", "repair it")
    assert str(met.value) == said + "repair it"
