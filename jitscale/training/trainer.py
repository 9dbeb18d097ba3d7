"""The training loop: resume, step, log, save, stop.

Shapes: B images of a micro-batch.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.cautions import cautions, start_caution
from jitscale.config import (
    Config,
    EvaluationConfig,
    held_out_fraction,
    network_differences,
    to_yaml,
    weight_set_names,
)
from jitscale.data.loader import Batch, ShardLoader, check_shared_memory, naming_dead_workers
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet, open_configured
from jitscale.diffusion.objective import sample_loss, times_from_normal
from jitscale.errors import CheckpointError, DataError, ExitCode, UserError
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import measure_finally
from jitscale.evaluation.generate import autocast, configured_sampler, ready_to_sample, sample_grid
from jitscale.evaluation.settings import final_settings
from jitscale.files import NO_LOCKS, appearing_whole, exclusive
from jitscale.keyed_random import Purpose, generator_seeds
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.planner import peak_tflops, training_flops
from jitscale.tracking import BEST_SAMPLES, SAMPLES, Tracker, read_evaluations, read_held_out
from jitscale.training.checkpoint import (
    Checkpoint,
    Flats,
    Progress,
    ReadableSets,
    Save,
    check_shapes,
    complete_checkpoints,
    load_fragments,
    prune,
    step_folder,
)
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.faults import FaultInjection
from jitscale.training.health import BadSamples, HangWatch, LossSpikes, RankTimes, StopSignal, Verdicts
from jitscale.training.held_out import HeldOutLoss
from jitscale.training.inputs import Inputs, copied_ahead, drawn, noised, seeded_noise
from jitscale.training.optim import learning_rate
from jitscale.training.profiling import StepProfile
from jitscale.training.snapshots import remove_snapshots_after, write_snapshot

logger = logging.getLogger(__name__)

BATCH_LOG_SECONDS = 10.0  # between two lines of progress where nobody looks at a terminal
MOST_FAILED_SAVES = 3  # in a row
AGREE_SECONDS = 5.0  # between two agreements on whether to stop


class InitialWeights(ReadableSets, Protocol):
    """Weights that a run may begin with, such as weights.stored.StoredWeights."""

    path: Path
    config: Config
    weight_sets: list[str]
    shapes: dict[str, tuple[int, ...]]

    def choose(self, name: str | None) -> str:
        """The set `name`, or the one meant by None."""


def train(config: Config, world: World, initial: InitialWeights | None = None, guide: JiT | None = None) -> ExitCode:
    """Train until `run.max_images` or `run.max_steps`, from the newest checkpoint of `run.dir` if there is one.

    Args:
        config: all settings.
        world: this rank among all.
        initial: weights to begin with where there is no checkpoint yet; None draws them.
        guide: the network of `evaluation.guide`, in eval mode.

    Returns:
        DONE, or REQUEUE after a signal asked to stop and the state was saved.

    Raises:
        UserError: on every rank alike, for what a user can mend: before the first step where it can be known then.
    """
    run_dir = Path(config.run.dir)
    with ExitStack() as held:
        shards = _open_inputs(config, world, run_dir, held)
        checkpoint = _newest_sound_checkpoint(run_dir, world)
        if checkpoint is not None:
            _check_resumable(checkpoint, config, shards)
        elif initial is not None:
            _check_network(initial.path, initial.config, config)
        trainer = Trainer(config, world, run_dir, shards, checkpoint, initial if checkpoint is None else None, guide)
        try:
            with naming_dead_workers():
                return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        config: Config,
        world: World,
        run_dir: Path,
        shards: ShardSet,
        checkpoint: Checkpoint | None,
        initial: InitialWeights | None = None,
        guide: JiT | None = None,
    ) -> None:
        """Build the network and its engine; continue from `checkpoint`, or begin with `initial`, where there is one."""
        self.config, self.world, self.run_dir, self.shards = config, world, run_dir, shards
        self.guide = guide
        torch.manual_seed(config.run.seed)
        network = JiT(config.model, config.diffusion).train()
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        if checkpoint is not None:
            checkpoint.check_shapes(shapes)
        elif initial is not None:
            check_shapes(initial.path, initial.shapes, shapes)
        self.engine = ZeroEngine(network, config, world)
        if world.is_main:
            logger.info("%s", self.engine.execution)
        compiled = self.engine.execution.compiled
        self.noised = torch.compile(noised) if compiled else noised
        self.sample_loss = torch.compile(sample_loss) if compiled else sample_loss
        self.ema = ShardedEma(config.ema, self.engine.masters(), compiled=compiled)
        self.step = self.images = self.skipped_steps = self.skipped_images = 0
        self.logged_step = self.skipped_in_a_row = self.rollbacks = self.failed_saves = 0
        self.bad_samples = BadSamples(config.data.max_bad_fraction)
        self.data_identity = _data_identity(config, shards, checkpoint)
        self.saved_at: int | None = None
        self.saving: Save | None = None
        if checkpoint is not None:
            self._load(checkpoint)
        elif initial is not None:
            self._begin_with(initial)
        self.end = self._images_at_end()
        self.generator = torch.Generator(world.device)
        self.faults = FaultInjection.from_environment(world.rank)
        self.loss_by_time = LossByTime(world.device)
        self.spikes = LossSpikes()
        self.verdicts = Verdicts(world.device)
        self.rank_times = RankTimes(world.device)
        self.profile = StepProfile(run_dir / "profile", world.device, active=config.run.profile and world.is_main)
        self.batches = self._batches()
        self.inputs = self._inputs()
        self.stop_requested = StopSignal()
        self.tracker, self.watch = parallel.together(self._open_records)
        self._cautioned: set[str] = set()
        if world.is_main:
            for caution in cautions(config, self.end):
                logger.warning("%s", caution)
            if config.evaluation.at_end:
                last_step = self.step + (self.end - self.images) // config.data.batch_size
                for setting in final_settings(config, weight_set_names(config)):
                    self._caution_about(setting.weights, last_step)

    def _open_records(self) -> tuple[Tracker, HangWatch]:
        """Begin to write into the run's folder: only now, so that a refused start leaves the run as it was.

        Raises:
            UserError: it cannot be written.
        """
        config, run_dir, rank = self.config, self.run_dir, self.world.rank
        try:
            if self.world.is_main:
                with appearing_whole(run_dir / "config.yaml") as file:
                    file.write(to_yaml(config).encode())
                if self.images < self.end:  # what was the end of the run is so no longer; results/ keeps it
                    (run_dir / "result.json").unlink(missing_ok=True)
                remove_snapshots_after(run_dir, self.images)
            tracker = Tracker(config, run_dir, self.world.is_main, self.step)
            return tracker, HangWatch(config.run.hang_timeout, run_dir / f"stacks_rank_{rank:05d}.txt")
        except OSError as error:
            raise UserError(f"run.dir={run_dir}: cannot be written ({error}); make room or choose another") from error

    @property
    def position(self) -> int:
        """In the global sample sequence: the images seen, and those jumped over."""
        return self.images + self.skipped_images

    def run(self) -> ExitCode:
        """Step until the end of the run or a signal."""
        config = self.config
        clock = _Clock(self.images)
        agree_every = 1
        save_is_due = False
        with tqdm(
            total=self.end,
            initial=self.images,
            unit="img",
            unit_scale=True,
            desc="train",
            mininterval=0.1 if sys.stderr.isatty() else BATCH_LOG_SECONDS,
            disable=not self.world.is_main,
        ) as progress:
            cut_short = [
                measure
                for due, measure, read in (
                    (self._few_are_due(), self._evaluate_few, read_evaluations),
                    (self._held_out_is_due(), self._measure_held_out, read_held_out),
                )
                if self._was_cut_short(due, read)
            ]
            if not self._measure_on_the_way(cut_short):
                return ExitCode.REQUEUE
            clock.restart(self.images)
            while self.images < self.end:
                self.watch.alive()
                self.profile.step_begins()
                loss = self.train_step()
                self.profile.step_ended()
                progress.update(config.data.batch_size)
                if self.skipped_in_a_row >= config.run.rollback_after:
                    self._roll_back()
                    save_is_due = False
                    progress.n = self.images
                    clock.restart(self.images)
                    continue
                self._snapshot()  # before anything may save this step: a resumed run goes on after it
                log_point = self.step % config.tracking.log_every_steps == 0 or self.images >= self.end
                save_is_due = save_is_due or self._passed(config.checkpoint.every_images)
                if log_point or save_is_due:
                    self._note(self.verdicts.settle())
                if log_point:
                    rate = clock.rate(self.images)
                    agree_every = _agree_every(rate, config)
                    progress.set_postfix_str(f"loss {self.log(loss, rate):.4f}")
                if (log_point or self.step % agree_every == 0) and parallel.any_rank(self.stop_requested.received):
                    self._note(self.verdicts.settle())
                    self._save(last=True)
                    return ExitCode.REQUEUE
                if save_is_due and self.skipped_in_a_row == 0:  # a rollback must land on finite gradients
                    save_is_due = False
                    self._save()
                    clock.restart(self.images)
                due = [self._evaluate_few] if self._few_are_due() else []
                due += [self._measure_held_out] if self._held_out_is_due() else []
                if due:
                    if not self._measure_on_the_way(due):
                        return ExitCode.REQUEUE
                    clock.restart(self.images)
                if config.evaluation.grid_every_images and self._passed(config.evaluation.grid_every_images):
                    self._log_grid(SAMPLES, config.evaluation)
                    clock.restart(self.images)
        self._note(self.verdicts.settle())
        self._save(last=True)
        self.watch.pause()
        if config.evaluation.at_end:
            self.stop_requested.exit_at_once()  # all is saved, and the evaluation's blocks are files of their own
            self._measure_finally()
        return ExitCode.DONE

    def close(self) -> None:
        """Release what the run holds."""
        self.watch.close()
        self.profile.close()
        self.batches.close()
        self.tracker.close()
        self.stop_requested.restore()
        self.engine.destroy()

    def train_step(self) -> torch.Tensor:
        """One optimizer step on the next global batch; returns this rank's part of its mean loss."""
        config = self.config
        images = self.images + config.data.batch_size
        lr = learning_rate(config.optim, images, self.end)
        # Dropout is a function of the step and the rank, so that a resumed run drops what the unbroken one did.
        torch.manual_seed(int(generator_seeds(config.run.seed, Purpose.DROPOUT, self.step, self.world.rank)[0]))
        total = torch.zeros((), device=self.world.device)
        self.faults.begin_step(self.step + 1)
        for micro_batch in range(self.engine.micro_batches):
            with self.rank_times.part():
                self.faults.strike()
                inputs = next(self.inputs)
                self.bad_samples.note(inputs.bad_samples)
                loss = self.faults.loss(self._loss(inputs))
            self.engine.backward(loss)
            last = micro_batch == self.engine.micro_batches - 1
            moved = self.engine.step(lr if last else None)
            total += loss.detach() / (self.engine.micro_batches * self.world.size)
        self.step, self.images = self.step + 1, images
        self.ema.update(self.engine.masters(), self.step, (images - config.data.batch_size, images), moved=moved)
        self._note(self.verdicts.add(moved))
        return total

    def _note(self, moved: Sequence[bool]) -> None:
        """Count skipped steps."""
        for one in moved:
            self.skipped_in_a_row = 0 if one else self.skipped_in_a_row + 1
            self.skipped_steps += not one

    def _loss(self, inputs: Inputs) -> torch.Tensor:
        """Mean loss of one micro-batch."""
        diffusion = self.config.diffusion
        t = times_from_normal(inputs.normal, diffusion)
        x, e, z = self.noised(inputs.images, inputs.flip, self._noise(inputs.positions), t, diffusion.noise_scale)
        losses = self.sample_loss(self.engine(z, t, inputs.labels), x, e, z, t, diffusion)
        self.loss_by_time.add(t, losses)
        return losses.mean()

    def _noise(self, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Standard normal noise on the device, one seeded stream a sample: (B, 3, S, S)."""
        seeds = generator_seeds(self.config.run.seed, Purpose.NOISE, positions)
        return seeded_noise(seeds, self.config.model.image_size, self.generator)

    def _batches(self) -> Generator[Batch, None, None]:
        data, world = self.config.data, self.world
        loader = ShardLoader(
            shard_set=self.shards,
            order=EpochOrder(
                self.shards.samples_per_shard,
                self.config.run.seed,
                data.streams,
                data.window,
                origin=int(self.data_identity["origin"]),
            ),
            global_batch_size=data.batch_size,
            micro_batch_size=data.batch_size // world.size // self.engine.micro_batches,
            rank=world.rank,
            world_size=world.size,
            start_position=self.position,
            num_workers=data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        needed = loader.shared_memory_needed()
        parallel.together(lambda: check_shared_memory(needed, world.local_size, data.num_workers))
        parallel.together(lambda: self.shards.check_cache(loader.shards_side_by_side(world.local_size)))
        return iter(loader)

    def _inputs(self) -> Iterator[Inputs]:
        """What the batches become, on the device."""
        return copied_ahead((drawn(batch, self.config) for batch in self.batches), self.world.device)

    def _images_at_end(self) -> int:
        """Images seen when the run is complete: whole steps until `run.max_images` or `run.max_steps`."""
        run, batch = self.config.run, self.config.data.batch_size
        steps = []
        if run.max_steps is not None:
            steps.append(run.max_steps - self.step)
        if run.max_images is not None:
            steps.append(-(-(run.max_images - self.images) // batch))
        return self.images + max(0, min(steps)) * batch

    def _passed(self, every_images: int) -> bool:
        """Whether the last step crossed a multiple of `every_images`."""
        return self.images // every_images > (self.images - self.config.data.batch_size) // every_images

    def log(self, loss: torch.Tensor, rate: float) -> float:
        """Record the last step, taken at `rate` images a second; returns its loss."""
        if self.saving is not None and self.saving.is_written():
            self._finish_save()
        mean_loss = float(parallel.sum_over_ranks(loss))
        spike = self.spikes.is_spike(mean_loss)
        if spike and self.world.is_main:
            logger.warning("step %d: the loss %.4g stands far above the last ones", self.step, mean_loss)
        for rank, seconds, median in self.rank_times.slow_ranks(max(1, self.step - self.logged_step)):
            if self.world.is_main:
                logger.warning(
                    "rank %d is slow: %.3f s to its first collective, the median %.3f s", rank, seconds, median
                )
        self.logged_step = self.step
        values: dict[str, float | int | None] = {
            "step": self.step,
            "images": self.images,
            "loss": mean_loss,
            "lr": learning_rate(self.config.optim, self.images, self.end),
            "grad_norm": self.engine.gradient_norm(),
            "images_per_second": rate,
            "skipped_steps": self.skipped_steps,
            "skipped_images": self.skipped_images,
            "bad_samples": self.bad_samples.check(self.images),
            "loss_spike": int(spike),
            **self.loss_by_time.means(),
        }
        peak = peak_tflops(self.world.device)
        if peak is not None:
            values["mfu"] = rate * training_flops(self.config.model) / (peak * 1e12 * self.world.size)
        self.tracker.log(values)
        return mean_loss

    def _save(self, *, last: bool = False) -> None:
        """Write the state, unless it is on disk; in the background if configured and not the `last` time.

        A save that fails leaves the previous checkpoint, and training goes on for a few more attempts.

        Raises:
            CheckpointError: on every rank: the last save failed, or several in a row.
        """
        self._finish_save()
        if self.saved_at == self.step:
            return
        try:
            self.saving = self._begin_save()
            if self.config.checkpoint.asynchronous and not last:
                self.saving.write_in_background()
                return
            self.saving.write()
        except CheckpointError as error:
            self.saving = None
            self._tolerate(error, last=last)
            return
        self._finish_save(last=last)

    def _begin_save(self) -> Save:
        progress = Progress(
            self.step,
            self.images,
            self.engine.optimizer_step(),
            self.data_identity,
            self.bad_samples.total(),
            self.skipped_steps,
            self.skipped_images,
        )
        sets: dict[str, Flats] = {"model": self.engine.masters(), **self.ema.sets, **self.engine.moments()}
        save = Save(step_folder(self.run_dir, self.step), progress, self.config, self.engine.fragments, sets)
        save.file = self.faults.file(save.file)
        return save

    def _finish_save(self, *, last: bool = False) -> None:
        """Complete the checkpoint that is being written, if there is one; a collective call.

        Raises:
            CheckpointError: on every rank: the last save failed, or several in a row.
        """
        if self.saving is None:
            return
        save, self.saving = self.saving, None
        try:
            save.finish()
        except CheckpointError as error:
            self._tolerate(error, last=last)
            return
        self.saved_at, self.failed_saves = save.progress.step, 0
        if self.world.is_main:
            try:
                prune(self.run_dir, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every_images)
            except (OSError, CheckpointError) as error:
                logger.warning("old checkpoints could not be removed (%s); the next save tries again", error)

    def _tolerate(self, error: CheckpointError, *, last: bool = False) -> None:
        """Go on after a failed save, unless it was the `last` one or one of several in a row; alike on all ranks."""
        self.failed_saves += 1
        if last or self.failed_saves >= MOST_FAILED_SAVES:
            raise error
        if self.world.is_main:
            logger.error("%s; training goes on, and the next save may work", error)

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, and on in the data: what made the gradients infinite is not repeated.

        Raises:
            UserError: on every rank: there is no checkpoint, or it has been tried too often.
        """
        self._finish_save()
        self.rollbacks += 1
        skipped, limit = self.skipped_in_a_row, self.config.run.max_rollbacks
        checkpoint = _newest_sound_checkpoint(self.run_dir, self.world)
        if checkpoint is None or self.rollbacks > limit:
            raise UserError(
                f"step {self.step}: no finite gradient in {skipped} steps, and "
                + ("no checkpoint to go back to" if checkpoint is None else f"run.max_rollbacks={limit} are used up")
                + "; lower optim.lr, set optim.grad_clip, or look at the data before this step"
            )
        position, step = self.position, self.step
        self.batches.close()
        self._load(checkpoint)
        self.skipped_images = position - self.images
        self.verdicts.settle()  # of steps that are taken back
        self.skipped_in_a_row = 0
        self.spikes = LossSpikes()
        self.batches = self._batches()
        self.inputs = self._inputs()
        self.tracker.rewind(self.step)
        if self.world.is_main:
            remove_snapshots_after(self.run_dir, self.images)
        if self.world.is_main:
            logger.warning(
                "step %d: no finite gradient in %d steps; back to step %d, %d images are jumped over",
                step,
                skipped,
                self.step,
                self.skipped_images,
            )

    def _snapshot(self) -> None:
        """Store the power averages where `ema.snapshot_every_images` asks for it, and at the end of the run."""
        every_images = self.config.ema.snapshot_every_images
        if every_images is not None and (self._passed(every_images) or self.images >= self.end):
            progress = Progress(self.step, self.images, self.engine.optimizer_step(), self.data_identity)
            try:
                write_snapshot(self.run_dir, progress, self.config, self.engine.fragments, self.ema.power_sets)
            except CheckpointError as error:
                self._tolerate(error)

    def _load(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress
        sets = self.engine.prepare_to_load(progress.optimizer_step)
        missing = [name for name in self.ema.sets if name not in checkpoint.sets]
        if missing and self.world.is_main:
            logger.warning("%s has no %s; starting from its weights", checkpoint.folder, ", ".join(missing))

        def fill() -> None:
            load_fragments(checkpoint, self.engine.fragments, {k: v for k, v in sets.items() if k in checkpoint.sets})
            for name, flats in self.ema.sets.items():
                source = "model" if name in missing else name
                load_fragments(checkpoint, self.engine.fragments, {source: flats})

        parallel.together(fill)  # ranks read different files, and any may be damaged
        self.engine.finish_loading()
        self.step, self.images = progress.step, progress.images
        self.bad_samples.begin_again(progress.bad_samples)
        self.skipped_steps, self.skipped_images = progress.skipped_steps, progress.skipped_images
        self.saved_at = self.logged_step = progress.step
        if self.world.is_main:
            logger.info("resuming %s at step %d, %d images", checkpoint.folder, self.step, self.images)

    def _begin_with(self, initial: InitialWeights) -> None:
        """Take over weights, and averages where both sides have them; the moments begin at zero."""
        run, fragments = self.config.run, self.engine.fragments
        weights = run.init_weights
        if weights is None and "model" in initial.weight_sets:
            weights = "model"
        weights = initial.choose(weights)
        # A power-function average weighs the whole run, which begins here: there is nothing of it to take over.
        own = [name for name in self.ema.sets if name not in self.ema.power_sets]
        kept = [name for name in own if run.init_ema and name in initial.weight_sets]
        sets = self.engine.prepare_to_load(0)

        def fill() -> None:
            load_fragments(initial, fragments, {weights: sets["model"]})
            for name, flats in self.ema.sets.items():
                load_fragments(initial, fragments, {name if name in kept else weights: flats})

        parallel.together(fill)
        self.engine.finish_loading()
        if self.world.is_main:
            averages = ", ".join(kept) or "no average"
            logger.info("starting from %s of %s; taken over: %s", weights, initial.path, averages)

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """The whole parameters of the weight set `name`; a collective call."""
        return self.engine.gather(self.engine.masters() if name == "model" else self.ema.sets[name])

    def _network(self, name: str) -> JiT:
        """A plain copy of the network with the weight set `name`, ready to sample; a collective call."""
        network = JiT(self.config.model, self.config.diffusion)
        network.load_state_dict(self._weights(name))
        return ready_to_sample(network, self.config, self.world.device)

    def _guide(self) -> JiT | None:
        """On the device only while it is needed."""
        return None if self.guide is None else copy.deepcopy(self.guide)

    def _caution_about(self, weights: str, steps: int) -> None:
        """Say once for each average that it is mostly the start of the run, when it is sampled after `steps`."""
        continued = self.engine.optimizer_step() > self.step  # the averages of an upgraded run had a start of their own
        caution = None if continued else start_caution(self.config, weights, steps)
        if caution is not None and weights not in self._cautioned and self.world.is_main:
            self._cautioned.add(weights)
            logger.warning("%s", caution)

    def _log_grid(self, name: str, evaluation: EvaluationConfig) -> None:
        """Record a picture of samples under `name`; a collective call."""
        network, guide = self._network(evaluation.weights), self._guide()
        self._caution_about(evaluation.weights, self.step)
        sampler = configured_sampler(evaluation, network.diffusion)
        if guide is not None:
            ready_to_sample(guide, self.config, self.world.device)
        with autocast(self.config, self.world.device):
            grid = sample_grid(network, sampler, evaluation.seed, self.world, guide)
        self.tracker.log_image(name, grid, self.images)
        parallel.barrier()

    @cached_property
    def _evaluator(self) -> Evaluator:
        """With what is known of the real images, which is computed once."""
        return Evaluator(self.config, self.world, self.run_dir, self._guide())

    def _measure_on_the_way(self, due: Sequence[Callable[[], None]]) -> bool:
        """Measure after this step, which is saved first: a measurement may take longer than a scheduler waits.

        A signal then ends the process at once, and the resumed run makes up for the measurement.

        Returns:
            False if a signal has come already: the run must stop instead.
        """
        if not due:
            return True
        self._note(self.verdicts.settle())
        if self.skipped_in_a_row == 0:
            self._save()
            self._finish_save()
        saved = self.saved_at == self.step
        if saved and parallel.any_rank(self.stop_requested.received):
            return False
        with self.stop_requested.exiting_at_once() if saved else nullcontext():
            for measure in due:
                measure()
        return True

    def _few_are_due(self) -> bool:
        """Whether this step is measured on few images; the last one is not where the final evaluation follows."""
        evaluation = self.config.evaluation
        if not evaluation.every_images or (evaluation.at_end and self.images >= self.end):
            return False
        return self._passed(evaluation.every_images)

    def _held_out_is_due(self) -> bool:
        """Whether the held-out loss is measured after this step."""
        every_images = self.config.evaluation.held_out_every_images
        return every_images > 0 and self._passed(every_images)

    def _was_cut_short(self, due: bool, read: Callable[[Path], list[dict[str, Any]]]) -> bool:
        """Whether the run was killed between the save of this step and the end of a measurement.

        Args:
            due: whether this step is measured.
            read: the lines that the measurements have written, from the run's folder.
        """
        if not due or self.images == 0:
            return False
        measured = self.world.is_main and any(line["step"] == self.step for line in read(self.run_dir))
        return not parallel.broadcast_object(measured)

    def _evaluate_few(self) -> None:
        """Measure the configured weights on few images, for the record of the training only."""
        self.watch.pause()
        evaluation = self.config.evaluation
        few = replace(evaluation, num_images=evaluation.few_images)
        self._caution_about(evaluation.weights, self.step)
        measure, network = self._evaluator.measure, self._network(evaluation.weights)
        (result,) = measure(network, evaluation.weights, [few], neighbours=False, keep_blocks=False)
        if self.world.is_main:
            self.tracker.log_few(result, self.step, self.images)
            logger.info("%d images: FID %.4g on %d samples", self.images, result["fid"], result["num_images"])
        parallel.barrier()

    @cached_property
    def _held_out(self) -> HeldOutLoss:
        assert self.shards.held_out is not None
        return HeldOutLoss(self.config, self.world, self.shards.held_out)

    def _measure_held_out(self) -> None:
        """Record the loss of the weights and of every average on the held-out samples."""
        self.watch.pause()
        measured: dict[str, float | int | None] = {}
        network = self._network("model")
        for name in ("model", *self.ema.sets):
            if name != "model":
                network.load_state_dict(self._weights(name))  # building a large network takes longer
            measured |= self._held_out.measure(network, name)
        self.tracker.log({"step": self.step, "images": self.images, **measured})

    def _measure_finally(self) -> None:
        """The evaluation that the run is trained for: its number, its sweep, and a picture of the best setting."""
        weight_sets = weight_set_names(self.config)
        result = measure_finally(self._network, weight_sets, self._evaluator, self.run_dir, is_end=True)
        self._log_grid(BEST_SAMPLES, replace(self.config.evaluation, **result["best"]))
        if self.world.is_main:
            recorded = [line for line in read_evaluations(self.run_dir) if line["step"] == self.step]
            if not any(all(line.get(key) == result[key] for key in ("fid", "num_images")) for line in recorded):
                self.tracker.log_result(result, self.step, self.images)
            self.tracker.log_final(result)


class LossByTime:
    """Mean loss in ten equal intervals of t since it was last asked for, kept on the device."""

    BINS = 10

    def __init__(self, device: torch.device) -> None:
        self._sums, self._counts = torch.zeros(2, self.BINS, device=device)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Count the `losses` (B,) of samples at times `t` (B,)."""
        bins = (t * self.BINS).long().clamp(0, self.BINS - 1)
        self._sums.index_add_(0, bins, losses.detach().float())
        self._counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))

    def means(self) -> dict[str, float | None]:
        """`loss_t0` for t in [0, 0.1), ..., None where there was no sample; then from zero. A collective call."""
        sums, counts = parallel.sum_over_ranks(torch.stack([self._sums, self._counts])).tolist()
        self._sums.zero_()
        self._counts.zero_()
        return {f"loss_t{k}": s / n if n else None for k, (s, n) in enumerate(zip(sums, counts, strict=True))}


class _Clock:
    """Images a second between log points, without the time spent on saves and pictures."""

    def __init__(self, images: int) -> None:
        self.restart(images)

    def restart(self, images: int) -> None:
        """Count from here."""
        self._time, self._images = time.perf_counter(), images

    def rate(self, images: int) -> float:
        """Images a second since the last call or restart."""
        rate = (images - self._images) / (time.perf_counter() - self._time)
        self.restart(images)
        return rate


def _agree_every(rate: float, config: Config) -> int:
    """Steps between two questions whether to stop: the same on all ranks, and a few seconds apart."""
    seconds = parallel.broadcast_object(config.data.batch_size / rate)
    return max(1, min(config.tracking.log_every_steps, int(AGREE_SECONDS / seconds)))


def _newest_sound_checkpoint(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest complete checkpoint, the same on every rank, with all its files verified; a collective call.

    Raises:
        CheckpointError: on every rank: it is damaged.
    """
    # One rank looks: a shared file system may show the others an older state.
    folders = parallel.broadcast_object(complete_checkpoints(run_dir)[-1:])
    if not folders:
        return None
    checkpoint = parallel.together(lambda: Checkpoint(folders[0]))
    parallel.together(lambda: checkpoint.verify(world.rank, world.size))
    return checkpoint


def _open_inputs(config: Config, world: World, run_dir: Path, held: ExitStack) -> ShardSet:
    """Check the output folder and the shards on every rank, before anything is built; `held` locks the folder."""
    parallel.together(lambda: _claim(run_dir, held) if world.is_main else None)
    return parallel.together(lambda: open_configured(config))


def _claim(run_dir: Path, held: ExitStack) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(exclusive(run_dir / ".lock", "and two runs would overwrite each other"))
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning("run.dir=%s: no locks here (%s); take care that no second run uses it", run_dir, error)
            return
        raise UserError(f"run.dir={run_dir}: cannot be written ({error}); choose another folder") from error


def _data_identity(config: Config, shards: ShardSet, checkpoint: Checkpoint | None = None) -> dict[str, int | str]:
    """What fixes the sample sequence; its epoch 0 begins where `checkpoint` says, or at it if the shards changed."""
    now: dict[str, int | str] = {
        "seed": config.run.seed,
        "streams": config.data.streams,
        "window": config.data.window,
        "manifest": shards.manifest_hash,
    }
    if shards.held_out is not None:
        now["held_out"] = str(held_out_fraction(config.data) or shards.held_out.manifest_hash)
    if checkpoint is None or checkpoint.progress.data is None:
        return {**now, "origin": 0}
    before = checkpoint.progress.data
    changed = bool(_differing(before, now))
    return {
        **now,
        "origin": checkpoint.progress.images + checkpoint.progress.skipped_images
        if changed
        else before.get("origin", 0),
    }


def _differing(before: dict[str, int | str], now: dict[str, int | str]) -> list[str]:
    """The keys of what fixes the sample sequence that are not alike, or that only one of them has."""
    return [key for key in {**now, **before} if key != "origin" and before.get(key) != now.get(key)]


def _check_resumable(checkpoint: Checkpoint, config: Config, shards: ShardSet) -> None:
    """Refuse to go on with other data or another order: samples would be seen twice or never.

    Raises:
        DataError: naming what differs.
        CheckpointError: the network or the noise scale differs.
    """
    before = checkpoint.progress.data
    now = _data_identity(config, shards)
    if before is not None:
        differing = _differing(before, now)
        changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in differing)
        if differing == ["manifest"] and config.data.accept_new_shards:
            logger.warning("%s: other shards (%s); a new epoch of them begins", checkpoint.folder, changes)
        elif differing:
            raise DataError(
                f"{checkpoint.folder}: the data or its order changed ({changes}); restore data.shards, data.held_out, "
                "run.seed, data.streams and data.window, start a new run.dir, or begin a new epoch of other shards "
                "with data.accept_new_shards=true"
            )
    _check_network(checkpoint.folder, checkpoint.config, config)
    if checkpoint.config.optim.name != config.optim.name:
        raise CheckpointError(
            f"{checkpoint.folder}: its moments are those of optim.name={checkpoint.config.optim.name}, the config says "
            f"{config.optim.name}; restore it, or start a new run.dir with run.init_from={checkpoint.folder}"
        )


def _check_network(path: Path, before: Config, config: Config) -> None:
    """Refuse weights of another network, or for another noise scale.

    Raises:
        CheckpointError: naming what differs.
    """
    differing = network_differences(before, config)
    if differing:
        raise CheckpointError(
            f"{path}: weights of another network ({'; '.join(differing)}); restore these settings, or choose another "
            "run.dir"
        )
    trained_with, asked = before.diffusion.noise_scale, config.diffusion.noise_scale
    if not math.isclose(trained_with, asked):
        raise CheckpointError(
            f"{path}: made for diffusion.noise_scale={trained_with}, the config says {asked}; "
            f"add diffusion.noise_scale={trained_with}"
        )
