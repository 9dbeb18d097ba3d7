"""From batches in the CPU's memory to what the network sees, with everything that is drawn for them.

Shapes: B images of a micro-batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from jitscale.config import Config
from jitscale.diffusion.objective import interpolate
from jitscale.keyed_random import Int64Array, Purpose, normal, uniform

if TYPE_CHECKING:
    from jitscale.data.loader import Batch


@dataclass
class Inputs:
    """A micro-batch and what was drawn for it; the noise is drawn on the device, from the positions."""

    images: torch.Tensor  # uint8 (B, H, W, 3)
    labels: torch.Tensor  # int64 (B,), the null label where the class is dropped
    flip: torch.Tensor  # bool (B,)
    normal: torch.Tensor  # float32 (B,), what times are made of
    positions: npt.NDArray[np.int64]  # (B,), in the global sequence
    bad_samples: list[str]  # what was wrong with those that others stand in for


TRAVELLING = ("images", "labels", "flip", "normal")  # of the inputs: what goes to the device


def drawn(batch: Batch, config: Config) -> Inputs:
    """What `batch` becomes. Every draw is keyed by the sample's position in the global sequence."""
    seed, positions = config.run.seed, batch.positions.numpy()
    dropped = torch.from_numpy(uniform(seed, Purpose.LABEL_DROP, positions) < config.diffusion.label_drop)
    return Inputs(
        images=batch.images,
        labels=batch.labels.masked_fill(dropped, config.model.num_classes),
        flip=torch.from_numpy(config.data.flip & (uniform(seed, Purpose.FLIP, positions) < 0.5)),
        normal=torch.from_numpy(normal(seed, Purpose.TIME, positions)).float(),
        positions=positions,
        bad_samples=batch.bad_samples,
    )


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] from uint8 `images` (B, H, W, 3), mirrored where `flip` (B,) is true.

    In float32 whatever precision follows, since bf16 arithmetic gives other pixels; and contiguous, since
    noise that is drawn like it must not depend on a memory layout.
    """
    flipped = torch.where(flip[:, None, None, None], images.flip(2), images)
    channels_first = flipped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first / 127.5 - 1


def seeded_noise(seeds: Int64Array, image_size: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise on the device of `generator`, one stream a seed: float32 (B, 3, S, S)."""
    noise = torch.empty(len(seeds), 3, image_size, image_size, device=generator.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(int(seed)))
    return noise


def noised(
    images: torch.Tensor, flip: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, noise_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one forward pass starts from; compiled, one kernel.

    Args:
        images: uint8 (B, H, W, 3).
        flip: (B,), whether to mirror.
        noise: standard normal, (B, 3, H, W).
        t: (B,) in [0, 1].
        noise_scale: of the noise.

    Returns:
        Clean images x, noise e and noisy images z, float32 (B, 3, H, W) each.
    """
    x = to_model_input(images, flip)
    e = noise_scale * noise
    return x, e, interpolate(x, e, t)


def copied_ahead(inputs: Iterator[Inputs], device: torch.device) -> Iterator[Inputs]:
    """The same inputs on `device`; on GPUs the next ones are drawn and copied while these are used.

    From page-locked memory, or the copies would wait for the GPU; images that lie there already are not moved.
    """
    if device.type != "cuda":
        yield from inputs
        return
    stream = torch.cuda.Stream(device)

    def copy(one: Inputs) -> tuple[Inputs, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            copies = {name: getattr(one, name).pin_memory().to(device, non_blocking=True) for name in TRAVELLING}
            return replace(one, **copies), stream.record_event()

    def ready(one: Inputs, copied: torch.cuda.Event) -> Inputs:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for name in TRAVELLING:
            getattr(one, name).record_stream(current)  # its memory is not given away while the step uses it
        return one

    ahead = None
    for one in inputs:
        following = copy(one)
        if ahead is not None:
            yield ready(*ahead)
        ahead = following
    if ahead is not None:
        yield ready(*ahead)
