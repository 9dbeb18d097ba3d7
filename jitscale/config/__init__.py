"""Every setting of a run: the schema, how files and overrides become a configuration, and which values are refused.

The functions of loading.py are imported at their first use, because they need OmegaConf and the schema does not.
"""

from typing import TYPE_CHECKING, Any

from jitscale.config.schema import (
    AUTO,
    CHANNELS,
    CHOICES,
    RGB,
    SETTINGS,
    WIDEST_POWER,
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    ProgressiveConfig,
    RunConfig,
    TrackingConfig,
    ema_name,
    held_out_fraction,
    images_of_run,
    network_differences,
    power_name,
    weight_set_names,
)
from jitscale.config.shapes import (
    has_fitted_subspace,
    image_shape,
    image_tokens,
    middle_is_routed,
    patch_elements,
    routed_blocks,
    routed_part,
    routed_tokens,
    routes,
)

if TYPE_CHECKING:
    from jitscale.config.loading import check_model_config, explained_yaml, from_dict, load_config, to_dict, to_yaml

__all__ = ["AUTO", "CHANNELS", "CHOICES", "RGB", "SETTINGS", "WIDEST_POWER"]
__all__ += ["Config", "EvaluationConfig", "ModelConfig"]
__all__ += ["CheckpointConfig", "DataConfig", "DiffusionConfig", "EmaConfig", "EngineConfig", "OptimConfig"]
__all__ += ["ProgressiveConfig", "RunConfig", "TrackingConfig", "check_model_config", "explained_yaml"]
__all__ += ["from_dict", "load_config"]
__all__ += ["ema_name", "held_out_fraction", "images_of_run", "network_differences", "power_name", "to_dict", "to_yaml"]
__all__ += ["has_fitted_subspace", "image_shape", "image_tokens", "middle_is_routed", "patch_elements", "routed_blocks"]
__all__ += ["routed_part", "routed_tokens", "routes", "weight_set_names"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jitscale.config import loading  # noqa: PLC0415

    return getattr(loading, name)
