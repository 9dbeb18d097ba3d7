"""A run's state on disk: resuming, saving, rolling back."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jitscale import parallel
from jitscale.checkpoints.format import (
    MARKER,
    Checkpoint,
    Flats,
    Fragment,
    Progress,
    complete_checkpoints,
    load_fragments,
    step_folder,
)
from jitscale.checkpoints.middle_layer import with_middle_layer_of
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import Save, prune, remove_snapshots_after, snapshot_folder, write_folder
from jitscale.checkpoints.weights import MOMENTS, StoredWeights, check_finite, check_fits
from jitscale.config import Config, held_out_fraction, to_yaml
from jitscale.data.class_order import refuse_other_classes
from jitscale.data.shards import ShardSet
from jitscale.errors import CheckpointError, DataError, StorageError, UserError
from jitscale.files import atomic_write
from jitscale.parallel import World
from jitscale.run_folder import Claim
from jitscale.tracking import Tracker
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from jitscale.training.faults import FaultInjection
from jitscale.training.state import RunState
from jitscale.training.stopping import HangWatch
from jitscale.training.watch import BadSamples

logger = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3  # limit for failed saves in a row

_TRAINING_SETTINGS = (  # besides the groups model, diffusion, optim and ema
    *("data.batch_size", "data.flip", "engine.precision", "engine.float8"),
    *("run.max_images", "run.max_steps", "run.rollback_after", "run.route_until_images"),
)
_NOTHING_LEFT = "nothing is left to train"

DataIdentity = dict[str, int | str]  # determines the sample sequence; `origin`: the position where its epoch 0 begins


@dataclass(eq=False)
class Persistence:
    """Loads, saves and rolls back the state of a run; every method is a collective call."""

    config: Config
    world: World
    engine: ZeroEngine  # its weights and moments are saved
    ema: ShardedEma
    state: RunState
    bad_samples: BadSamples  # their count is saved
    faults: FaultInjection
    data: DataIdentity
    class_names: list[str] | None  # classes of the training data; None: unknown
    claim: Claim
    saved_step: int | None = None
    _saving: Save | None = field(default=None, init=False)
    _failed_saves: int = field(default=0, init=False)
    _rollbacks: int = field(default=0, init=False)

    @property
    def _run_dir(self) -> Path:
        return Path(self.config.run.dir)

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from `checkpoint`. Raises a CheckpointError on every rank if it is damaged."""
        progress, state = checkpoint.progress, self.state
        missing = [name for name in self.ema.sets if name not in checkpoint.sets]
        if missing and self.world.is_main:
            text = "%s: the checkpoint lacks %s; these averages start from the weights"
            logger.warning(text, checkpoint.path, ", ".join(missing))
        self._fill(checkpoint, progress.optimizer_step, dict.fromkeys(missing, "model"))
        state.step, state.images = progress.step, progress.images
        state.skipped_steps, state.skipped_images = progress.skipped_steps, progress.skipped_images
        self.bad_samples.begin_again(progress.bad_samples)
        self.saved_step = progress.step
        if self.world.is_main:
            logger.info("resuming %s at step %d, %d images", checkpoint.path, state.step, state.images)
            for line in changes_since(checkpoint, self.config):
                logger.warning("%s", line)

    def begin_with(self, initial: StoredWeights) -> None:
        """Load weights, and the averages that both sides have; the optimizer's moments start at zero.

        Raises a CheckpointError on every rank if they are damaged, or lack `run.init_weights`.
        """
        run, default = self.config.run, "model" if "model" in initial.weight_sets else None
        weights = initial.choose(run.init_weights or default)
        # A power-function average weighs the whole run. The run starts here, so no stored one fits.
        own = [name for name in self.ema.sets if name not in self.ema.power_sets]
        kept = [name for name in own if run.init_ema and name in initial.weight_sets]
        self._fill(initial, 0, {name: weights for name in ("model", *self.ema.sets) if name not in kept})
        if self.world.is_main:
            averages = ", ".join(kept) or "none"
            logger.info("starting from %s of %s; averages loaded: %s", weights, initial.path, averages)

    def _fill(self, source: StoredWeights, optimizer_step: int, stored_name: Mapping[str, str]) -> None:
        """Load all sets from `source`; `stored_name` maps a set to its name there, if the names differ."""
        sets = {**self.engine.prepare_to_load(optimizer_step), **self.ema.sets}

        def fill() -> None:
            for name, flats in sets.items():
                load_fragments(source, self.engine.fragments, {stored_name.get(name, name): flats})

        parallel.raise_together(fill)  # ranks read different files, and any may be damaged
        self.engine.finish_loading()

    def save(self, *, last: bool = False) -> None:
        """Write the state unless it is on disk already.

        The `last` save is synchronous; with `checkpoint.asynchronous`, others run in the background. A failed save
        leaves the previous checkpoint as it is, and training goes on. Raises a CheckpointError on every rank if the
        `last` save fails, or `MOST_FAILED_SAVES` in a row.
        """
        self.finish_save()
        if parallel.on_main(self._write_again_what_is_gone):
            self.saved_step = None
        if self.saved_step == self.state.step:
            return
        sets: dict[str, Flats] = {"model": self.engine.masters(), **self.ema.sets, **self.engine.moments()}
        progress, folder = self._progress(self.bad_samples.total()), step_folder(self._run_dir, self.state.step)
        with self._tolerated_failures(last=last):
            self._saving = Save(folder, progress, self.config, *self._with_buffers(sets), self.faults.writer())
        if last or not self.config.checkpoint.asynchronous:
            self.finish_save(last=last)

    def save_before_stop(self) -> int:
        """Save synchronously because of a signal; returns the step from which the next start resumes.

        If the save fails, the run resumes from the previous checkpoint, and the steps after it are lost. Raises a
        CheckpointError on every rank if there is no previous checkpoint.
        """
        try:
            self.save(last=True)
        except CheckpointError as error:
            if self.saved_step is None:
                raise
            if self.world.is_main:
                logger.error("%s", error)
        assert self.saved_step is not None
        return self.saved_step

    def _write_again_what_is_gone(self) -> bool:
        """Restore the lock and config.yaml if somebody has removed them; returns whether the newest checkpoint is gone.

        If the file system fails, the next save tries again. Raises a UserError if another run has begun in the folder.
        """
        marker = None if self.saved_step is None else step_folder(self._run_dir, self.saved_step) / MARKER
        unsaved = False
        try:
            unsaved = marker is not None and not marker.exists()
            gone = [".lock"] if self.claim.is_lost() else []
            gone += [] if (self._run_dir / "config.yaml").exists() else ["config.yaml"]
            gone += [f"checkpoints/{marker.parent.name}"] if marker is not None and unsaved else []
            if gone:
                what = "removed or moved while the run was at work; the run writes the missing files again"
                logger.error("run.dir=%s: %s gone, %s", self._run_dir, " and ".join(gone), what)
                self.claim.take_again()
                write_config(self.config)
        except (OSError, StorageError) as error:
            logger.error("run.dir=%s: cannot be checked (%s); the next save tries again", self._run_dir, error)
        return unsaved

    @property
    def is_writing(self) -> bool:
        """True if this rank still writes its file of a checkpoint."""
        return self._saving is not None and not self._saving.is_written

    def finish_save(self, *, last: bool = False) -> None:
        """Complete the checkpoint that is being written, if there is one.

        Raises a CheckpointError on every rank if the `last` save failed, or `MOST_FAILED_SAVES` in a row.
        """
        if self._saving is None:
            return
        save, self._saving = self._saving, None
        with self._tolerated_failures(last=last):
            save.finish()
            self.saved_step, self._failed_saves = save.progress.step, 0
            if self.world.is_main:
                keep = self.config.checkpoint
                try:
                    prune(self._run_dir, keep.keep_last, keep.keep_every_images)
                except (OSError, UserError) as error:
                    logger.warning("old checkpoints could not be removed (%s); the next save tries again", error)

    def snapshot(self) -> None:
        """Store the power averages of this step.

        Raises a CheckpointError on every rank if `MOST_FAILED_SAVES` saves failed in a row.
        """
        folder = snapshot_folder(self._run_dir, self.state.images)
        with self._tolerated_failures():
            write_folder(folder, self._progress(0), self.config, *self._with_buffers(self.ema.power_sets))

    def roll_back(self) -> None:
        """Roll back to the last checkpoint, and skip the data since then, which gave infinite gradients.

        Raises a UserError on every rank if there is no checkpoint, or after `run.max_rollbacks` rollbacks.
        """
        self.finish_save()
        self._rollbacks += 1
        state, limit, position = self.state, self.config.run.max_rollbacks, self.state.position
        what = f"step {state.step}: no finite gradient in {state.skipped_in_a_row} steps"
        checkpoint = newest_sound_checkpoint(self._run_dir, self.world)
        if checkpoint is None or self._rollbacks > limit:
            why = "there is no checkpoint yet" if checkpoint is None else f"run.max_rollbacks={limit} are used up"
            remedy = "lower optim.lr, set optim.grad_clip, or check the data before this step"
            raise UserError(f"{what}, and {why}; {remedy}")
        self.load(checkpoint)
        state.skipped_images, state.skipped_in_a_row = position - state.images, 0
        parallel.on_main(lambda: remove_snapshots_after(self._run_dir, state.images))
        if self.world.is_main:
            text = "%s; rolled back to step %d, skipping %d images"
            logger.warning(text, what, state.step, state.skipped_images)

    def _with_buffers(self, sets: Mapping[str, Flats]) -> tuple[list[Fragment], dict[str, Flats]]:
        """The engine's fragments, and the flats of `sets`; rank 0 adds the network's stored buffers to each of them."""
        fragments, buffers = list(self.engine.fragments), self.engine.stored_buffers() if self.world.is_main else {}
        for number, (name, buffer) in enumerate(buffers.items(), len(self.engine.masters())):
            fragments.append(Fragment(name, tuple(buffer.shape), number, 0, buffer.numel(), 0))
        flat = [buffer.flatten() for buffer in buffers.values()]
        moments = [None] * len(flat)
        return fragments, {name: [*flats, *(moments if name in MOMENTS else flat)] for name, flats in sets.items()}

    def _progress(self, bad_samples: int) -> Progress:
        state, updates = self.state, self.engine.optimizer_step()
        skipped = state.skipped_steps, state.skipped_images
        return Progress(state.step, state.images, updates, self.data, bad_samples, *skipped, self.class_names)

    @contextmanager
    def _tolerated_failures(self, *, last: bool = False) -> Iterator[None]:
        """Tolerate a failed save, unless it is the `last` one or one of several in a row; the same on all ranks."""
        try:
            yield
        except CheckpointError as error:
            self._failed_saves += 1
            if last or self._failed_saves >= MOST_FAILED_SAVES:
                raise
            if self.world.is_main:
                logger.error("%s; training goes on, and the next save may work", error)


