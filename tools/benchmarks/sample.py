"""Guided sampling of one batch, as evaluation does it; with --compare, in turns with the authors' way."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import trange

from benchmarks.conditions import arithmetic, environment, measured_config, peak_memory_mib
from benchmarks.reference import reference_network, reference_sample
from benchmarks.stopwatch import Stopwatch
from benchmarks.utilisation import describe_utilisation, matmul_tflops, utilisation
from jitscale.config import Config
from jitscale.evaluation.generate import (
    autocast,
    configured_sampler,
    labels_of,
    noise_of,
    ready_to_sample,
    sample_images,
)
from jitscale.model.flops import forward_flops
from jitscale.model.jit import JiT
from jitscale.parallel import choose_device

WEIGHTS_DEVIATION = 0.02  # of what a fresh network sets to zero, so that it predicts something


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Guided sampling of one batch, `options.repeats` times."""
    settings = {"method": options.method, "steps": options.sampler_steps, "guidance_scale": options.guidance}
    dotted = [f"evaluation.{key}={value}" for key, value in settings.items()]
    config = measured_config(options, dotted, on_gpu=True)
    device = choose_device(config.run.device)
    sampler = configured_sampler(config.evaluation, config.diffusion)
    ids = range(options.batch)
    noise = config.diffusion.noise_scale * noise_of(config.run.seed, ids, config.model.image_size).to(device)
    labels = labels_of(ids, config.model.num_classes).to(device)
    with autocast(config, device), torch.no_grad():
        network = ready_to_sample(_drawn(config), config, device)
        ours = Sampling(network, lambda: sample_images(network, sampler, noise, labels))
        ours.warm_up(noise, labels)
        ours.draw()
        peak = peak_memory_mib(device)  # before another network is built
        theirs = None
        if options.compare == "reference":
            other = reference_network(_drawn(config), config, device, training=False)
            theirs = Sampling(other, lambda: reference_sample(other, sampler, noise, labels, other.null_label))
            theirs.warm_up(noise, labels)
        for _ in trange(options.repeats, unit="batch", desc="measure", disable=None):
            ours.draw()
            if theirs is not None:
                theirs.draw()
        # The first batch was drawn before the turns, to warm the device up.
        found = ours.result(after=1)
    tflops = found["images_per_second"] * found["evaluations_per_image"] * forward_flops(config.model) / 1e12
    product = matmul_tflops(device, arithmetic(config))
    result = {
        "config": options.config,
        "overrides": options.overrides,
        "batch": options.batch,
        "sampler_steps": options.sampler_steps,
        "guidance": options.guidance,
        **found,
        **utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
        **environment(device),
    }
    if theirs is not None:
        result["reference"] = theirs.result(after=0)
        result["ratio"] = result["reference"]["seconds"] / result["seconds"]
        result["largest_difference"] = float((ours.images - theirs.images).abs().max())
        result["largest_value"] = float(theirs.images.abs().max())
    return result


def _drawn(config: Config) -> JiT:
    """A fresh network, the same one each time, that predicts something."""
    torch.manual_seed(config.run.seed)
    network = JiT(config.model, config.diffusion)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=WEIGHTS_DEVIATION)
    return network


class Sampling:
    """Draws the batch from `network` by `draw`, and times each draw and the network's part of it."""

    def __init__(self, network: JiT, draw: Callable[[], torch.Tensor]) -> None:
        self.network, self._draw = network, draw
        self.device = network.pos_embed.device
        self.images = torch.empty(0)
        self._rows: list[int] = []
        self._watch = Stopwatch(self.device)
        self._network_seconds: list[float] = []
        self._begins: list[Any] = []
        self._ends: list[Any] = []
        network.register_forward_pre_hook(lambda *_: self._begins.append(self._now()))
        network.register_forward_hook(self._after)

    def _now(self) -> Any:
        """A moment on the device's own clock; the host does not wait for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _after(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._ends.append(self._now())
        self._rows.append(len(output))

    def warm_up(self, noise: torch.Tensor, labels: torch.Tensor) -> None:
        """Call the network with both sizes of a batch: with guidance and without."""
        for times in (1, 2):
            zeros = torch.zeros_like(noise).repeat(times, 1, 1, 1)
            self.network(zeros, torch.zeros(len(zeros), device=self.device), labels.repeat(times))

    def draw(self) -> None:
        """Draw the batch once."""
        for calls in (self._rows, self._begins, self._ends):
            calls.clear()
        with self._watch.part("batch"):
            self.images = self._draw()
        self._network_seconds.append(sum(map(_seconds_between, self._begins, self._ends)))

    def result(self, after: int) -> dict[str, Any]:
        """The speed of the draws after the first `after` ones."""
        seconds, batch = self._watch.times["batch"][after:], len(self.images)
        median = statistics.median(seconds)
        return {
            "images_per_second": batch / median,
            "seconds": median,
            "seconds_range": [min(seconds), max(seconds)],
            "network_share": sum(self._network_seconds[after:]) / sum(seconds),
            "evaluations_per_image": sum(self._rows) / batch,
            "network_calls": len(self._rows),
        }


def _seconds_between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""

    def of(part: dict[str, Any]) -> list[tuple[str, str]]:
        low, high = part["seconds_range"]
        return [
            ("images/s", f"{part['images_per_second']:.4f}"),
            ("time", f"{part['seconds']:.2f} s for {result['batch']} images ({low:.2f} to {high:.2f})"),
            ("network evaluations an image", f"{part['evaluations_per_image']:g}"),
            ("network calls", f"{part['network_calls']}"),
            ("share of the network", f"{part['network_share']:.1%}; the rest: guidance and integration"),
        ]

    lines = [
        *of(result),
        *describe_utilisation(result, result["matmul_tflops_per_second"]),
        ("peak memory", f"{result['peak_memory_mib']:.0f} MiB"),
    ]
    if "reference" in result:
        lines += [(f"the authors' way: {name}", value) for name, value in of(result["reference"])]
        lines += [
            ("ours / the authors' way", f"{result['ratio']:.2f}"),
            ("largest difference of a pixel", f"{result['largest_difference']:.1e} of {result['largest_value']:.2g}"),
        ]
    return lines
