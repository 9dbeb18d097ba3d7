"""Floating-point operations of a network, counted from shapes, and the peaks of GPUs."""

import re
from dataclasses import replace

import torch

from jitscale.config import (
    Config,
    ModelConfig,
    image_tokens,
    middle_is_routed,
    patch_elements,
    routed_blocks,
    routed_part,
    routed_tokens,
    routes,
)
from jitscale.model.layers import TIMESTEP_FREQUENCIES, swiglu_width

# Peaks in bf16 without sparsity, TFLOP/s, from the vendors' data sheets.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}
TRAINING_PASSES = 3  # a training step costs three forward passes: the backward pass costs two


def forward_flops(model: ModelConfig, *, training: bool = False) -> int:
    """Floating-point operations of one forward pass of one image: 2 x multiply-adds of every matrix product.

    Counted from shapes, because the conditioning layers hold a third of the parameters and do a 600th of the work:
    6 x parameters x tokens would overstate the utilisation by half. Only in `training` are tokens routed and the middle
    output layer computed. Sampling computes that layer only for internal guidance, which is not counted.
    """
    width, inner = model.hidden_size, swiglu_width(model.hidden_size)
    tokens, pixels = image_tokens(model), patch_elements(model)
    products = TIMESTEP_FREQUENCIES * width + width * width
    products += tokens * (pixels * model.bottleneck_dim + model.bottleneck_dim * width)
    for index in range(model.depth):
        length = block_tokens(model, index, training=training)
        products += length * (4 * width * width + 3 * width * inner)  # qkv, projection, feed-forward
        products += 2 * length * length * width  # q k^T and attention times v
        products += 6 * width * width  # modulation, once per image
    products += tokens * width * pixels + 2 * width * width
    if training and model.middle_head > 0:
        seen = routed_tokens(model) if middle_is_routed(model) else tokens
        products += seen * width * pixels + 2 * width * width
    return 2 * products


def block_tokens(model: ModelConfig, index: int, *, training: bool = False) -> int:
    """Tokens in block `index`: image tokens (in `training` without those that skip the block) and class tokens."""
    tokens = routed_tokens(model) if training and index in routed_blocks(model) else image_tokens(model)
    return tokens + (model.in_context_len if index >= model.in_context_start else 0)


def training_flops(model: ModelConfig, *, routed: bool = True) -> int:
    """Floating-point operations of one training step of one image; without `routed`, all tokens pass all blocks."""
    return TRAINING_PASSES * forward_flops(model if routed else replace(model, route_share=0.0), training=True)


def mean_training_flops(config: Config) -> float:
    """The mean of `training_flops` over the run, which may end with a part without routing."""
    routed, whole = (training_flops(config.model, routed=routed) for routed in (True, False))
    return whole + routed_part(config) * (routed - whole)


def model_flops_utilisation(config: Config, images: int, rate: float, peak: float) -> float:
    """MFU of a device that trains `rate` images per second, with a peak of `peak` TFLOP/s, after `images` images."""
    return rate * training_flops(config.model, routed=routes(config.run, images)) / (peak * 1e12)


def peak_tflops(device: torch.device) -> float | None:
    """The bf16 peak of a GPU in TFLOP/s, from its data sheet; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [known for known in PEAK_BF16_TFLOPS if re.search(rf"\b{known}\b", name)]
    return PEAK_BF16_TFLOPS[max(matches, key=len)] if matches else None
