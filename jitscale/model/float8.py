"""Matrix products in float8, with torchao: each row of both factors has a scale, from its largest element.

For GPUs from Hopper on. float8 is used in the attention and feed-forward layers, which do nearly all of the network's
work. Sums, norms, modulation, and the first and last layers of the network keep their precision.
"""

import torch
from torch import Tensor

from jitscale.errors import ConfigError
from jitscale.model.layers import Product, in_arithmetic_of

SMALLEST = 16  # all sides of a float8 product must be multiples of this


def float8_product(device: torch.device) -> Product:
    """x (..., K), weight (M, K), bias (M,) -> (..., M), like torch.nn.functional.linear; emulated on CPUs.

    K and M are multiples of 16. x may have any number of rows: they are padded with zeros, because the backward pass
    sums over rows. Raises a ConfigError if torchao is missing, or the GPU has no float8.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"engine.float8=true: {torch.cuda.get_device_name(device)} has no float8; set it to false")
    try:
        from torchao.float8.config import Float8LinearConfig  # noqa: PLC0415  # an extra
        from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"engine.float8=true: torchao cannot be imported ({error}); pip install 'jitscale[float8]', or set it to "
            "false"
        ) from error
    config = Float8LinearConfig.from_recipe_name("rowwise")
    if device.type != "cuda":
        object.__setattr__(config, "emulate", True)
    products = Float8Linear(SMALLEST, SMALLEST, config=config, device="meta").linear_mm_config

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = in_arithmetic_of(x, x).flatten(0, -2)
        if missing := -len(rows) % SMALLEST:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        out = matmul_with_hp_or_float8_args.apply(rows, in_arithmetic_of(x, weight).t(), products, config)
        return (out[: len(rows) - missing] + bias.to(out.dtype)).unflatten(0, x.shape[:-1])

    return product
