"""Training through rising resolutions: the stages that `progressive.*` adds before the run's own resolution.

All stages have the same number of tokens, so an image costs the same in each. Patches and noise scale grow with the
resolution (checkpoints/upgrade.py). The learning rate of the patch embedding falls with the square of the resolution
(docs/upgrade.md). Each lower stage is a run in a subfolder: it can be inspected, resumed and evaluated like any run.
The last stage is the run itself.
"""

from dataclasses import replace
from pathlib import Path

from jitscale.config import Config, OptimConfig, ProgressiveConfig, patch_elements

LOWER_STAGES = "at_*px"


def stages_of(config: Config) -> list[Config]:
    """One configuration for each stage, from the lowest resolution to the run's own."""
    lower = config.progressive
    final = replace(config, progressive=ProgressiveConfig())
    stages = [_stage(final, *each) for each in zip(lower.resolutions, lower.images, strict=True)] + [final]
    return [replace(stage, optim=_optim(stage, stages[0].model.image_size)) for stage in stages]


def run_dirs(run_dir: Path) -> list[Path]:
    """The folder of a run, and the folders of its lower stages."""
    return [run_dir, *sorted(run_dir.glob(LOWER_STAGES))]


def _optim(stage: Config, lowest: int) -> OptimConfig:
    factor = stage.optim.lr_factor_patch_embedding * (lowest / stage.model.image_size) ** 2
    return replace(stage.optim, lr_factor_patch_embedding=factor)


def _stage(final: Config, resolution: int, images: int) -> Config:
    model, run, evaluation = final.model, final.run, replace(final.evaluation, at_end=False)
    if evaluation.guide is not None:  # the guide works at the last resolution only
        evaluation = replace(evaluation, guide=None, guidance_scale=1.0)
    folder = Path(run.dir) / LOWER_STAGES.replace("*", str(resolution))
    lower = replace(model, image_size=resolution, patch_size=model.patch_size * resolution // model.image_size)
    diffusion = replace(final.diffusion, noise_scale=final.diffusion.noise_scale * resolution / model.image_size)
    if diffusion.rank == patch_elements(model):  # full rank stays full rank
        diffusion.rank = patch_elements(lower)
    return replace(
        final,
        model=lower,
        diffusion=diffusion,
        evaluation=evaluation,
        tracking=replace(final.tracking, name=f"{final.tracking.name or Path(run.dir).name}_{resolution}px"),
        run=replace(run, dir=str(folder), max_images=images, max_steps=None),
    )
