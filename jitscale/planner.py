"""What a run costs, counted from shapes."""

from __future__ import annotations

from jitscale.config import ModelConfig
from jitscale.model.layers import TIMESTEP_FREQUENCIES, swiglu_width

TRAINING_PASSES = 3  # one forward pass and a backward pass of twice its cost


def forward_flops(model: ModelConfig) -> int:
    """Floating-point operations of one forward pass of one image: 2 x multiply-adds of every matrix product.

    Counted from shapes, because the conditioning layers hold a third of the parameters and do a 600th of the work:
    6 x parameters x tokens would overstate the utilisation by half.
    """
    width, inner = model.hidden_size, swiglu_width(model.hidden_size)
    tokens = (model.image_size // model.patch_size) ** 2
    pixels = model.patch_size**2 * 3
    products = TIMESTEP_FREQUENCIES * width + width * width
    products += tokens * (pixels * model.bottleneck_dim + model.bottleneck_dim * width)
    for index in range(model.depth):
        length = tokens + (model.in_context_len if index >= model.in_context_start else 0)
        products += length * (4 * width * width + 3 * width * inner)  # qkv, projection, feed-forward
        products += 2 * length * length * width  # q k^T and attention times v
        products += 6 * width * width  # modulation, once an image
    products += tokens * width * pixels + 2 * width * width
    return 2 * products


def training_flops(model: ModelConfig) -> int:
    """Floating-point operations of one training step of one image."""
    return TRAINING_PASSES * forward_flops(model)
