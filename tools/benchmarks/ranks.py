"""Time the messages between the ranks of a job, and opening shards, by the number of ranks."""

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.measuring import CPU, Table
from jitscale import parallel
from jitscale.command import usable_cores
from jitscale.data.shards import ShardSet
from jitscale.node import once_a_node
from jitscale.parallel import World
from jitscale.preparation.array_shards import write_shards
from jitscale.training.log_point import exchange
from jitscale.training.watch import LossByNoiseLevel

MANY = 1024  # ranks of the model's prediction


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each exchange, and seconds to open `options.shards` shards, on processes of this machine.

    Rank 0's processor time is measured separately: on a cluster each rank has a core of its own, so an exchange takes
    as long as the work of rank 0, which handles a message of each rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = np.zeros((options.shards, 8, 8, 3), np.uint8)
        write_shards(images, [0] * options.shards, folder, codec="raw", samples_per_shard=1)
        found = {count: _on_ranks(count, options.repeats, folder) for count in tqdm(options.ranks, unit="world")}
    work = {count: times["log point, rank 0's processor"] for count, times in found.items()}
    slope, constant = np.polyfit(list(work), list(work.values()), 1) if len(work) > 1 else (math.nan, math.nan)
    model = {"ms_for_each_rank": slope, "model_ms": constant + slope * MANY}
    return {"by_ranks": found, **model, "cores": usable_cores()}


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    worlds = result["by_ranks"]
    first = next(iter(worlds.values()))
    lines = [(f"{name}, {unit(name)}", " / ".join(f"{worlds[n][name]:.3g}" for n in worlds)) for name in first]
    model = f"{result['model_ms']:.3g} ms: {result['ms_for_each_rank']:.3g} ms of rank 0 for each rank"
    head = ("ranks", f"{' / '.join(map(str, worlds))} on {result['cores']} cores")
    return [head, *lines, (f"model of the log point at {MANY} ranks", model)]


def unit(name: str) -> str:
    """The unit of a number of `measure`."""
    return "s" if name.startswith("opening") else "ms"


def _on_ranks(count: int, repeats: int, shards: str) -> dict[str, float]:
    """The numbers that rank 0 of `count` processes measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: to import torch takes each new process longer than everything that is measured.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = [(rank, count, port, repeats, shards, sender) for rank in range(count)]
    processes = [context.Process(target=_rank, args=own, daemon=True) for own in arguments]
    for process in processes:
        process.start()
    found: dict[str, float] = receiver.recv()
    for process in processes:
        process.join()
    return found


def _rank(rank: int, count: int, port: int, repeats: int, shards: str, results: Connection) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    with parallel.joined(CPU) as world:
        found = _measured(world, repeats, shards)
        if world.is_main:
            results.send(found)


def _measured(world: World, repeats: int, shards: str) -> dict[str, float]:
    loss, losses = torch.zeros(()), torch.zeros(2 * LossByNoiseLevel.BINS)

    def log_point() -> None:
        exchange(stop=False, writing=False, bad_samples=0, rate=1.0, seconds=0.0, loss=loss, losses=losses)

    def opened() -> ShardSet:
        return ShardSet.open(shards, 1)

    found = {"log point": _median(log_point, repeats, time.perf_counter)}
    found["log point, rank 0's processor"] = _median(log_point, repeats, time.process_time)
    found["agreement to stop"] = _median(lambda: parallel.any_rank(False), repeats, time.perf_counter)
    found["one gather of objects"] = _median(lambda: parallel.gather_objects(0.0), repeats, time.perf_counter)
    found["opening shards, each rank"] = _once(lambda: parallel.raise_together(opened))
    found["opening shards, one rank for all"] = _once(lambda: once_a_node(world, opened))
    return found


def _median(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Milliseconds by `clock`."""
    times = []
    for _ in range(repeats):
        parallel.barrier()
        began = clock()
        call()
        times.append(1e3 * (clock() - began))
    return statistics.median(times)


def _once(call: Callable[[], object]) -> float:
    """Seconds until all ranks have finished."""
    parallel.barrier()
    began = time.perf_counter()
    call()
    parallel.barrier()
    return time.perf_counter() - began
