"""From a low to a high resolution: resize the two layers that see the patch size, preserving the function.

With k = new patch / old patch, U nearest upsampling inside a patch and D average pooling, the new patch embedding is
W D and the new output layer is U V. The upgraded network, before any training, is the old one seen through pooling:

    avgpool(net'(z', t, y)) = net(avgpool(z'), t, y)

Noise of standard deviation k pools to standard deviation 1, so the noise scale is multiplied by k. All functions are
pure and linear in the weights: they apply to every average as they do to the weights themselves.
"""

from __future__ import annotations

import torch

from jitscale.config import Config, network_differences
from jitscale.errors import ConfigError

PATCH_EMBEDDING = "x_embedder.proj1.weight"
OUTPUT_WEIGHT = "final_layer.linear.weight"
OUTPUT_BIAS = "final_layer.linear.bias"
RESIZED = (PATCH_EMBEDDING, OUTPUT_WEIGHT, OUTPUT_BIAS)


def upgrade_factor(old: Config, new: Config) -> int:
    """k = new patch size / old patch size.

    Raises:
        ConfigError: the two networks differ in more than image and patch size, the number of tokens changes, the
            ratio is not a whole number, or the new noise scale is not k times the old one.
    """
    differing = network_differences(old, new, ignored=("image_size", "patch_size"))
    if differing:
        raise ConfigError(
            f"an upgrade changes image and patch size only, the target also differs in {'; '.join(differing)}"
        )
    factor, rest = divmod(new.model.patch_size, old.model.patch_size)
    if rest or factor < 1:
        raise ConfigError(
            f"model.patch_size={new.model.patch_size} must be a multiple of the old patch size {old.model.patch_size}"
        )
    if new.model.image_size != factor * old.model.image_size:
        raise ConfigError(
            f"model.image_size={new.model.image_size} must be {factor} x {old.model.image_size}, as the patch size "
            f"grows by {factor}: the number of tokens stays"
        )
    noise_scale = factor * old.diffusion.noise_scale
    if new.diffusion.noise_scale != noise_scale:
        raise ConfigError(
            f"diffusion.noise_scale={new.diffusion.noise_scale} must be {factor} x the old one, since pooling divides "
            f"the noise by {factor}; add diffusion.noise_scale={noise_scale}"
        )
    return factor


def upgrade_tensor(name: str, tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """One parameter of the network at `factor` times the resolution.

    Args:
        name: the parameter's name in the network.
        tensor: the patch embedding (bottleneck, 3, p, p), the output layer's weight (p * p * 3, C) or bias
            (p * p * 3,) with rows in the order row, column, channel; every other parameter is returned as it is.
    """
    if name == PATCH_EMBEDDING:
        return _repeat(tensor, factor, (2, 3)) / factor**2
    if name in (OUTPUT_WEIGHT, OUTPUT_BIAS):
        patch = round((tensor.shape[0] // 3) ** 0.5)
        rows = tensor.unflatten(0, (patch, patch, 3))
        return _repeat(rows, factor, (0, 1)).flatten(0, 2)
    return tensor


def _repeat(tensor: torch.Tensor, factor: int, axes: tuple[int, int]) -> torch.Tensor:
    for axis in axes:
        tensor = tensor.repeat_interleave(factor, dim=axis)
    return tensor
