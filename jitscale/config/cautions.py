"""Warnings about settings that are allowed but rarely intended."""

from jitscale.config.schema import Config, ema_name

START_SHARE = 0.5  # of an average: with more of it, samples are those of the network that the run began with
LARGE_DEPTH, LARGE_WIDTH = 32, 1280  # JiT-H's (arXiv 2511.13720, table 9), which trains with dropout 0.2


def cautions(config: Config, images: int) -> list[str]:
    """One line for each setting that is rarely intended in a training on `images` images."""
    found = []
    model = config.model
    if config.optim.warmup_images > images:
        limit = f"is more than the {images} images of the run: the learning rate never reaches optim.lr"
        found.append(f"optim.warmup_images={config.optim.warmup_images} {limit}")
    if model.depth >= LARGE_DEPTH and model.hidden_size >= LARGE_WIDTH:
        # Rank-asymmetric prediction was published without dropout in attention (arXiv 2605.12964).
        wanted = ("proj_dropout",) if config.diffusion.prediction == "asym" else ("attn_dropout", "proj_dropout")
        if named := " and ".join(f"model.{name}" for name in wanted if getattr(model, name) == 0):
            found.append(f"{named} of 0: the paper trains networks of JiT-H's size and larger with 0.2")
    diffusion, until = config.diffusion, config.run.route_until_images
    if diffusion.subspace is not None and diffusion.prediction != "asym":
        found.append(f"diffusion.subspace={diffusion.subspace} does nothing without diffusion.prediction=asym")
    if until is not None and model.route_share == 0:
        found.append(f"run.route_until_images={until} does nothing without model.route_share")
    elif until is not None and until >= images:
        found.append(f"run.route_until_images={until} is not before the end of the run, at {images} images")
    return found


def start_caution(config: Config, weights: str, steps: int) -> str | None:
    """A line about an average that after `steps` is mostly the weights that the run began with, or None.

    In an exponential average without warm-up their share is decay^steps. It is unknown if the run took its averages
    over from other weights (`run.init_from`): then it began with an average.
    """
    decays = {ema_name(decay): decay for decay in config.ema.decays}
    taken_over = config.run.init_from is not None and config.run.init_ema
    if weights not in decays or config.ema.warmup or taken_over:
        return None
    share = decays[weights] ** steps
    if share <= START_SHARE:
        return None
    what = f"{weights} after {steps} steps is {share:.0%} the weights that the run began with, and so are its samples"
    return f"{what}; set ema.warmup=true, add a shorter average to ema.decays, or measure evaluation.weights=model"
