"""Guided sampling of one batch, as evaluation does it; on demand beside the authors' way, in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import trange

from jitscale.benchmarks.conditions import environment, measured_config, peak_memory_mib
from jitscale.benchmarks.reference import reference_network, reference_sample
from jitscale.benchmarks.stopwatch import wait_for
from jitscale.evaluation.generate import (
    autocast,
    configured_sampler,
    labels_of,
    noise_of,
    ready_to_sample,
    sample_images,
)
from jitscale.model.jit import JiT
from jitscale.parallel import choose_device
from jitscale.planner import forward_flops

WEIGHTS_DEVIATION = 0.02  # of what a fresh network sets to zero, so that it predicts something


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Guided sampling of one batch, `options.repeats` times."""
    settings = [f"evaluation.method={options.method}", f"evaluation.steps={options.sampler_steps}"]
    config = measured_config(options, [*settings, f"evaluation.guidance_scale={options.guidance}"], on_gpu=True)
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    network = JiT(config.model, config.diffusion)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=WEIGHTS_DEVIATION)
    theirs = reference_network(config, device, training=False) if options.compare == "reference" else None
    if theirs is not None:
        theirs.load_state_dict(network.state_dict())
    ours = ready_to_sample(network, config, device)
    sampler = configured_sampler(config.evaluation, config.diffusion)
    ids = range(options.batch)
    noise = config.diffusion.noise_scale * noise_of(config.run.seed, ids, config.model.image_size).to(device)
    labels = labels_of(ids, config.model.num_classes).to(device)
    rows: dict[str, list[int]] = {"ours": [], "theirs": []}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    images: dict[str, torch.Tensor] = {}

    def timed(name: str, draw: Callable[[], torch.Tensor]) -> None:
        rows[name].clear()
        wait_for(device)
        started = time.perf_counter()
        images[name] = draw()
        wait_for(device)
        seconds[name].append(time.perf_counter() - started)

    for name, model in (("ours", ours), ("theirs", theirs)):
        if model is not None:
            model.register_forward_hook(lambda module, inputs, output, name=name: rows[name].append(len(output)))
    with autocast(config, device), torch.no_grad():
        for batch in (options.batch, 2 * options.batch):  # warm-up, of both sizes
            zeros = torch.zeros(batch, *noise.shape[1:], device=device)
            for model in (ours, theirs):
                if model is not None:
                    model(zeros, torch.zeros(batch, device=device), labels.repeat(batch // len(labels)))
        for _ in trange(options.repeats, unit="batch", desc="measure", disable=None):
            timed("ours", lambda: sample_images(ours, sampler, noise, labels))
            if theirs is not None:
                timed("theirs", lambda: reference_sample(theirs, sampler, noise, labels, ours.null_label))
    median = statistics.median(seconds["ours"])
    evaluations = sum(rows["ours"]) / options.batch
    result = {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "sampler_steps": options.sampler_steps,
        "guidance": options.guidance,
        "images_per_second": options.batch / median,
        "seconds": median,
        "seconds_range": [min(seconds["ours"]), max(seconds["ours"])],
        "evaluations_per_image": evaluations,
        "network_calls": len(rows["ours"]),
        "tflops_per_second": options.batch * evaluations * forward_flops(config.model) / median / 1e12,
        "peak_memory_mib": peak_memory_mib(device),
        **environment(device),
    }
    if theirs is not None:
        their_median = statistics.median(seconds["theirs"])
        result["reference"] = {
            "images_per_second": options.batch / their_median,
            "seconds": their_median,
            "seconds_range": [min(seconds["theirs"]), max(seconds["theirs"])],
            "evaluations_per_image": sum(rows["theirs"]) / options.batch,
            "network_calls": len(rows["theirs"]),
        }
        result["ratio"] = their_median / median
        result["largest_difference"] = float((images["ours"] - images["theirs"]).abs().max())
        result["largest_value"] = float(images["theirs"].abs().max())
    return result


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""

    def of(part: dict[str, Any]) -> list[tuple[str, str]]:
        low, high = part["seconds_range"]
        return [
            ("images/s", f"{part['images_per_second']:.4f}"),
            ("time", f"{part['seconds']:.2f} s for {result['batch']} images ({low:.2f} to {high:.2f})"),
            ("network evaluations an image", f"{part['evaluations_per_image']:g}"),
            ("network calls", f"{part['network_calls']}"),
        ]

    lines = [
        *of(result),
        ("TFLOP/s", f"{result['tflops_per_second']:.4f}"),
        ("peak memory", f"{result['peak_memory_mib']:.0f} MiB"),
    ]
    if "reference" in result:
        lines += [(f"the authors' way: {name}", value) for name, value in of(result["reference"])]
        lines += [
            ("ours / the authors' way", f"{result['ratio']:.2f}"),
            ("largest difference of a pixel", f"{result['largest_difference']:.1e} of {result['largest_value']:.2g}"),
        ]
    return lines
