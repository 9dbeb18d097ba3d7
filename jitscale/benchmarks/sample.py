"""Guided Heun sampling of one batch."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from jitscale.benchmarks.conditions import CPU, measured_config, peak_memory_mib
from jitscale.evaluation.generate import autocast, configured_sampler, generate
from jitscale.model.jit import JiT
from jitscale.planner import forward_flops


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Guided Heun sampling of one batch, as evaluation does it."""
    settings = ["evaluation.method=heun", f"evaluation.steps={options.sampler_steps}"]
    config = measured_config(options, [*settings, f"evaluation.guidance_scale={options.guidance}"])
    network = JiT(config.model, config.diffusion).eval()
    sampler = configured_sampler(config.evaluation, config.diffusion)
    rows: list[int] = []
    with autocast(config, CPU), torch.no_grad():
        images = torch.zeros(2 * options.batch, 3, config.model.image_size, config.model.image_size)
        network(images, torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.long))  # warm-up
        network.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        started = time.perf_counter()
        generate(network, sampler, range(options.batch), config.run.seed)
        seconds = time.perf_counter() - started
    return {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "sampler_steps": options.sampler_steps,
        "guidance": options.guidance,
        "images_per_second": options.batch / seconds,
        "seconds": seconds,
        "evaluations_per_image": sum(rows) / options.batch,
        "tflops_per_second": sum(rows) * forward_flops(config.model) / seconds / 1e12,
        "peak_memory_mib": peak_memory_mib(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    return [
        ("images/s", f"{result['images_per_second']:.4f}"),
        ("time", f"{result['seconds']:.2f} s for {result['batch']} images"),
        ("network evaluations an image", f"{result['evaluations_per_image']:g}"),
        ("TFLOP/s", f"{result['tflops_per_second']:.4f}"),
        ("peak memory of the process", f"{result['peak_memory_mib']:.0f} MiB"),
    ]
