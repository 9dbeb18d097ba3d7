"""Measure steps of the trainer on several GPUs of one machine, all-reduce bandwidth, and how much backward hides."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measuring
from benchmarks.trace import KINDS, Kernel, busy_ms, overlap_ms, read_trace
from benchmarks.whole import settings_in, step_of, write_random_shards
from jitscale import parallel
from jitscale.data.shards import open_training_shards
from jitscale.model.flops import training_flops
from jitscale.parallel import World, choose_device
from jitscale.training.trainer import Trainer

REDUCED_BYTES = {"cpu": [2**16, 2**20], "cuda": [2**20, 2**24, 2**26, 2**28, 2**30]}
REDUCTIONS = 10
WARM_UPS = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step with --batch images per rank in the configuration's stage, and all-reduces of several sizes."""
    with parallel.joined(choose_device("auto")) as world:
        per_rank, options.batch = options.batch, options.batch * world.size
        scratch = Path(parallel.on_main(lambda: tempfile.mkdtemp(prefix="jitscale_multi_")))
        try:
            settings = ["engine.micro_batch_size=null", "tracking.wandb=off", *settings_in(scratch)]
            config, device = measuring.measured_config(options, settings, on_gpu=True)
            parallel.on_main(lambda: write_random_shards(config))
            trainer = Trainer(config, world, open_training_shards(config))
            step = step_of(trainer, measuring.Stopwatch(device, enabled=False))
            for _ in range(WARM_UPS):
                step()
            parallel.barrier()
            watch = measuring.Stopwatch(device)
            with watch.part("steps"):
                for _ in range(options.steps):
                    step()
            peak = measuring.peak_memory_mib(device)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            with profile(activities=activities, record_shapes=True) as profiler:
                step()
                measuring.wait_for(device)
            kernels = read_trace(profiler, device).kernels
            execution = str(trainer.engine.execution)
            trainer.close()
            bandwidth = {str(size): reduced_gigabytes(world, size) for size in REDUCED_BYTES[device.type]}
            product = measuring.matmul_tflops(config, device)
        finally:
            parallel.barrier()
            parallel.on_main(lambda: shutil.rmtree(scratch, ignore_errors=True))
    if not world.is_main:
        raise SystemExit(0)  # the main rank prints
    milliseconds = 1e3 * watch.medians()["steps"] / options.steps
    rate = 1e3 * options.batch / milliseconds
    return {
        "ranks": world.size,
        "images_a_rank": per_rank,
        "engine": f"ZeRO stage {config.engine.zero_stage}",
        "execution": execution,
        "ms_per_step": milliseconds,
        "images_per_second": rate,
        **measuring.utilisation(rate / world.size * training_flops(config.model) / 1e12, device, product),
        **_hidden(kernels),
        "all_reduce_gigabytes_per_second": bandwidth,
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
    }


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""
    speeds = result["all_reduce_gigabytes_per_second"]
    hidden = "" if result["nccl_hidden"] is None else f", {result['nccl_hidden']:.0%} of it while other kernels run"
    return [
        ("ranks", f"{result['ranks']}, {result['images_a_rank']} images each"),
        ("images/s", f"{result['images_per_second']:.4g}"),
        ("step", f"{result['ms_per_step']:.1f} ms"),
        *measuring.describe_utilisation(result, result["matmul_tflops_per_second"]),
        ("collectives of a step", f"{result['nccl_ms']:.1f} ms{hidden}"),
        *((f"all-reduce of {int(size) / 2**20:g} MiB", f"{speed:.3g} GB/s") for size, speed in speeds.items()),
        ("engine", result["engine"]),
        ("execution", result["execution"]),
    ]


def reduced_gigabytes(world: World, size: int) -> float:
    """GB/s that a ring's all-reduce of `size` bytes sends over each link ("bus bandwidth" of nccl-tests)."""
    tensor, watch = torch.zeros(size // 4, device=world.device), measuring.Stopwatch(world.device)
    for number in range(REDUCTIONS + 1):
        parallel.barrier()
        watch.enabled = number > 0
        with watch.part("reduce"):
            torch.distributed.all_reduce(tensor)
            measuring.wait_for(world.device)
    return 2 * (world.size - 1) / world.size * size / watch.medians()["reduce"] / 1e9


def _hidden(kernels: list[Kernel]) -> dict[str, float | None]:
    """Milliseconds of collectives in a step, and the share during which another kernel also ran."""
    collectives = [kernel for kernel in kernels if KINDS["NCCL"] in kernel.name.lower()]
    others = [kernel for kernel in kernels if KINDS["NCCL"] not in kernel.name.lower()]
    total = busy_ms(collectives)
    return {"nccl_ms": total, "nccl_hidden": overlap_ms(collectives, others) / total if total else None}
