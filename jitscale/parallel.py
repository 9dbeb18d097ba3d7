"""Ranks: who we are, and how ranks agree. Every function works in a single process too."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from jitscale.errors import ConfigError, UserError

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of malloc.h


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks on this node

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def adopt_launcher_environment() -> int:
    """Give torchrun's variables to a process started by srun or by plain `python`; returns the world size.

    srun is recognised by its step: a batch script carries Slurm variables too, but runs no tasks.
    """
    environment = os.environ
    if "RANK" not in environment and "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_slurm_host(environment["SLURM_STEP_NODELIST"])
        environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000))
    elif "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        environment["MASTER_PORT"] = str(_free_port())
    return int(environment["WORLD_SIZE"])


def choose_device(setting: str) -> torch.device:
    """`run.device` as this rank's device.

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: PyTorch sees no GPU here; set run.device=cpu or install a CUDA build")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def bf16_supported(setting: str) -> bool:
    """Whether `run.device` has bfloat16 arithmetic: always a CPU, GPUs from compute capability 8.0."""
    if setting == "cpu" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability()[0] >= 8


def start(device: torch.device) -> World:
    """Join the job's process group: gloo on CPU, NCCL beside gloo on GPUs."""
    adopt_launcher_environment()
    # DeepSpeed chooses its accelerator when it is imported, and would take a GPU that this run shall not use.
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    hosts = gather_objects(socket.gethostname())
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), hosts.count(socket.gethostname())
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, local_size)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    gather_objects(None)


def broadcast_object(value: T) -> T:
    """Rank 0's picklable `value`, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    # Through the CPU tensor path, so that no message waits behind work queued on a GPU.
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor([int(flag)])
    dist.all_reduce(count)
    return bool(count.item())


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's `tensor`, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def together(call: Callable[[], T]) -> T:
    """Call on every rank, and raise on every rank what any rank met, so that none waits for a rank that has left.

    Raises:
        UserError: the first failing rank's error, of the type it had there.
    """
    result, error = None, None
    try:
        result = call()
    except UserError as met:
        error = met
    errors = [met for met in gather_objects(error) if met is not None]
    if errors:
        raise errors[0]
    return cast(T, result)


def _keep_freed_memory() -> None:
    """Let glibc reuse what a step frees, where it would give it back to the kernel and fault every page in again.

    A step frees and asks for all gradients several times; on a CPU those page faults cost more than the optimizer
    (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _first_slurm_host(nodelist: str) -> str:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True)
    return hosts.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
