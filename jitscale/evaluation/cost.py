"""Cost of the measurements of a run, in images trained on: counted from the sampler, before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from jitscale.config import Config, EvaluationConfig, images_of_run
from jitscale.evaluation.generate import configured_sampler, grid_images
from jitscale.evaluation.settings import Setting, final_settings, sweep_images
from jitscale.progressive import stages_of

FORWARD_SHARE = 1 / 3  # of a training step of an image: its backward pass costs twice the forward pass


@dataclass(frozen=True)
class MeasuringCost:
    """The images that are generated, and what they cost in images trained on.

    The feature networks are not counted: Inception's forward pass of an image is 0.1% of sampling it with JiT-B.

    Attributes:
        trained: images that the run sees.
        on_the_way: how often few images are measured while training.
        few_images: generated each time.
        few: the cost of all those.
        pictures: the cost of all pictures of samples while training.
        settings: of the sweep; 1 for none.
        sweep_images: generated for each setting.
        sweep: its cost.
        final_images: generated for each of the best settings.
        final: their cost, beyond what the sweep has generated.
    """

    trained: int
    on_the_way: int
    few_images: int
    few: float
    pictures: float
    settings: int
    sweep_images: int
    sweep: float
    final_images: int
    final: float

    @property
    def share(self) -> float:
        """Of the compute of training."""
        return (self.few + self.pictures + self.sweep + self.final) / max(1, self.trained)

    @property
    def sweep_share(self) -> float:
        """What the sweep alone takes of it."""
        return self.sweep / max(1, self.trained)

    def __str__(self) -> str:
        parts = []
        if self.on_the_way:
            parts.append(f"{self.on_the_way} x {self.few_images:,} images on the way ({self._percent(self.few)})")
        if self.pictures:
            parts.append(f"pictures of samples ({self._percent(self.pictures)})")
        if self.settings > 1:
            parts.append(f"{self.settings} settings x {self.sweep_images:,} in a sweep ({self._percent(self.sweep)})")
        if self.settings:
            parts.append(f"{self.final_images:,} at the end ({self._percent(self.final)})")
        return f"{', '.join(parts) or 'nothing'}; {percent(self.share)} of the run's compute"

    def _percent(self, cost: float) -> str:
        return percent(cost / max(1, self.trained))


def percent(share: float) -> str:
    """A share in words, such as 1.4%."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:,.0f}%"


def measuring_cost(config: Config, weight_sets: Sequence[str]) -> MeasuringCost:
    """Cost of the measurements of a training.

    Args:
        config: of the training, with all its stages.
        weight_sets: that it writes.

    Raises:
        ConfigError: `evaluation.sweep` is impossible.
    """
    evaluation, batch = config.evaluation, config.data.batch_size
    trained = on_the_way = 0
    few = pictures = 0.0
    stages = stages_of(config)
    for stage in stages:
        images = images_of_run(stage)
        trained += images
        if evaluation.every_images:
            # The final evaluation takes the place of a measurement at the last step.
            last = images - batch if stage.evaluation.at_end else images
            times = max(0, last) // evaluation.every_images
            on_the_way += times
            few += times * evaluation.few_images * _image_cost(stage, stage.evaluation)
        if evaluation.grid_every_images:
            count = images // evaluation.grid_every_images * grid_images(stage.model.num_classes)
            pictures += count * _image_cost(stage, stage.evaluation)
    sweep = final = 0.0
    settings: list[Setting] = []
    if evaluation.at_end:
        settings = final_settings(config, weight_sets)
        if len(settings) > 1:
            sweep = sweep_images(evaluation) * _sweep_cost(config, settings)
        beyond = evaluation.num_images - (sweep_images(evaluation) if len(settings) > 1 else 0)
        dearest = max(_image_cost(config, setting.applied_to(evaluation, 1)) for setting in settings)
        final = min(evaluation.sweep_keep, len(settings)) * beyond * dearest
    return MeasuringCost(
        trained,
        on_the_way,
        evaluation.few_images,
        few,
        pictures,
        len(settings),
        sweep_images(evaluation),
        sweep,
        evaluation.num_images,
        final,
    )


def _image_cost(config: Config, evaluation: EvaluationConfig) -> float:
    """Of one generated image, in images trained on. A guide counts as a network of the same size."""
    return FORWARD_SHARE * sum(configured_sampler(evaluation, config.diffusion).evaluations())


def _sweep_cost(config: Config, settings: Sequence[Setting]) -> float:
    """Of one image under every setting: those that differ in the scale alone share the steps before guidance."""
    total = 0.0
    for _, together in groupby(settings, key=lambda setting: (setting.weights, setting.interval)):
        group = list(together)
        samplers = [configured_sampler(setting.applied_to(config.evaluation, 1), config.diffusion) for setting in group]
        shared = range(samplers[0].steps_before_guidance())
        total += sum(sum(sampler.evaluations()) for sampler in samplers)
        total -= (len(samplers) - 1) * sum(replace(samplers[0], guidance_scale=1.0).evaluations(shared))
    return FORWARD_SHARE * total
