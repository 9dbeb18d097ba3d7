"""A network that trains in milliseconds, as a configuration, as overrides and as YAML."""

from jitscale.config import ModelConfig

MODEL = ModelConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    bottleneck_dim=8,
    in_context_len=4,
    in_context_start=1,
    num_classes=10,
)
_SIZES = {name: value for name, value in vars(MODEL).items() if value != getattr(ModelConfig(), name)}
OVERRIDES = tuple(f"model.{name}={value}" for name, value in _SIZES.items())


def model_yaml(**others: object) -> str:
    """The `model` section of a configuration, in one line."""
    sizes = _SIZES | others
    return "model: {" + ", ".join(f"{name}: {value}" for name, value in sizes.items()) + "}"
