"""Cost of the measurements of a run, in images trained on: counted from the sampler, before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from jitscale.config import Config, EvaluationConfig, images_of_run, weight_set_names
from jitscale.evaluation.generate import configured_sampler, grid_ids
from jitscale.evaluation.settings import final_settings, images_of, sweep_images
from jitscale.progressive import stages_of

FORWARD_SHARE = 1 / 3  # of a training step of an image: its backward pass costs twice the forward pass


@dataclass
class MeasuringCost:
    """What the generated images cost, in images trained on.

    The feature networks are not counted: Inception's forward pass of an image is 0.1% of sampling it with JiT-B.
    """

    evaluation: EvaluationConfig  # how many images each measurement generates
    trained: int = 0  # images that the run sees
    on_the_way: int = 0  # how often few images are measured while training
    few: float = 0.0  # the cost of all those
    pictures: float = 0.0  # the cost of all pictures of samples while training
    settings: int = 0  # of the sweep; 1 for none
    sweep: float = 0.0  # its cost
    final: float = 0.0  # the cost of the images of the best settings, beyond what the sweep has generated

    @property
    def share(self) -> float:
        """Of the compute of training."""
        return self.share_of(self.few + self.pictures + self.sweep + self.final)

    def share_of(self, cost: float) -> float:
        """What one of the costs is of the compute of training."""
        return cost / max(1, self.trained)

    def __str__(self) -> str:
        evaluation, parts = self.evaluation, []
        for count, text, cost in (
            (self.on_the_way, f"{self.on_the_way} x {evaluation.few_images:,} images on the way", self.few),
            (self.pictures, "pictures of samples", self.pictures),
            (self.settings > 1, f"{self.settings} settings x {sweep_images(evaluation):,} in a sweep", self.sweep),
            (self.settings, f"{evaluation.num_images:,} at the end", self.final),
        ):
            if count:
                parts.append(f"{text} ({percent(self.share_of(cost))})")
        return f"{', '.join(parts) or 'nothing'}; {percent(self.share)} of the run's compute"


def percent(share: float) -> str:
    """A share in words, such as 1.4%."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:,.0f}%"


def measuring_cost(config: Config) -> MeasuringCost:
    """Cost of the measurements of a training, of all its stages.

    Raises:
        ConfigError: `evaluation.sweep` is impossible.
    """
    evaluation, cost = config.evaluation, MeasuringCost(config.evaluation)
    for stage in stages_of(config):
        images, image_cost = images_of_run(stage), _image_cost(stage.evaluation, stage)
        cost.trained += images
        if evaluation.every_images:
            # The final evaluation takes the place of a measurement at the last step.
            last = images - config.data.batch_size if stage.evaluation.at_end else images
            times = max(0, last) // evaluation.every_images
            cost.on_the_way += times
            cost.few += times * evaluation.few_images * image_cost
        if evaluation.grid_every_images:
            grids = images // evaluation.grid_every_images
            cost.pictures += grids * len(grid_ids(stage.model.num_classes)) * image_cost
    if evaluation.at_end:
        settings = final_settings(config, weight_set_names(config))
        swept = 0
        if len(settings) > 1:
            swept = sweep_images(evaluation) * len(settings)
            cost.sweep = sweep_images(evaluation) * _sweep_cost(settings, config)
        cost.settings = len(settings)
        cost.final = (images_of(settings) - swept) * max(_image_cost(setting, config) for setting in settings)
    return cost


def _image_cost(setting: EvaluationConfig, config: Config) -> float:
    """Of one generated image, in images trained on. A guide counts as a network of the same size."""
    return FORWARD_SHARE * sum(configured_sampler(setting, config.diffusion).evaluations())


def _sweep_cost(settings: Sequence[EvaluationConfig], config: Config) -> float:
    """Of one image under every setting: those that differ in the scale alone share the steps before guidance."""
    total = sum(_image_cost(setting, config) for setting in settings)
    for _, group in groupby(settings, key=lambda setting: (setting.weights, setting.guidance_interval)):
        first, *others = (configured_sampler(setting, config.diffusion) for setting in group)
        shared = replace(first, guidance_scale=1.0).evaluations(range(first.steps_before_guidance()))
        total -= len(others) * FORWARD_SHARE * sum(shared)
    return total
