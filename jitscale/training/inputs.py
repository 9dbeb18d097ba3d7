"""From batches in the CPU's memory to what the network sees.

Shapes: B images of a micro-batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from jitscale.diffusion.objective import interpolate

if TYPE_CHECKING:
    from jitscale.data.loader import Batch


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] from uint8 `images` (B, H, W, 3), mirrored where `flip` (B,) is true.

    In float32 whatever precision follows, since bf16 arithmetic gives other pixels; and contiguous, since
    noise that is drawn like it must not depend on a memory layout.
    """
    flipped = torch.where(flip[:, None, None, None], images.flip(2), images)
    channels_first = flipped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first / 127.5 - 1


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


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with images and labels on `device`; on GPUs the next one is copied while this one is used.

    The images must lie in pinned memory, or the copies wait for the GPU.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            copied = replace(batch, images=images, labels=batch.labels.to(device, non_blocking=True))
            return copied, stream.record_event()

    def ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(current)  # its memory is not given away while the step uses it
        return batch

    ahead = None
    for batch in batches:
        following = copy(batch)
        if ahead is not None:
            yield ready(*ahead)
        ahead = following
    if ahead is not None:
        yield ready(*ahead)
