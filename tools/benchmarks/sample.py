"""Time guided sampling of one batch, as evaluation does it; with --compare, in turns with the authors' way."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import trange

from benchmarks import measuring
from benchmarks.authors import authors_network, authors_sample
from jitscale.config import Config, image_shape
from jitscale.diffusion.sampler import Sampler
from jitscale.errors import UserError
from jitscale.evaluation import generate
from jitscale.model.flops import forward_flops
from jitscale.model.jit import JiT

WEIGHTS_DEVIATION = 0.02  # for weights that a fresh network sets to zero, so that its prediction is not zero


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Sample one batch with guidance, `options.repeats` times."""
    settings = {"method": options.method, "steps": options.sampler_steps, "guidance_scale": options.guidance}
    dotted = [f"evaluation.{key}={value}" for key, value in settings.items()]
    config, device = measuring.measured_config(options, dotted, on_gpu=True)
    sampler = generate.configured_sampler(config.evaluation, config.diffusion)
    if options.compare == "authors" and not _is_the_authors(sampler):
        known = "Euler and Heun steps at uniform times, without internal guidance"
        raise UserError(f"--compare authors: the authors have {known}; leave it out for {sampler}")
    ids = range(options.batch)
    noise = config.diffusion.noise_scale * generate.noise_of(config.run.seed, ids, image_shape(config.model)).to(device)
    labels = generate.labels_of(ids, config.model.num_classes).to(device)
    with generate.autocast(config, device), torch.no_grad():
        network = generate.ready_to_sample(_drawn(config), config, device)
        generate.sample_images(network, sampler, noise, labels)  # warms the device up
        peak = measuring.peak_memory_mib(device)  # before another network is built
        ways = [Sampling(network, lambda: generate.sample_images(network, sampler, noise, labels))]
        if options.compare == "authors":
            other = authors_network(_drawn(config), config, device, training=False)
            other(noise, torch.zeros(len(noise), device=device), labels)
            ways.append(Sampling(other, lambda: authors_sample(other, sampler, noise, labels)))
        for _ in trange(options.repeats, unit="batch", desc="measure", disable=None):
            for way in ways:
                way.draw()
    ours = ways[0].result()
    tflops = ours["images_per_second"] * ours["evaluations_per_image"] * forward_flops(config.model) / 1e12
    product = measuring.matmul_tflops(config, device)
    result = {
        **ours,
        **measuring.utilisation(tflops, device, product),
        "matmul_tflops_per_second": product,
        "peak_memory_mib": peak,
    }
    if len(ways) > 1:
        result["authors"] = ways[1].result()
        result["ratio"] = result["authors"]["seconds"] / ours["seconds"]
        result["largest_difference"] = float((ways[0].images - ways[1].images).abs().max())
        result["largest_value"] = float(ways[1].images.abs().max())
    return result


def _is_the_authors(sampler: Sampler) -> bool:
    return sampler.method in ("euler", "heun") and sampler.time_shift == sampler.internal_guidance == 1.0


def _drawn(config: Config) -> JiT:
    """A fresh network, the same one each time, whose prediction is not zero."""
    torch.manual_seed(config.run.seed)
    network = JiT(config.model, config.diffusion)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=WEIGHTS_DEVIATION)
    return network


class Sampling:
    """Samples a batch from `network` by `draw`, and times each call and the network's part of it."""

    def __init__(self, network: JiT, draw: Callable[[], torch.Tensor]) -> None:
        self._draw, self._forward, self._device = draw, network.forward, network.pos_embed.device
        self._watch = measuring.Stopwatch(self._device)
        self._calls: list[tuple[Any, Any, int]] = []  # calls in the last draw: begin, end, rows of the batch
        self._network_seconds = 0.0
        network.forward = self._timed_forward  # type: ignore[method-assign, assignment]

    def draw(self) -> None:
        """Sample the batch once."""
        self._calls.clear()
        with self._watch.part("batch"):
            self.images = self._draw()
        for begin, end, _ in self._calls:
            self._network_seconds += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3

    def _timed_forward(self, *inputs: torch.Tensor, middle: bool = False) -> torch.Tensor:
        begin = self._now()
        output = self._forward(*inputs, middle=middle)
        self._calls.append((begin, self._now(), len(inputs[0])))
        return output

    def _now(self) -> Any:
        """A point in time by the device's own clock, without a wait of the host."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def result(self) -> dict[str, Any]:
        """The speed of the draws."""
        seconds, batch = self._watch.times["batch"], len(self.images)
        median = statistics.median(seconds)
        return {
            "images_per_second": batch / median,
            "seconds": median,
            "seconds_range": [min(seconds), max(seconds)],
            "network_share": self._network_seconds / sum(seconds),
            "evaluations_per_image": sum(rows for _, _, rows in self._calls) / batch,
            "network_calls": len(self._calls),
        }


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""

    def of(part: dict[str, Any]) -> measuring.Table:
        low, high = part["seconds_range"]
        return [
            ("images/s", f"{part['images_per_second']:.4f}"),
            ("time", f"{part['seconds']:.2f} s for {result['batch']} images ({low:.2f} to {high:.2f})"),
            ("network evaluations per image", f"{part['evaluations_per_image']:g}"),
            ("network calls", f"{part['network_calls']}"),
            ("share of the network", f"{part['network_share']:.1%}; the rest: guidance and integration"),
        ]

    lines = [*of(result), *measuring.describe_utilisation(result, result["matmul_tflops_per_second"])]
    if "authors" in result:
        lines += [(f"the authors' way: {name}", value) for name, value in of(result["authors"])]
        difference = f"{result['largest_difference']:.1e} of {result['largest_value']:.2g}"
        lines.append(("ours / the authors' way", f"{result['ratio']:.2f}"))
        lines.append(("largest difference of a pixel", difference))
    return lines
