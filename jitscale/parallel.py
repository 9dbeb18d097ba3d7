"""Ranks: the rank of this process, and agreement between ranks. Every function works in a single process too."""

import ctypes
import logging
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import Store, distributed_c10d, rendezvous  # type: ignore[attr-defined]

from jitscale.errors import (
    ConfigError,
    GPUMemoryError,
    RankLostError,
    RendezvousError,
    StorageError,
    UserError,
    escaped,
    first_line,
)
from jitscale.launcher_environment import adopt_launcher_environment, positive_setting

T = TypeVar("T")

MEETING_SECONDS = 600.0  # for the slowest rank to connect; JITSCALE_MEETING_SECONDS replaces it
COLLECTIVE_SECONDS = 1800.0  # least limit of a collective, for the slowest rank; see `collective_seconds`
LONGEST_SECONDS = 365 * 86_400.0
BUCKET_ELEMENTS = 2**26  # in one collective: 256 MiB in float32
FIRST_WORD, NEXT_WORD = 5.0, 30.0  # seconds until rank 0 first logs that it waits for ranks, and between repeats
OTHERS_WORD = 60.0  # the same for other ranks; hundreds of ranks that log more often would hide the rest of the log
MOST_MEMORY = 0.8  # part of a GPU's memory; a process that holds more is the one that fills it
LOWER = "lower engine.micro_batch_size (training) or evaluation.block_size (sampling); tools/plan.py counts the memory"
END_IT = "another process holds memory there: end it, and start the same command again"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks on this node
    first_of_node: int = 0  # the first rank on this node

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and the log of all."""
        return self.rank == 0


def choose_device(setting: str) -> torch.device:
    """This rank's device for `run.device`. Raises a ConfigError if the machine lacks it, or ranks would share a GPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: PyTorch sees no GPU here; set run.device=cpu or install a CUDA build")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if shared := shared_gpu():
        raise ConfigError(shared)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def shared_gpu() -> str:
    """A message if this rank would share a GPU with another rank; empty if it has its own."""
    local_rank, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not 1 < seen <= local_rank:  # if a task sees one GPU, that GPU is its own
        return ""
    remedy = f"start {seen} tasks per node (--ntasks-per-node, --nproc-per-node), or give each task its own GPU"
    return f"local rank {local_rank} sees {seen} GPUs: two ranks would share one; {remedy}"


def bf16_supported(setting: str) -> bool:
    """Whether `run.device` has bfloat16 arithmetic: every CPU, and GPUs from compute capability 8.0 on."""
    return setting == "cpu" or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8


def start(device: torch.device) -> World:
    """Join the job's process group: gloo on CPU, NCCL next to gloo on GPUs.

    Raises a LauncherError if the launcher's variables do not fit together, a RendezvousError if the ranks did not meet
    within `MEETING_SECONDS`.
    """
    adopt_launcher_environment()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = _store_of_all_ranks()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
        )
    hosts, own = gather_objects(socket.gethostname()), socket.gethostname()
    on_node = hosts.count(own), hosts.index(own)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), device, *on_node)


@contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """While the block runs, log at intervals that this rank waits for others, and where."""
    rank, words = os.environ["RANK"], f"waiting for {os.environ['WORLD_SIZE']} ranks at {meeting_place()}"
    first, again = FIRST_WORD, NEXT_WORD
    if rank != "0":
        words, first, again = f"rank {rank} is {words}", OTHERS_WORD, OTHERS_WORD
    met = threading.Event()

    def speak() -> None:
        seconds = first
        while not met.wait(seconds):
            logger.warning(words)
            seconds = again

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        met.set()
        speaker.join()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def collective_seconds(hang_timeout: float) -> float:
    """Limit for a collective, if a rank ends itself after `hang_timeout` seconds without a step (0: never).

    The limit is longer than `hang_timeout`. So the watch of each rank acts first and writes the stacks of all threads;
    a collective that fails would end the process without them. The watch looks twenty times within `hang_timeout`, and
    begins to count before the collective does.
    """
    return min(max(COLLECTIVE_SECONDS, 60.0 + hang_timeout + hang_timeout // 10), LONGEST_SECONDS)


def let_collectives_outlast(hang_timeout: float) -> None:
    """Set `collective_seconds` for all process groups of this process, including DeepSpeed's."""
    if not dist.is_initialized():
        return
    limit = timedelta(seconds=collective_seconds(hang_timeout))
    distributed_c10d._get_default_store().set_timeout(limit)  # NCCL's first collective uses this store
    for group in list(distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            distributed_c10d._set_pg_timeout(limit, group)


@contextmanager
def joined(device: torch.device, hang_timeout: float = 0.0) -> Iterator[World]:
    """Join the job's process group for the block, as `start` does, and leave it together with all ranks.

    By default, NCCL ends a process if its watchdog thread hangs for 8 minutes, for example in the driver. This function
    raises that limit above `hang_timeout`. Raises a RankLostError if another rank has left early, a GPUMemoryError if
    the memory of this rank's GPU is full.
    """
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{collective_seconds(hang_timeout):.0f}")
    world = start(device)
    let_collectives_outlast(hang_timeout)
    try:
        yield world
        barrier()  # rank 0 must not leave first: it serves the store of all ranks
    except torch.OutOfMemoryError as error:
        found = first_line(error).partition(" If reserved but unallocated")[0].rstrip(".")  # the rest is torch's advice
        ours = torch.cuda.memory_reserved(world.device) > MOST_MEMORY * torch.cuda.mem_get_info(world.device)[1]
        message = f"rank {world.rank}: {found}; {LOWER if ours else END_IT}"
        raise GPUMemoryError(message, from_settings=ours) from error
    except RuntimeError as error:
        if "gloo" not in str(error) or "by peer" not in str(error):  # a closed or reset connection
            raise
        what = f"rank {world.rank}: ends because another rank has ended"
        raise RankLostError(f"{what}; see the message of that rank or the log of its node") from error
    finally:
        stop()


def this_rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    any_rank(False)


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
    # This uses tensors on the CPU, so that no message waits for work that is queued on a GPU.
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    return bool(tally(torch.tensor([int(flag)]))[0].item())


def tally(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over ranks of a few `values` (K,) on the CPU; on rank 0 also the values of every rank, (ranks, K).

    Rank 0 gathers one message from each rank and broadcasts the sum. A ring would take 2 (ranks - 1) steps in sequence.
    """
    if not dist.is_initialized():
        return values, values[None]
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(values, rows)
    everyone = torch.stack(rows or [values])
    total = everyone.sum(0)
    dist.broadcast(total, 0)
    return total, everyone


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's `tensor`, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def exchange(
    send: torch.Tensor, send_lengths: Sequence[int], receive: torch.Tensor, receive_lengths: Sequence[int]
) -> None:
    """Send each rank its part of the flat tensor `send`, and fill `receive` with what each rank sends to this one.

    The parts are in rank order. The lengths are their numbers of elements, which may be 0.
    """
    dist.all_to_all_single(receive, send, list(receive_lengths), list(send_lengths))


def buckets(items: Iterable[T], elements: Callable[[T], int], limit: int = 0) -> Iterator[list[T]]:
    """Split `items`, in their order, into lists for one collective each, of at most `limit` elements.

    A larger item gets its own list. The default limit is `BUCKET_ELEMENTS`.
    """
    limit = limit or BUCKET_ELEMENTS
    bucket: list[T] = []
    filled = 0
    for item in items:
        if bucket and filled + elements(item) > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += elements(item)
    if bucket:
        yield bucket


def raise_together(call: Callable[[], T]) -> T:
    """Call on every rank. If a rank fails, all raise the UserError of the first that does, so that none waits for it.

    An OSError becomes a StorageError.
    """
    result, error = None, None
    try:
        result = call()
    except UserError as met:
        error = met
    except OSError as met:
        error = StorageError.of(met, first_line(met))
    if any_rank(error is not None):  # the slow exchange of objects is needed for errors only
        raise next(other for other in gather_objects(error) if other is not None)
    return cast(T, result)


def require_alike(what: str, value: str, remedy: str) -> None:
    """Raise a ConfigError on every rank if `value` is not the same on all of them. A collective call.

    The message lists the values with their ranks.
    """
    ranks_with: dict[str, list[int]] = {}
    for rank, other in enumerate(gather_objects(value)):
        ranks_with.setdefault(other, []).append(rank)
    if len(ranks_with) > 1:
        found = "; ".join(f"{_rank_list(ranks)}: {other}" for other, ranks in ranks_with.items())
        raise ConfigError(f"{what} is not the same on all ranks ({found}); {remedy}")


def _rank_list(ranks: list[int]) -> str:
    """`rank 3` or `ranks 0, 1, 2`; of more than eight, the first eight and the number of the rest."""
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


@contextmanager
def said_by_this_rank() -> Iterator[None]:
    """Log a UserError of this rank alone, with the rank: `exit_with_message` prints the errors of rank 0 only."""
    try:
        yield
    except UserError as error:
        if this_rank() > 0:
            logger.error("rank %d: %s", this_rank(), escaped(str(error)))
        raise


def on_main(call: Callable[[], T]) -> T:
    """Call on rank 0 only. Every rank gets its result or raises its UserError. A collective call."""
    return cast(T, broadcast_object(raise_together(lambda: call() if this_rank() == 0 else None)))


def _store_of_all_ranks() -> Store:
    """The store that all ranks share, after all ranks have connected."""
    seconds = positive_setting("JITSCALE_MEETING_SECONDS", MEETING_SECONDS)
    try:
        with waiting_for_ranks():
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except dist.DistError as error:
        what = f"{os.environ['WORLD_SIZE']} ranks did not meet at {meeting_place()} within {seconds:.0f} s"
        remedy = "start all ranks (srun, torchrun), or a single task (srun --ntasks=1)"
        raise RendezvousError(f"{what} ({first_line(error)}); {remedy}") from error
    store.set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
    return store


def meeting_place() -> str:
    """The address at which ranks meet, as HOST:PORT."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: otherwise it returns the memory to the kernel and pays page faults for it again.

    A step frees and allocates all gradients several times. On a CPU, these page faults cost more than the optimizer
    (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
