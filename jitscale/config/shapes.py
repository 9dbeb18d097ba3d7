"""Quantities that follow from a network's settings: tokens, blocks, and whether it has a fitted subspace."""

from jitscale.config.schema import Config, DiffusionConfig, ModelConfig, RunConfig, images_of_run


def image_tokens(model: ModelConfig) -> int:
    """Number of tokens of an image."""
    return (model.image_size // model.patch_size) ** 2


def image_shape(model: ModelConfig) -> tuple[int, int, int]:
    """Channels, height and width of an input image."""
    return model.in_channels, model.image_size, model.image_size


def patch_elements(model: ModelConfig) -> int:
    """Number of values in a patch: pixels times channels."""
    return model.patch_size**2 * model.in_channels


def has_fitted_subspace(model: ModelConfig, diffusion: DiffusionConfig) -> bool:
    """True if asym's subspace is fitted to data. With rank 0 or full rank there is nothing to fit."""
    return diffusion.prediction == "asym" and 0 < diffusion.rank < patch_elements(model)


def routed_tokens(model: ModelConfig) -> int:
    """Tokens of an image that pass through the routed blocks in training."""
    return image_tokens(model) - round(model.route_share * image_tokens(model))


def routed_blocks(model: ModelConfig) -> range:
    """The blocks that the other tokens skip in training; empty if no token is routed."""
    first, end = model.route_blocks
    return range(model.depth)[first:end] if routed_tokens(model) < image_tokens(model) else range(0)


def middle_is_routed(model: ModelConfig) -> bool:
    """True if the middle output layer sees only the tokens that pass through the routed blocks."""
    return model.middle_head - 1 in routed_blocks(model)


def routes(run: RunConfig, images: int) -> bool:
    """True if tokens are routed in the step that ends at `images` images seen."""
    return run.route_until_images is None or images <= run.route_until_images


def routed_part(config: Config) -> float:
    """The share of the run's images for which `routes` is true, in [0, 1]."""
    until = config.run.route_until_images
    return 1.0 if until is None else min(1.0, until / max(1, images_of_run(config)))
