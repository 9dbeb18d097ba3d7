"""The training loop: step, log, save, measure, stop.

It uses `feed` (the tensors of a step), `persistence` (a run's state on disk) and `measurements`.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.checkpoints.opening import read_guide
from jitscale.config import Config, routes
from jitscale.config.cautions import cautions
from jitscale.data.shards import ShardSet
from jitscale.data.workers import naming_dead_workers
from jitscale.errors import ExitCode
from jitscale.keyed_random import Purpose, generator_seeds
from jitscale.model.execution import REMEDY
from jitscale.model.flops import model_flops_utilisation, peak_tflops
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.run_folder import Claim, after_the_end, claim
from jitscale.tracking import SAMPLES
from jitscale.training import persistence
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.faults import FaultInjection
from jitscale.training.feed import Feed, open_once_a_node
from jitscale.training.log_point import LogPoint, exchange
from jitscale.training.losses import Losses
from jitscale.training.measurements import Measurement, Measurements
from jitscale.training.optim import learning_rate
from jitscale.training.profiling import StepProfile
from jitscale.training.state import RunState
from jitscale.training.stopping import StopSignal
from jitscale.training.subspace import subspace_of_run
from jitscale.training.timing import Clock, RankTimes
from jitscale.training.watch import BadSamples, LossByNoiseLevel, LossSpikes, StepOutcomes

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0  # between two lines of progress without a terminal
AGREE_SECONDS = 5.0  # between two collectives that ask whether any rank received a signal


def train(config: Config, world: World, claimed: Claim | None = None) -> int:
    """Train until `run.max_images` or `run.max_steps`. `claimed` is the lock of `run.dir`; None: it is taken here.

    Returns the exit code:
    - DONE: the run is complete.
    - REQUEUE: a signal came, and the state is saved; INTERRUPTED if the signal came from Ctrl-C.
    - FAILED: the state is saved, but a file system failed in the final evaluation.

    The run resumes from the newest checkpoint of `run.dir`. If there is none, it starts from the weights of
    `run.init_from`. If that is not set, it starts from random weights. A user's mistake raises a UserError on every
    rank, before the first step if possible.
    """
    with ExitStack() as held:
        claimed = claimed or claim(Path(config.run.dir), held)
        trainer = Trainer(config, world, open_once_a_node(config, world), claimed)
        held.callback(trainer.close)
        with naming_dead_workers(parallel.said_by_this_rank):
            return trainer.run()


class Trainer:
    """One run on one rank."""

    def __init__(self, config: Config, world: World, shards: ShardSet, claimed: Claim | None = None) -> None:
        """Build the network and its engine, and load the checkpoint or the initial weights."""
        self.config, self.world, self.state = config, world, RunState()
        guide = parallel.raise_together(lambda: read_guide(config, shards.class_names, world))
        checkpoint = persistence.newest_sound_checkpoint(Path(config.run.dir), world)
        if checkpoint is not None:
            persistence.check_resumable(checkpoint, config)
        initial = persistence.initial_weights(config, world) if checkpoint is None else None
        class_names = persistence.trained_classes(config, shards, checkpoint, initial)
        data = persistence.data_identity(config, shards, checkpoint)
        subspace = subspace_of_run(config, world, shards, checkpoint, initial)
        torch.manual_seed(config.run.seed)
        self.engine = ZeroEngine(JiT(config.model, config.diffusion, subspace).train(), config, world)
        parallel.let_collectives_outlast(config.run.hang_timeout)  # after DeepSpeed has made its groups
        # A rank with another kernel would round differently and could slow all ranks down, and nothing would show it.
        parallel.require_alike("how the network computes", self.engine.execution.identity, REMEDY)
        if world.is_main:
            logger.info("%s", self.engine.execution)
        compiled = self.engine.execution.compiled
        self.losses = Losses(config.model, config.diffusion, self.engine.subspace, compiled=compiled)
        on_device = not config.engine.offload_optimizer  # averages lie on the same device as the masters
        self.ema = ShardedEma(config.ema, self.engine.masters(), compiled=compiled and on_device)
        self.bad_samples = BadSamples(config.data.max_bad_fraction)
        self.faults = FaultInjection(world.rank)
        saved, claimed = (self.engine, self.ema, self.state, self.bad_samples), claimed or Claim(Path(config.run.dir))
        self.persistence = persistence.Persistence(config, world, *saved, self.faults, data, class_names, claimed)
        if checkpoint is not None:
            self.persistence.load(checkpoint)
        elif initial is not None:
            self.persistence.begin_with(initial)
        self.end = self.state.images_at_end(config)
        self.loss_by_noise_level, self.spikes = LossByNoiseLevel(world.device), LossSpikes()
        self.outcomes, self.rank_times = StepOutcomes(world.device), RankTimes(world.device, self.engine.micro_batches)
        profiled = config.run.profile and world.is_main
        self.profile = StepProfile(Path(config.run.dir) / "profile", world.device, active=profiled)
        # A context manager for each named part of a step (data, optimizer, ema). Benchmarks replace it by a timer.
        self.part: Callable[[str], AbstractContextManager[object]] = nullcontext
        origin, micro_batches = int(data["origin"]), self.engine.micro_batches
        self.feed = Feed(config, world, shards, micro_batches=micro_batches, origin=origin, compiled=compiled)
        self.feed.start(self.state.position)
        self.clock = Clock(self.state.images)
        self.stop_signal = StopSignal()
        self.tracker, self.watch = parallel.raise_together(
            lambda: persistence.open_records(config, world, self.state, self.end)
        )
        measured = (self.engine, self.ema, self.state, self.tracker)
        self.measurements = Measurements(config, world, shards, *measured, guide, self.end, self.stop_signal.check)
        if world.is_main:
            for caution in filter(None, [*cautions(config, self.end), shards.caution()]):
                logger.warning("%s", caution)
        self.measurements.caution_about_final()

    def run(self) -> int:
        """Step until the end of the run or a signal; returns the exit code."""
        config, state = self.config, self.state
        batch, log_every = config.data.batch_size, config.tracking.log_every_steps
        snapshot_every = config.ema.snapshot_every_images
        agree_every, save_is_due = 1, False
        interval = 0.1 if sys.stderr.isatty() else PROGRESS_SECONDS
        shown: dict[str, Any] = {"unit": "img", "unit_scale": True, "disable": not self.world.is_main}
        with tqdm(total=self.end, initial=state.images, desc="train", mininterval=interval, **shown) as progress:
            self.clock.bar = progress
            if not self._measure(self.measurements.cut_short()):
                return self._stop()
            while state.images < self.end:
                self.watch.alive()
                with self.profile.step():
                    loss = self.train_step()
                progress.update(batch)
                if state.skipped_in_a_row >= config.run.rollback_after:
                    self._roll_back()
                    save_is_due = False
                    progress.n = state.images
                    continue
                # The snapshot comes before any save of this step: a resumed run starts after this step.
                if snapshot_every is not None and (state.crossed(snapshot_every, batch) or state.images >= self.end):
                    self.persistence.snapshot()
                log_point = state.step % log_every == 0 or state.images >= self.end
                save_is_due = save_is_due or state.crossed(config.checkpoint.every_images, batch)
                if log_point or save_is_due:
                    state.count(self.outcomes.settle())
                stop = False
                if log_point:
                    agreed = self.agree(loss)
                    stop = agreed.stop
                    if not agreed.writing:
                        self.persistence.finish_save()
                    agree_every = max(1, min(log_every, int(AGREE_SECONDS * agreed.rate / batch)))
                    self.log(agreed)
                    progress.set_postfix_str(f"loss {agreed.loss:.4f}")
                elif state.step % agree_every == 0:
                    stop = parallel.any_rank(self.stop_signal.received)
                if stop:
                    return self._stop()
                # Never save in the middle of a streak of skipped steps: a rollback must land on finite gradients.
                if save_is_due and state.skipped_in_a_row == 0:
                    save_is_due = False
                    with self.clock.stopped():
                        self.persistence.save()
                if not self._measure(self.measurements.due()):
                    return self._stop()
                if state.crossed(config.evaluation.grid_every_images, batch):
                    with self.clock.stopped("grid of samples"):
                        self.measurements.grid(SAMPLES, config.evaluation)
        state.count(self.outcomes.settle())
        self.persistence.save(last=True)
        self.watch.pause()
        if config.evaluation.at_end:
            # The evaluation keeps its finished blocks in files, so a signal may end the process at once.
            with self.stop_signal.exit_on_signal(state.step):
                return after_the_end(self.measurements.final)
        return ExitCode.DONE

    def train_step(self) -> torch.Tensor:
        """One optimizer step on the next global batch; returns this rank's part of the mean losses, (2,).

        The first is the loss of the output layer, the second that of the middle output layer (0 without one).
        """
        config, state, engine = self.config, self.state, self.engine
        images = state.images + config.data.batch_size
        lr = learning_rate(config.optim, images, self.end)
        # Dropout is a function of (step, rank), so that a resumed run draws the same masks as an unbroken one.
        torch.manual_seed(int(generator_seeds(config.run.seed, Purpose.DROPOUT, state.step, self.world.rank)[0]))
        total = torch.zeros(2, device=self.world.device)
        micro_batches = engine.micro_batches * self.world.size  # sum over all ranks
        routed = routes(config.run, images)
        self.faults.begin_step(state.step + 1)
        for micro_batch in range(engine.micro_batches):
            with self.rank_times.part():
                self.faults.inject()
                with self.part("data"):
                    inputs = next(self.feed)
                self.bad_samples.note(inputs.bad_samples)
                kept = inputs.kept if routed else None
                prediction = engine(inputs.z, inputs.t, inputs.labels, kept, middle=config.model.middle_head > 0)
                losses, middle = self.losses(prediction, inputs.x, inputs.e, inputs.z, inputs.t, kept)
                self.loss_by_noise_level.add(inputs.t, losses)
                loss = self.faults.loss(losses.mean())
                total[0] += loss.detach() / micro_batches
                if middle is not None:
                    middle_loss = middle.mean()
                    total[1] += middle_loss.detach() / micro_batches
                    loss = loss + config.diffusion.middle_weight * middle_loss
            with self.part("engine_backward"):
                engine.backward(loss)
            with self.part("optimizer"):
                moved = engine.step(lr if micro_batch == engine.micro_batches - 1 else None)
        state.step, state.images = state.step + 1, images
        with self.part("ema"):
            self.ema.update(engine.masters(), state.step, (images - config.data.batch_size, images), moved=moved)
        state.count(self.outcomes.add(moved))
        return total

    def agree(self, loss: torch.Tensor) -> LogPoint:
        """Exchange with the other ranks after a step; `loss` (2,) is this rank's part. A collective call."""
        return exchange(
            stop=self.stop_signal.received,
            writing=self.persistence.is_writing,
            bad_samples=self.bad_samples.here,
            rate=self.clock.take_rate(self.state.images),
            seconds=self.rank_times.take(),
            loss=loss,
            losses=self.loss_by_noise_level.take(),
        )

    def log(self, agreed: LogPoint) -> None:
        """Record the last step. Raises a DataError on every rank if too many images could not be decoded."""
        config, state, rate = self.config, self.state, agreed.rate
        bad_samples = self.bad_samples.check(agreed.bad_samples, state.images)
        spike = self.spikes.record(agreed.loss)
        if spike and self.world.is_main:
            logger.warning("step %d: loss spike: %.4g is far above the last losses", state.step, agreed.loss)
        for slow in agreed.slow_ranks:
            logger.warning("rank %d is slow: %.3f s to its first collective, the median %.3f s", *slow)
        values: dict[str, float | int | None] = {
            "step": state.step,
            "images": state.images,
            "loss": agreed.loss,
            "lr": learning_rate(config.optim, state.images, self.end),
            "grad_norm": self.engine.gradient_norm(),
            "images_per_second": rate,
            "skipped_steps": state.skipped_steps,
            "skipped_images": state.skipped_images,
            "bad_samples": bad_samples,
            "loss_spike": int(spike),
            **agreed.loss_by_noise_level,
        }
        if config.model.middle_head > 0:
            values["middle_loss"] = agreed.middle_loss
        if (peak := peak_tflops(self.world.device)) is not None:
            values["mfu"] = model_flops_utilisation(config, state.images, rate / self.world.size, peak)
        with self.part("tracking"):
            self.tracker.log(values)

    def close(self) -> None:
        """Release threads, files, signal handlers and the engine."""
        self.watch.close()
        self.profile.close()
        self.feed.close()
        self.tracker.close()
        self.stop_signal.restore()
        self.engine.destroy()

    def _stop(self) -> int:
        """Save because of a signal; returns the exit code, the same on all ranks."""
        self.state.count(self.outcomes.settle())
        saved_step = self.persistence.save_before_stop()
        self.stop_signal.interrupted = parallel.any_rank(self.stop_signal.interrupted)
        if self.world.is_main:
            logger.info("%s", self.stop_signal.said(saved_step))
        return self.stop_signal.code

    def _measure(self, due: Sequence[Measurement]) -> bool:
        """Save this step, then take the measurements that are due after it. Returns False if a signal stops the run.

        A measurement may take longer than a scheduler waits. Therefore the step is saved first, and a signal then ends
        the process at once; the resumed run repeats the measurement. If the step is not saved (the save failed, or the
        step was skipped), a signal takes effect at the next block of the measurement, and the run saves then.
        """
        if not due:
            return True
        with self.clock.stopped("measurement"):
            self.state.count(self.outcomes.settle())
            if self.state.skipped_in_a_row == 0:
                self.persistence.save()
                self.persistence.finish_save()
            saved = self.persistence.saved_step == self.state.step
            if saved and parallel.any_rank(self.stop_signal.received):
                return False
            self.watch.pause()
            with self.stop_signal.exit_on_signal(self.state.step) if saved else nullcontext():
                return all(self.measurements.attempt(measure) for measure in due)

    def _roll_back(self) -> None:
        """Load the last checkpoint, and go on with the data after this step."""
        with self.clock.stopped():
            self.feed.close()
            self.persistence.roll_back()
            self.outcomes.settle()  # discards them: these steps are undone
            self.spikes = LossSpikes()
            self.feed.start(self.state.position)
            self.tracker.rewind(self.state.step)
        self.clock.restart(self.state.images)
