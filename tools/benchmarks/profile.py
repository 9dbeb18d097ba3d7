"""Compare the kernels of one training step with the speed of the memory and of the matrix units."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measuring
from benchmarks.step import training_of
from benchmarks.trace import busy_ms, by_kind, by_name, read_trace
from jitscale.errors import UserError
from jitscale.model.flops import training_flops

COPY_BYTES = {"cpu": 2**26, "cuda": 2**31}
COPIES = 10
NAME_LENGTH = 70  # characters of a kernel's name in the table


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time steps without the profiler, and trace one step with it."""
    with tempfile.TemporaryDirectory() as scratch:
        training, settings, engine = training_of(options.engine, Path(scratch))
        config, device = measuring.measured_config(options, settings, on_gpu=True)
        torch.manual_seed(config.run.seed)
        watch = measuring.Stopwatch(device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with training(config, device, measuring.Stopwatch(device, enabled=False)) as (step, execution):
            for _ in range(options.warmup):
                step()
            with watch.part("steps"):
                for _ in range(options.steps):
                    step()
            measuring.wait_for(device)
            began = time.perf_counter()
            step()
            host_ms = 1e3 * (time.perf_counter() - began)  # until the host has launched everything
            measuring.wait_for(device)
            peak = measuring.peak_memory_mib(device)
            with profile(activities=activities, record_shapes=True) as profiler:
                step()
                measuring.wait_for(device)
        kernels, launches = read_trace(profiler, device)
    if not kernels:
        raise UserError("the profiler saw no kernel on this device; is its driver's CUPTI usable here?")
    step_ms = 1e3 * watch.medians()["steps"] / options.steps
    copy, product = copy_terabytes(device), measuring.matmul_tflops(config, device)
    groups, busy = by_name(kernels), busy_ms(kernels)
    shown = [_with_shares(group, copy, product) for group in groups[: options.rows]]
    tflops = options.batch / step_ms * 1e3 * training_flops(config.model) / 1e12
    return {
        "engine": engine.format(stage=config.engine.zero_stage),
        "execution": str(execution),
        "ms_per_step": step_ms,
        "images_per_second": 1e3 * options.batch / step_ms,
        "host_ms": host_ms,
        "busy_ms": busy,
        "launches": launches,
        "kernels_per_step": len(kernels),
        "kinds": {kind: _with_shares(group, copy, product) for kind, group in by_kind(kernels).items()},
        "kernels": shown,
        "kernels_left_out_ms": sum(group["ms"] for group in groups[options.rows :]),
        "copy_terabytes_per_second": copy,
        **measuring.utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
    }


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""
    busy, step = result["busy_ms"], result["ms_per_step"]
    lines = [
        ("step", f"{step:.1f} ms, {result['images_per_second']:.4g} images/s"),
        ("host", f"{result['host_ms']:.1f} ms to launch a step on an idle device, {result['launches']} launches"),
        ("device busy, in the profiled step", f"{busy:.1f} ms, {busy / step:.1%} of a step without the profiler"),
        ("a copy in memory", f"{result['copy_terabytes_per_second']:.3g} TB/s, read and written"),
        *measuring.describe_utilisation(result, result["matmul_tflops_per_second"]),
        ("engine", result["engine"]),
        ("execution", result["execution"]),
    ]
    lines += [(f"all {kind}", describe_work(found)) for kind, found in result["kinds"].items()]
    lines += [(found["name"][:NAME_LENGTH], describe_work(found)) for found in result["kernels"]]
    return [*lines, ("all other kernels", f"{result['kernels_left_out_ms']:.2f} ms")]


def describe_work(found: dict[str, Any]) -> str:
    """Time; and bytes and FLOPs with their shares, if they are known."""
    parts = [f"{found['ms']:.2f} ms, {found['count']} times"]
    if found["copy_share"] is not None:
        parts.append(f"{found['gbyte']:.3g} GB, {found['copy_share']:.0%} of a copy's speed")
    if found["product_share"] is not None:
        parts.append(f"{found['gflop'] / 1e3:.3g} TFLOP, {found['product_share']:.0%} of a large product's")
    return "; ".join(parts)


def copy_terabytes(device: torch.device) -> float:
    """TB/s of a copy inside the device's memory, read and written bytes together: the fastest of several."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, watch = torch.empty_like(source), measuring.Stopwatch(device)
    for _ in range(COPIES):
        with watch.part("copy"):
            target.copy_(source)
    return 2 * source.numel() / min(watch.times["copy"]) / 1e12


def _with_shares(group: dict[str, Any], copy: float, product: float) -> dict[str, Any]:
    """`group` with its speed as a share of a copy's and of a large product's."""
    shares: dict[str, float | None] = {}
    for unit, name, speed in (("gbyte", "copy_share", copy), ("gflop", "product_share", product)):
        seconds = group[f"{unit}_ms"] / 1e3  # time of the kernels whose work is known
        shares[name] = group[unit] / 1e3 / seconds / speed if seconds and group[unit] else None
    return {**group, **shares}
