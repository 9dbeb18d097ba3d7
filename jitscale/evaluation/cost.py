"""The cost of a run's measurements, before the run starts. The unit is the training of one image with all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jitscale.config import Config, EvaluationConfig, images_of_run, weight_set_names
from jitscale.evaluation.generate import configured_sampler, grid_ids
from jitscale.evaluation.sweep import SweepPoint, images_of, sharing_steps, sweep_images, sweep_points
from jitscale.model.flops import TRAINING_PASSES, mean_training_flops, training_flops
from jitscale.progressive import stages_of


@dataclass
class MeasuringCost:
    """The cost of generated images, in images trained on.

    The feature networks are not counted: Inception's forward pass of an image costs 0.1% of sampling it with JiT-B.
    """

    evaluation: EvaluationConfig  # how many images each measurement generates
    trained: float = 0.0  # images that the run sees; an image with routed tokens counts as less than one
    times_in_training: int = 0  # how often the run measures itself on few images
    in_training: float = 0.0  # the cost of these measurements
    pictures: float = 0.0  # the cost of all pictures of samples during training
    points: int = 0  # points of the sweep; 1 without a sweep
    sweep: float = 0.0  # the cost of the sweep
    final: float = 0.0  # the cost of the best points' images, except those that the sweep has generated

    @property
    def share(self) -> float:
        """The total cost as a share of the compute of training."""
        return self.share_of(self.in_training + self.pictures + self.sweep + self.final)

    def share_of(self, cost: float) -> float:
        """One of the costs as a share of the compute of training."""
        return cost / max(1, self.trained)

    def __str__(self) -> str:
        evaluation, times = self.evaluation, self.times_in_training
        measured = (
            (times, f"{times} x {evaluation.few_images:,} images during training", self.in_training),
            (self.pictures, "pictures of samples", self.pictures),
            (self.points > 1, f"{self.points} settings x {sweep_images(evaluation):,} in a sweep", self.sweep),
            (self.points, f"{evaluation.num_images:,} at the end", self.final),
        )
        parts = [f"{text} ({percent(self.share_of(cost))})" for count, text, cost in measured if count]
        return f"{', '.join(parts) or 'nothing'}; {percent(self.share)} of the run's compute"


def percent(share: float) -> str:
    """A share as text, such as 1.4%."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:,.0f}%"


def measuring_cost(config: Config) -> MeasuringCost:
    """The cost of measuring in all stages of a training. Raises a ConfigError if `evaluation.sweep` is impossible."""
    evaluation, cost = config.evaluation, MeasuringCost(config.evaluation)
    for stage in stages_of(config):
        images, image_cost = images_of_run(stage), _image_cost(stage.evaluation, stage)
        cost.trained += images * mean_training_flops(stage) / training_flops(stage.model, routed=False)
        if evaluation.every_images:
            # The final evaluation replaces a measurement at the last step.
            last = images - config.data.batch_size if stage.evaluation.at_end else images
            times = max(0, last) // evaluation.every_images
            cost.times_in_training += times
            cost.in_training += times * evaluation.few_images * image_cost
        if evaluation.grid_every_images:
            grids = images // evaluation.grid_every_images
            cost.pictures += grids * len(grid_ids(stage.model.num_classes)) * image_cost
    if evaluation.at_end:
        points = sweep_points(config, weight_set_names(config))
        few = sweep_images(evaluation) if len(points) > 1 else 0
        cost.points, cost.sweep = len(points), few * _sweep_cost(points, config)
        cost.final = (images_of(points) - few * len(points)) * max(_image_cost(point, config) for point in points)
    return cost


def _image_cost(point: SweepPoint, config: Config) -> float:
    """The cost of one generated image, in images trained on. A guide counts as a network of the same size."""
    return sum(configured_sampler(point, config.diffusion).evaluations()) / TRAINING_PASSES


def _sweep_cost(points: Sequence[SweepPoint], config: Config) -> float:
    """The cost of one image at every point. Points that differ only in the scale share the steps before guidance."""
    total = sum(_image_cost(point, config) for point in points)
    for group in sharing_steps(points):
        first, *others = (configured_sampler(point, config.diffusion) for point in group)
        shared = replace(first, guidance_scale=1.0).evaluations(range(first.steps_before_guidance()))
        total -= len(others) * sum(shared) / TRAINING_PASSES
    return total
