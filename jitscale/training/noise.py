"""From pixels to noisy images; it needs torch alone, since the benchmark of a step runs where nothing else is.

Shapes: B images, A channels, S pixels a side.
"""

import torch

from jitscale.diffusion.objective import interpolate
from jitscale.keyed_random import Int64Array


def add_noise(
    images: torch.Tensor, flip: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, noise_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean images x, scaled noise e and noisy images z, float32 (B, A, S, S) each; compiled, it is one kernel.

    It takes `images`, uint8 (B, S, S, A); `flip` (B,), whether to mirror; standard normal `noise` (B, A, S, S); and
    times `t` (B,) in [0, 1].
    """
    x, e = to_model_input(images, flip), noise_scale * noise
    return x, e, interpolate(x, e, t)


def to_model_input(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """float32 (B, A, S, S) in [-1, 1] from uint8 `images` (B, S, S, A), mirrored where `flip` (B,) is true.

    Computed in float32 whatever precision follows, since bf16 arithmetic gives other pixels. Contiguous, so that noise
    of its layout does not depend on that of the images.
    """
    flipped = torch.where(flip[:, None, None, None], images.flip(2), images)
    channels_first = flipped.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first / 127.5 - 1


def seeded_noise(seeds: Int64Array, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise for images of `shape` (A, S, S), on the device of `generator`, one stream a seed.

    float32 (B, A, S, S).
    """
    noise = torch.empty(len(seeds), *shape, device=generator.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(int(seed)))
    return noise
