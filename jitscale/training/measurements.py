"""Measurements and pictures of a run: grids of samples, FID on few images, held-out loss, and the final FID."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from jitscale import parallel
from jitscale.config import Config, EvaluationConfig, weight_set_names
from jitscale.config.cautions import start_caution
from jitscale.data.shards import ShardSet
from jitscale.errors import StopRequestedError, StorageError
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import run_evaluation
from jitscale.evaluation.generate import autocast, configured_sampler, ready_on_all_ranks, ready_to_sample, sample_grid
from jitscale.evaluation.sweep import sweep_points
from jitscale.model.jit import JiT, network_holding
from jitscale.parallel import World
from jitscale.tracking import (
    BEST_SAMPLES,
    Tracker,
    distance_of,
    distance_title,
    evaluations_after,
    held_out_after,
)
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.held_out import HeldOutLoss
from jitscale.training.state import RunState

logger = logging.getLogger(__name__)

Measurement = Callable[[], None]


@dataclass(eq=False)
class Measurements:
    """Measures the current weights of a run; every method except `due` is a collective call."""

    config: Config
    world: World
    shards: ShardSet  # for training; `shards.held_out` are the held-out samples
    engine: ZeroEngine
    ema: ShardedEma
    state: RunState
    tracker: Tracker
    guide: JiT | None  # the network of `evaluation.guide`, in eval mode
    end: int  # images seen when the run is complete
    stop: Callable[[], None]  # raises a StopRequestedError between two blocks
    _warned: set[str] = field(default_factory=set)  # averages that a warning has named already

    def due(self) -> list[Measurement]:
        """The measurements that are due after this step."""
        evaluation, state, batch = self.config.evaluation, self.state, self.config.data.batch_size
        found: list[Measurement] = []
        # If a final evaluation follows, the last step is not measured on few images.
        if state.crossed(evaluation.every_images, batch) and (state.images < self.end or not evaluation.at_end):
            found.append(self.on_few_images)
        if state.crossed(evaluation.held_out_every_images, batch):
            found.append(self.on_held_out)
        return found

    def attempt(self, measure: Measurement) -> bool:
        """Measure during training; returns False if a signal has stopped the measurement.

        If a file system fails, all ranks skip this measurement, and training goes on.
        """
        try:
            measure()
        except StopRequestedError:
            return False
        except StorageError as error:
            if self.world.is_main:
                logger.error("step %d: a measurement failed, training goes on: %s", self.state.step, error)
        finally:
            gc.collect()  # frees the network; see `_evaluating`
        return True

    def cut_short(self) -> list[Measurement]:
        """Due measurements without a record, because the run ended between its save and its measurement."""
        state, run_dir = self.state, Path(self.config.run.dir)
        if state.images == 0:
            return []
        due, readers = self.due(), {self.on_few_images: evaluations_after, self.on_held_out: held_out_after}

        def recorded() -> list[bool]:
            return [bool(readers[measure](run_dir, state.step - 1)) for measure in due]

        return [measure for measure, done in zip(due, parallel.on_main(recorded), strict=True) if not done]

    def grid(self, name: str, evaluation: EvaluationConfig) -> None:
        """Record a picture of samples under `name`. Only rank 0 draws it, so only rank 0 needs memory for a network."""
        self.caution_about(evaluation.weights, self.state.step)
        self.engine.release_memory()
        weights: dict[str, torch.Tensor] = {}
        self.engine.gather_each(self._flats(evaluation.weights), weights.__setitem__ if self.world.is_main else None)

        def draw() -> None:
            network, guide = self._holding(weights), self._guide_on_device()
            for built in filter(None, (network, guide)):
                ready_to_sample(built, self.config, self.world.device)
            sampler = configured_sampler(evaluation, network.diffusion)
            with autocast(self.config, self.world.device):
                grid = sample_grid(network, sampler, evaluation.seed, evaluation.block_size, guide)
            self.tracker.log_image(name, grid, self.state.images)

        parallel.on_main(draw)
        gc.collect()

    def on_few_images(self) -> None:
        """Measure the configured weights on few images, and record it in the run's metrics."""
        evaluation, state = self.config.evaluation, self.state
        point = replace(evaluation, num_images=evaluation.few_images)
        self.caution_about(evaluation.weights, state.step)
        network = self._network(evaluation.weights)
        with self._evaluating() as evaluator:
            (result,) = evaluator.measure(network, [point], neighbours=False, keep_blocks=False)
        if self.world.is_main:
            self.tracker.log_few(result, state.step, state.images)
            distance = distance_of(result)
            said = f"{distance_title(distance)} {result[distance]:.4g}"
            logger.info("%d images: %s on %d samples", state.images, said, result["num_images"])
        parallel.barrier()

    def on_held_out(self) -> None:
        """Record the loss of the weights and of every average on the held-out samples."""
        measured: dict[str, float | int | None] = {}
        network = self._network("model")
        parameters = dict(network.named_parameters())  # without the subspace, which is the same in all sets
        for name in ("model", *self.ema.sets):
            if name != "model":
                self.engine.gather_each(self._flats(name), lambda key, values: parameters[key].detach().copy_(values))
            measured |= self._held_out_loss.measure(network, name)
        self.tracker.log({"step": self.state.step, "images": self.state.images, **measured})

    def final(self) -> None:
        """The final evaluation: its measures, its sweep, and a picture with the best setting."""
        state, run_dir = self.state, Path(self.config.run.dir)
        points = sweep_points(self.config, weight_set_names(self.config))
        with self._evaluating() as evaluator:
            result = run_evaluation(self._network, points, evaluator, run_dir, is_end=True)
        self.grid(BEST_SAMPLES, replace(self.config.evaluation, **result["best"]))
        recorded = parallel.on_main(lambda: evaluations_after(run_dir, state.step - 1))
        if not any(
            all(line.get(key) == result[key] for key in (distance_of(result), "num_images")) for line in recorded
        ):
            self.tracker.log_result(result, state.step, state.images)
        self.tracker.log_final(result)

    def caution_about_final(self) -> None:
        """Warn about averages of the final evaluation that will consist mostly of the start of the run."""
        state, config = self.state, self.config
        if config.evaluation.at_end:
            last_step = state.step + (self.end - state.images) // config.data.batch_size
            for point in sweep_points(config, weight_set_names(config)):
                self.caution_about(point.weights, last_step)

    def caution_about(self, weights: str, steps: int) -> None:
        """Warn, once for each average, if after `steps` it consists mostly of the start of the run."""
        # The averages of an upgraded run began before this run.
        continued = self.engine.optimizer_step() > self.state.step
        caution = None if continued else start_caution(self.config, weights, steps)
        if caution is not None and weights not in self._warned and self.world.is_main:
            self._warned.add(weights)
            logger.warning("%s", caution)

    @cached_property
    def _evaluator(self) -> Evaluator:
        """Holds the features of real images, which are computed once; `_evaluating` gives it the guide for a while."""
        return Evaluator(self.config, self.world, Path(self.config.run.dir), stop=self.stop)

    @contextmanager
    def _evaluating(self) -> Iterator[Evaluator]:
        """The evaluator; the guide is on the device only inside the `with` block. A collective call."""
        evaluator = self._evaluator
        try:
            with evaluator.guided_by(self._guide_on_device()):
                yield evaluator
        finally:
            gc.collect()  # prepared blocks are reference cycles: without this, the guide would stay in memory

    @cached_property
    def _held_out_loss(self) -> HeldOutLoss:
        assert self.shards.held_out is not None
        return HeldOutLoss(self.config, self.world, self.shards.held_out, self.stop)

    def _flats(self, name: str) -> list[torch.Tensor]:
        """This rank's flat tensors of the weight set `name`."""
        return self.engine.masters() if name == "model" else self.ema.sets[name]

    def _network(self, name: str) -> JiT:
        """A plain network with the weight set `name`, ready to sample, on every rank; a collective call."""
        self.engine.release_memory()
        return ready_on_all_ranks(self._holding(self.engine.gather(self._flats(name))), self.config, self.world)

    def _holding(self, weights: dict[str, torch.Tensor]) -> JiT:
        return network_holding({**weights, **self.engine.stored_buffers()}, self.config.model, self.config.diffusion)

    def _guide_on_device(self) -> JiT | None:
        """A copy of the guide on the device, for as long as it is needed; the guide itself stays on the CPU."""
        if (guide := self.guide) is None:
            return None
        weights = {key: p.detach().to(self.world.device, copy=True) for key, p in guide.state_dict().items()}
        return network_holding(weights, guide.config, guide.diffusion)
