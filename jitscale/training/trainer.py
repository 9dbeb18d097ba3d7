"""The training loop: resume, step, log, save, stop.

Shapes: B images of a micro-batch.
"""

from __future__ import annotations

import logging
import math
import signal
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from jitscale import parallel
from jitscale.config import Config, network_differences, to_yaml
from jitscale.data.loader import Batch, ShardLoader, check_shared_memory, naming_dead_workers, to_model_input
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet, open_configured
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal
from jitscale.errors import CheckpointError, DataError, ExitCode, UserError
from jitscale.evaluation.distributed import autocast, evaluate_model
from jitscale.evaluation.generate import configured_sampler, sample_grid
from jitscale.keyed_random import Purpose, generator_seeds, normal, uniform
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.planner import training_flops
from jitscale.tracking import Tracker, peak_tflops
from jitscale.training.checkpoint import (
    Checkpoint,
    Progress,
    latest_checkpoint,
    load_fragments,
    prune,
    write_checkpoint,
)
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.optim import learning_rate
from jitscale.training.snapshots import remove_snapshots_after, write_snapshot

logger = logging.getLogger(__name__)

GRID_COLUMNS, GRID_ROWS = 8, 10


def train(config: Config, world: World) -> ExitCode:
    """Train until `run.max_images` or `run.max_steps`, from the newest checkpoint of `run.dir` if there is one.

    Returns:
        DONE, or REQUEUE after a signal asked to stop and the state was saved.

    Raises:
        UserError: on every rank alike, for what a user can mend: before the first step where it can be known then.
    """
    run_dir = Path(config.run.dir)
    shards = _open_inputs(config, world, run_dir)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        _check_resumable(checkpoint, config, shards)
    trainer = Trainer(config, world, run_dir, shards, checkpoint)
    try:
        with naming_dead_workers():
            return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """One run on one rank."""

    def __init__(
        self, config: Config, world: World, run_dir: Path, shards: ShardSet, checkpoint: Checkpoint | None
    ) -> None:
        """Build the network and its engine, and continue from `checkpoint` where there is one."""
        self.config, self.world, self.run_dir, self.shards = config, world, run_dir, shards
        torch.manual_seed(config.run.seed)
        network = JiT(config.model, config.diffusion).train()
        if checkpoint is not None:
            checkpoint.check_shapes({name: tuple(p.shape) for name, p in network.named_parameters()})
        self.engine = ZeroEngine(network, config, world)
        self.ema = ShardedEma(config.ema, self.engine.masters())
        self.step = self.images = self.skipped_steps = 0
        self.bad_samples = BadSamples(config.data.max_bad_fraction)
        self.data_identity = _data_identity(config, shards, checkpoint)
        self._resumed_at = checkpoint.progress.step if checkpoint is not None else None
        if checkpoint is not None:
            self._load(checkpoint)
        self.end = self._images_at_end()
        self.generator = torch.Generator(world.device)
        self.batches = self._batches()
        self.stop_requested = StopSignal()
        if world.is_main:  # only now: a refused start leaves the run as it was
            (run_dir / "config.yaml").write_text(to_yaml(config))
            remove_snapshots_after(run_dir, self.images)
        self.tracker = Tracker(config, run_dir, world.is_main, self.step)

    def run(self) -> ExitCode:
        """Step until the end of the run or a signal."""
        config = self.config
        clock = _Clock(self.images)
        saved_at = self._resumed_at
        with tqdm(
            total=self.end,
            initial=self.images,
            unit="img",
            unit_scale=True,
            desc="train",
            disable=not self.world.is_main,
        ) as progress:
            while self.images < self.end:
                loss = self._train_step()
                self._snapshot()  # before anything may save this step: a resumed run goes on after it
                progress.update(config.data.batch_size)
                if self.step % config.tracking.log_every_steps == 0 or self.images >= self.end:
                    progress.set_postfix_str(f"loss {self._log(loss, clock):.4f}")
                    if parallel.any_rank(self.stop_requested.received):
                        if saved_at != self.step:
                            self._save()
                        return ExitCode.REQUEUE
                if self._passed(config.checkpoint.every_images):
                    self._save()
                    saved_at = self.step
                    clock.restart(self.images)
                if config.evaluation.grid_every_images and self._passed(config.evaluation.grid_every_images):
                    self._log_grid()
                    clock.restart(self.images)
        if saved_at != self.step:
            self._save()
        if config.evaluation.at_end:
            self._evaluate()
        return ExitCode.DONE

    def close(self) -> None:
        """Release what the run holds."""
        self.batches.close()
        self.tracker.close()
        self.stop_requested.restore()
        self.engine.destroy()

    def _train_step(self) -> torch.Tensor:
        """One optimizer step on the next global batch; returns this rank's part of its mean loss."""
        config = self.config
        images = self.images + config.data.batch_size
        lr = learning_rate(config.optim, images, self.end)
        # Dropout is a function of the step and the rank, so that a resumed run drops what the unbroken one did.
        torch.manual_seed(int(generator_seeds(config.run.seed, Purpose.DROPOUT, self.step, self.world.rank)[0]))
        total = torch.zeros((), device=self.world.device)
        for micro_batch in range(self.engine.micro_batches):
            batch = next(self.batches)
            self.bad_samples.note(batch.bad_samples)
            loss = self._loss(batch)
            self.engine.backward(loss)
            last = micro_batch == self.engine.micro_batches - 1
            moved = self.engine.step(lr if last else None)
            total += loss.detach() / (self.engine.micro_batches * self.world.size)
        self.step, self.images = self.step + 1, images
        self.ema.update(self.engine.masters(), self.step, (images - config.data.batch_size, images), moved=moved)
        if not moved:
            self.skipped_steps += 1
        return total

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss of one micro-batch. Every draw is keyed by the sample's position in the global sequence."""
        config, device, seed = self.config, self.world.device, self.config.run.seed
        positions = batch.positions.numpy()

        def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)

        flip = on_device(config.data.flip & (uniform(seed, Purpose.FLIP, positions) < 0.5), torch.bool)
        t = times_from_normal(on_device(normal(seed, Purpose.TIME, positions), torch.float32), config.diffusion)
        dropped = on_device(uniform(seed, Purpose.LABEL_DROP, positions) < config.diffusion.label_drop, torch.bool)
        labels = batch.labels.to(device, non_blocking=True).masked_fill(dropped, config.model.num_classes)

        x = to_model_input(batch.images.to(device, non_blocking=True), flip)
        e = config.diffusion.noise_scale * self._noise(positions, x)
        z = interpolate(x, e, t)
        return sample_loss(self.engine(z, t, labels), x, e, z, t, config.diffusion).mean()

    def _noise(self, positions: object, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise on the device, one seeded stream a sample: (B, 3, S, S)."""
        noise = torch.empty_like(like)
        for row, seed in zip(noise, generator_seeds(self.config.run.seed, Purpose.NOISE, positions), strict=True):  # type: ignore[arg-type]
            row.normal_(generator=self.generator.manual_seed(int(seed)))
        return noise

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
            start_position=self.images,
            num_workers=data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        needed = loader.shared_memory_needed()
        parallel.together(lambda: check_shared_memory(needed, world.local_size, data.num_workers))
        parallel.together(lambda: self.shards.check_cache(loader.shards_side_by_side(world.local_size)))
        return iter(loader)

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

    def _log(self, loss: torch.Tensor, clock: _Clock) -> float:
        """Record the last step; returns its loss."""
        mean_loss = float(parallel.sum_over_ranks(loss))
        rate = clock.rate(self.images)
        values: dict[str, float | int | None] = {
            "step": self.step,
            "images": self.images,
            "loss": mean_loss,
            "lr": learning_rate(self.config.optim, self.images, self.end),
            "grad_norm": self.engine.gradient_norm(),
            "images_per_second": rate,
            "skipped_steps": self.skipped_steps,
            "bad_samples": self.bad_samples.check(self.images),
        }
        peak = peak_tflops(self.world.device)
        if peak is not None:
            values["mfu"] = rate * training_flops(self.config.model) / (peak * 1e12 * self.world.size)
        self.tracker.log(values)
        return mean_loss

    def _save(self) -> None:
        bad_samples = self.bad_samples.total()
        progress = Progress(
            self.step,
            self.images,
            self.engine.optimizer_step(),
            self.data_identity,
            bad_samples,
            self.skipped_steps,
        )
        sets = {"model": self.engine.masters(), **self.ema.sets, **self.engine.moments()}
        write_checkpoint(self.run_dir, progress, self.config, self.engine.fragments, sets)
        parallel.together(lambda: prune(self.run_dir, self.config.checkpoint.keep_last) if self.world.is_main else None)

    def _snapshot(self) -> None:
        """Store the power averages where `ema.snapshot_every_images` asks for it, and at the end of the run."""
        every_images = self.config.ema.snapshot_every_images
        if every_images is not None and (self._passed(every_images) or self.images >= self.end):
            progress = Progress(self.step, self.images, self.engine.optimizer_step(), self.data_identity)
            write_snapshot(self.run_dir, progress, self.config, self.engine.fragments, self.ema.power_sets)

    def _load(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress
        sets = self.engine.prepare_to_load(progress.optimizer_step)
        missing = [name for name in self.ema.sets if name not in checkpoint.sets]
        if missing:
            logger.warning("%s has no %s; starting from its weights", checkpoint.folder, ", ".join(missing))

        def fill() -> None:
            load_fragments(checkpoint, self.engine.fragments, {k: v for k, v in sets.items() if k in checkpoint.sets})
            for name, flats in self.ema.sets.items():
                source = "model" if name in missing else name
                load_fragments(checkpoint, self.engine.fragments, {source: flats})

        parallel.together(fill)  # ranks read different files, and any may be damaged
        self.engine.finish_loading()
        self.step, self.images = progress.step, progress.images
        self.bad_samples.before = progress.bad_samples
        self.skipped_steps = progress.skipped_steps
        if self.world.is_main:
            logger.info("resuming %s at step %d, %d images", checkpoint.folder, self.step, self.images)

    def _network(self) -> JiT:
        """A plain copy of the network with the weights that `evaluation.weights` names; a collective call."""
        name = self.config.evaluation.weights
        flats = self.engine.masters() if name == "model" else self.ema.sets[name]
        network = JiT(self.config.model, self.config.diffusion)
        network.load_state_dict(self.engine.gather(flats))
        return network.to(self.world.device).eval()

    def _log_grid(self) -> None:
        network, evaluation = self._network(), self.config.evaluation
        if self.world.is_main:
            sampler = configured_sampler(evaluation, network.diffusion)
            with autocast(self.config, self.world.device):
                grid = sample_grid(network, sampler, evaluation.seed, GRID_ROWS, GRID_COLUMNS)
            self.tracker.log_image("samples", grid, self.images)
        parallel.barrier()

    def _evaluate(self) -> None:
        result = evaluate_model(self._network(), self.config.evaluation.weights, self.config, self.world, self.run_dir)
        if self.world.is_main:
            self.tracker.log_result(result, self.images)


class BadSamples:
    """Counts the images that could not be decoded, and ends the run on all ranks together when they are too many."""

    ALWAYS_ALLOWED = 10

    def __init__(self, fraction: float) -> None:
        """`fraction` of the images seen is allowed."""
        self.fraction = fraction
        self.before = 0  # counted by all ranks until the checkpoint that this process began from
        self._here = 0
        self._reasons: list[str] = []

    def note(self, reasons: list[str]) -> None:
        """Count this rank's bad samples, and say what is wrong with the first ones."""
        self._here += len(reasons)
        for reason in reasons[: self.ALWAYS_ALLOWED - len(self._reasons)]:
            self._reasons.append(reason)
            logger.warning("%s; another sample stands in for it", reason)

    def total(self) -> int:
        """Over all ranks since the beginning of the run; a collective call."""
        return self.before + sum(parallel.gather_objects(self._here))

    def check(self, images: int) -> int:
        """The total after `images` images; a collective call.

        Raises:
            DataError: on every rank, when there are more than `ALWAYS_ALLOWED` and more than the allowed fraction.
        """
        total = self.total()
        if total > max(self.ALWAYS_ALLOWED, self.fraction * images):
            reasons = [reason for rank in parallel.gather_objects(self._reasons[:3]) for reason in rank]
            raise DataError(
                f"data.max_bad_fraction={self.fraction:g}: {total} of {images} images could not be decoded, such as "
                f"{'; '.join(reasons[:3])}. Check the shards with tools/index_shards.py --verify, or raise the limit"
            )
        return total


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2, with which schedulers ask a job to stop.

    Nothing is interrupted: at the next log point the ranks agree on whether any of them was asked.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


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


def _open_inputs(config: Config, world: World, run_dir: Path) -> ShardSet:
    """Check the output folder and the shards on every rank, before anything is built."""
    parallel.together(lambda: _check_writable(run_dir) if world.is_main else None)
    return parallel.together(lambda: open_configured(config))


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(f"run.dir={run_dir}: cannot be written ({error}); choose another folder") from error


def _data_identity(config: Config, shards: ShardSet, checkpoint: Checkpoint | None = None) -> dict[str, int | str]:
    """What fixes the sample sequence; its epoch 0 begins where `checkpoint` says, or at it if the shards changed."""
    now: dict[str, int | str] = {
        "seed": config.run.seed,
        "streams": config.data.streams,
        "window": config.data.window,
        "manifest": shards.manifest_hash,
    }
    if checkpoint is None or checkpoint.progress.data is None:
        return {**now, "origin": 0}
    before = checkpoint.progress.data
    changed = any(before.get(key) != now[key] for key in now)
    return {**now, "origin": checkpoint.progress.images if changed else before.get("origin", 0)}


def _check_resumable(checkpoint: Checkpoint, config: Config, shards: ShardSet) -> None:
    """Refuse to go on with other data or another order: samples would be seen twice or never.

    Raises:
        DataError: naming what differs.
        CheckpointError: the network or the noise scale differs.
    """
    before = checkpoint.progress.data
    now = _data_identity(config, shards)
    if before is not None:
        differing = [key for key in now if key != "origin" and before.get(key) != now[key]]
        changes = "; ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in differing)
        if differing == ["manifest"] and config.data.accept_new_shards:
            logger.warning("%s: other shards (%s); a new epoch of them begins", checkpoint.folder, changes)
        elif differing:
            raise DataError(
                f"{checkpoint.folder}: the data or its order changed ({changes}); restore data.shards, run.seed, "
                "data.streams and data.window, start a new run.dir, or begin a new epoch of other shards with "
                "data.accept_new_shards=true"
            )
    differing = network_differences(checkpoint.config, config)
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder}: a checkpoint of another network ({'; '.join(differing)}); restore these settings, "
            "or choose another run.dir"
        )
    trained_with, asked = checkpoint.config.diffusion.noise_scale, config.diffusion.noise_scale
    if not math.isclose(trained_with, asked):
        raise CheckpointError(
            f"{checkpoint.folder}: made for diffusion.noise_scale={trained_with}, the config says {asked}; "
            f"add diffusion.noise_scale={trained_with}"
        )
