"""From pixels to noisy images. It needs only torch, because the benchmark of a step runs without other packages.

Shapes: B images, A channels, S pixels per side.
"""

import torch

from jitscale.diffusion.objective import interpolate
from jitscale.keyed_random import Int64Array


def add_noise(
    images: torch.Tensor, flip: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, noise_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean images x, scaled noise e and noisy images z, float32 (B, A, S, S) each. Compiled, it is one kernel.

    `images` are uint8 (B, S, S, A). `flip` (B,) says which to mirror. `noise` (B, A, S, S) is standard normal. Times
    `t` (B,) are in [0, 1].
    """
    x, e = to_model_input(images, flip), noise_scale * noise
    return x, e, interpolate(x, e, t)


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """float32 (B, A, S, S) in [-1, 1] from uint8 `images` (B, S, S, A), mirrored where `flip` (B,) is true.

    Computed in float32 for every precision of training, because bf16 arithmetic would give other pixels. The result is
    contiguous.
    """
    flipped = torch.where(flip[:, None, None, None], images.flip(2), images)
    channels_first = flipped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first / 127.5 - 1


def seeded_noise(seeds: Int64Array, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise, float32 (B, A, S, S), for images of `shape` (A, S, S): one random stream for each seed.

    It is drawn on the device of `generator`.
    """
    noise = torch.empty(len(seeds), *shape, device=generator.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(int(seed)))
    return noise
