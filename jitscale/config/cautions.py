"""Warnings about settings that are allowed but rarely intended."""

from jitscale.config.schema import Config, ema_name

START_SHARE = 0.5  # share of the initial weights in an average, above which samples are those of the initial network
LARGE_DEPTH, LARGE_WIDTH = 32, 1280  # JiT-H, which the paper trains with dropout 0.2 (arXiv 2511.13720, table 9)


def cautions(config: Config, images: int) -> list[str]:
    """One line for each setting that is rarely intended in a run over `images` images."""
    found = []
    model = config.model
    if config.optim.warmup_images > images:
        limit = f"is more than the {images} images of the run: the learning rate never reaches optim.lr"
        found.append(f"optim.warmup_images={config.optim.warmup_images} {limit}")
    if model.depth >= LARGE_DEPTH and model.hidden_size >= LARGE_WIDTH:
        # Rank-asymmetric prediction was published without dropout in attention (arXiv 2605.12964).
        wanted = ("proj_dropout",) if config.diffusion.prediction == "asym" else ("attn_dropout", "proj_dropout")
        if named := " and ".join(f"model.{name}" for name in wanted if getattr(model, name) == 0):
            found.append(f"{named} of 0: the paper trains JiT-H and larger networks with 0.2")
    diffusion, until = config.diffusion, config.run.route_until_images
    if diffusion.subspace is not None and diffusion.prediction != "asym":
        found.append(f"diffusion.subspace={diffusion.subspace} does nothing without diffusion.prediction=asym")
    if until is not None and model.route_share == 0:
        found.append(f"run.route_until_images={until} does nothing without model.route_share")
    elif until is not None and until >= images:
        found.append(f"run.route_until_images={until} is not before the end of the run, at {images} images")
    return found


def start_caution(config: Config, weights: str, steps: int) -> str | None:
    """A line if the average `weights` still consists mostly of the initial weights after `steps`, else None.

    In an exponential average without warm-up, the share of the initial weights is decay^steps. If the run took its
    averages over from other weights (`run.init_from`), the share is unknown and the result is None.
    """
    decays = {ema_name(decay): decay for decay in config.ema.decays}
    taken_over = config.run.init_from is not None and config.run.init_ema
    if weights not in decays or config.ema.warmup or taken_over:
        return None
    share = decays[weights] ** steps
    if share <= START_SHARE:
        return None
    what = f"after {steps} steps, {share:.0%} of {weights} are the initial weights, and its samples show it"
    return f"{what}; set ema.warmup=true, add a shorter average to ema.decays, or measure evaluation.weights=model"