def open_records(config: Config, world: World, state: RunState, end: int) -> tuple[Tracker, HangWatch]:
    """Write the first files into the run's folder, after all checks: a refused start leaves the folder unchanged.

    The run starts at `state` and is complete after `end` images. Raises a StorageError if the folder cannot be written.
    """
    run_dir = Path(config.run.dir)
    try:
        if world.is_main:
            write_config(config)
            if state.images < end:  # an earlier, shorter run wrote the result; results/ keeps a copy
                (run_dir / "result.json").unlink(missing_ok=True)
            remove_snapshots_after(run_dir, state.images)
        tracker = Tracker(config, run_dir, world.is_main, state.step)
        return tracker, HangWatch(config.run.hang_timeout, run_dir / f"stacks_rank_{world.rank:05d}.txt")
    except OSError as error:
        what = f"run.dir={run_dir}: cannot be written ({error}); make room or choose another"
        raise StorageError.of(error, what) from error


def write_config(config: Config) -> None:
    """Write the configuration into the run's folder. Raises an OSError if that fails."""
    with atomic_write(Path(config.run.dir) / "config.yaml") as file:
        file.write(to_yaml(config).encode())


def newest_sound_checkpoint(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest complete checkpoint, the same on every rank, with all its files verified; a collective call.

    Raises a CheckpointError on every rank if it is damaged, a StorageError if it cannot be read.
    """
    # Only rank 0 lists the folder: a shared file system may show the other ranks an older state.
    folders = parallel.on_main(lambda: complete_checkpoints(run_dir)[-1:])
    if not folders:
        return None
    checkpoint = parallel.raise_together(lambda: Checkpoint(folders[0]))
    parallel.raise_together(lambda: checkpoint.verify(world.rank, world.size))
    return checkpoint


def initial_weights(config: Config, world: World) -> StoredWeights | None:
    """The weights of `run.init_from`, verified; None if it is not set. A collective call.

    The middle output layer may be at another depth, or only one side may have one. Raises a CheckpointError on every
    rank if the weights cannot be read, or belong to another network.
    """

    def opened() -> StoredWeights | None:
        if config.run.init_from is None:
            return None
        weights, change = with_middle_layer_of(open_weights(config.run.init_from, config), config)
        check_fits(weights, config)
        weights.verify(world.rank, world.size)
        if change and world.is_main:
            logger.info("%s", change)
        return weights

    def check_share() -> None:
        if initial is not None:
            default = "model" if "model" in initial.weight_sets else None
            begun_with = initial.choose(config.run.init_weights or default)
            check_finite(initial, [begun_with], world.rank, world.size)

    initial = parallel.raise_together(opened)
    parallel.raise_together(check_share)
    return initial


def data_identity(config: Config, shards: ShardSet, checkpoint: Checkpoint | None) -> DataIdentity:
    """Everything that determines the sample sequence.

    Epoch 0 begins at the `origin` of `checkpoint`, or, if the shards changed, at its position. Raises a DataError that
    names the differences from `checkpoint`: samples would be seen twice or never.
    """
    data = config.data
    now: DataIdentity = {"seed": config.run.seed, "streams": data.streams, "window": data.window}
    now["manifest"] = shards.manifest_hash
    if shards.held_out is not None:
        now["held_out"] = str(held_out_fraction(data) or shards.held_out.manifest_hash)
    if checkpoint is None or checkpoint.progress.data is None:  # an upgraded or converted checkpoint at step 0
        return {**now, "origin": 0}
    progress, before = checkpoint.progress, checkpoint.progress.data
    differing = [key for key in {**now, **before} if key != "origin" and before.get(key) != now.get(key)]
    if not differing:
        return {**now, "origin": before.get("origin", 0)}
    changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in differing)
    if differing != ["manifest"] or not data.accept_new_shards:
        remedy = "restore data.shards, data.held_out, run.seed, data.streams and data.window, start a new run.dir"
        other = "or begin a new epoch with the new shards: data.accept_new_shards=true"
        raise DataError(f"{checkpoint.path}: the data or its order changed ({changes}); {remedy}, {other}")
    logger.warning("%s: the shards changed (%s); a new epoch begins with the new shards", checkpoint.path, changes)
    return {**now, "origin": progress.images + progress.skipped_images}


def trained_classes(
    config: Config, shards: ShardSet, checkpoint: Checkpoint | None, initial: StoredWeights | None
) -> list[str] | None:
    """The names of the classes that the run learns; None if they are unknown, or if there are no classes.

    Raises a DataError if the classes of `checkpoint` have other numbers in `shards`, even if new shards are accepted.
    The `initial` weights may have other classes: a warning says so.
    """
    if config.model.num_classes == 0:
        return None
    remedy = "restore data.shards, or write them with the old --class-names"
    if checkpoint is not None:
        learnt = checkpoint.class_names
        refuse_other_classes(str(checkpoint.path), learnt, "data.shards", shards.class_names, remedy)
        return shards.class_names or learnt
    if initial is not None:
        try:
            refuse_other_classes(str(initial.path), initial.class_names, "data.shards", shards.class_names, remedy)
        except DataError as error:
            logger.warning("run.init_from: %s; ignore this warning if you want to train other classes", error)
    return shards.class_names


def check_resumable(checkpoint: Checkpoint, config: Config) -> None:
    """Raise a CheckpointError if `checkpoint` has another network, noise scale or optimizer than `config`."""
    path, before = checkpoint.path, checkpoint.config
    compared = (
        ("it was trained with model.middle_head", before.model.middle_head, config.model.middle_head),
        ("its moments belong to optim.name", before.optim.name, config.optim.name),
    )
    differing = [f"{path}: {what}={old}, the config says {new}" for what, old, new in compared if old != new]
    same_layers = before.model.middle_head == config.model.middle_head
    check_fits(checkpoint if same_layers else with_middle_layer_of(checkpoint, config)[0], config)
    if differing:
        raise CheckpointError(f"{differing[0]}; restore it, or start a new run.dir with run.init_from={path}")


def changes_since(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Lines for the log: each training setting that differs from `checkpoint`, and an end that is already passed."""
    before, now = _training_settings(checkpoint.config), _training_settings(config)
    changes = [(key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)]
    lines = [f"since this checkpoint: {key} {old} -> {new}" for key, old, new in changes]
    progress, run = checkpoint.progress, config.run
    if run.max_steps is not None and run.max_steps < progress.step:
        lines.append(f"run.max_steps={run.max_steps} is below the {progress.step} steps already done; {_NOTHING_LEFT}")
    if run.max_images is not None and run.max_images <= progress.images - config.data.batch_size:
        done = f"{progress.images} images already seen"
        lines.append(f"run.max_images={run.max_images} is below the {done}; {_NOTHING_LEFT}")
    return lines


def _training_settings(config: Config) -> dict[str, object]:
    """The settings that influence training, by dotted name; `data_identity` checks the order of the data."""
    groups = {name: vars(group) for name, group in vars(config).items()}
    return {
        f"{group}.{name}": value
        for group, named in groups.items()
        for name, value in named.items()
        if group in ("model", "diffusion", "optim", "ema") or f"{group}.{name}" in _TRAINING_SETTINGS
    }
