"""Writing checkpoints, and snapshots of the power-function averages, in the form that `format` describes.

    checkpoints/step_00001000/           the whole state, pruned as `checkpoint.keep_last` says
    snapshots/images_000001048576/       power averages only, never pruned; tools/posthoc_ema.py mixes them

A snapshot's position is a function of the images seen. So a resumed run writes again, in their place, the snapshots
that its checkpoint does not know of.
"""

import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jitscale import parallel
from jitscale.checkpoints import format as layout
from jitscale.checkpoints.format import MARKER, Flats, Fragment, Progress
from jitscale.checkpoints.index import strange_sets
from jitscale.checkpoints.streams import atomic_safetensors
from jitscale.checkpoints.weights import names_in
from jitscale.config import Config, to_yaml
from jitscale.errors import CheckpointError, StorageError
from jitscale.files import FileIdentity, flush, sha256_of
from jitscale.versions import __version__, version_of

logger = logging.getLogger(__name__)

Writer = Callable[[dict[str, torch.Tensor], Path], None]

_Written = tuple[str, int, str]  # a rank's file: its name, bytes, sha256


class Save:
    """One checkpoint on its way to the disk: a copy of the state, which a thread writes while training goes on.

    Every rank makes it and calls `finish`; both are collective.
    """

    def __init__(
        self,
        final: Path,
        progress: Progress,
        config: Config,
        fragments: Sequence[Fragment],
        sets: Mapping[str, Flats],
        writer: Writer = save_file,
    ) -> None:
        """Begin to save this rank's `fragments` of `sets` (set name -> flat tensors) into what becomes `final`.

        `writer` writes the tensors into this rank's file. Raises a CheckpointError on every rank if there is not enough
        room, or the folder cannot be made.
        """
        self.progress, self._config, self._final = progress, config, final
        self._sets, self._fragments = list(sets), fragments
        needed = sum(parallel.gather_objects(_bytes(fragments, self._sets)))
        parallel.on_main(lambda: _make_room(final, needed))
        # Copies, because slices of one flat tensor share its memory and training goes on in it.
        tensors = {
            f"{name}:{f.name}:{f.offset}": flat.detach()[f.start : f.start + f.length].to("cpu", copy=True)
            for name, flats in sets.items()
            for f in fragments
            if (flat := flats[f.flat]) is not None
        }
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = thread.submit(_write, final, parallel.this_rank(), tensors, writer)
        thread.shutdown(wait=False)

    @property
    def is_written(self) -> bool:
        """Whether this rank's file is written or has failed."""
        return self._written.done()

    def finish(self) -> Path:
        """Wait for all files, and make the folder complete; returns it. A collective call.

        Raises a CheckpointError on every rank if any rank could not write. What an earlier save wrote stays.
        """
        # Each stage ends on all ranks before the next begins, and fails on all ranks alike.
        try:
            written = parallel.gather_objects(parallel.raise_together(self._written.result))
            owned = parallel.gather_objects(self._fragments)
            parallel.on_main(lambda: _complete(self._final, self.progress, self._config, self._sets, written, owned))
        except CheckpointError:
            if parallel.this_rank() == 0:
                shutil.rmtree(_aside(self._final), ignore_errors=True)  # a full disk needs its room
            raise
        return self._final


def write_folder(
    final: Path, progress: Progress, config: Config, fragments: Sequence[Fragment], sets: Mapping[str, Flats]
) -> Path:
    """A `Save` that is finished at once; a collective call. Arguments, result and errors are those of `Save`."""
    return Save(final, progress, config, fragments, sets).finish()


def write_streamed(
    final: Path,
    progress: Progress,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    sets: Sequence[str],
    tensor: Callable[[str, str], torch.Tensor],
) -> Path:
    """A checkpoint written by one process alone (no collective call), one tensor in memory at a time.

    The folder `final` appears complete or not at all. It holds all parameters (name -> shape) in all `sets`, moments
    included; `tensor` is asked once for the float32 values of each (set, parameter), but not for moments of what is
    `FIXED`. Raises a CheckpointError if a set is none of a run, there is not enough room, or the folder cannot be
    written.
    """
    if wrong := strange_sets(sets):
        what = f"{final}: a run has a model and averages, no weight set {wrong[0]!r}"
        raise CheckpointError(f"{what}; make it the model first, by tools/convert_checkpoint.py --to run --weights SET")
    fragments, file = layout.whole_fragments(shapes), _file(final, 0)
    held = {name: set(names_in(name, shapes)) for name in sets}
    entries = {f"{name}:{f.name}:0": (f.length,) for f in fragments for name in sets if f.name in held[name]}
    try:
        with _unwritable(final):
            _make_room(final, _bytes(fragments, sets))
            with atomic_safetensors(file, entries) as append:
                for parameter in shapes:
                    for name in sets:
                        if parameter in held[name]:
                            append(tensor(name, parameter))
            _complete(final, progress, config, sets, [_described(file)], [fragments])
    except BaseException:
        shutil.rmtree(_aside(final), ignore_errors=True)
        raise
    return final


def prune(run_dir: Path, keep_last: int, keep_every_images: int | None = None) -> None:
    """Remove complete checkpoints, and what interrupted saves left.

    The newest `keep_last` stay, and of all the first one at or after each multiple of `keep_every_images`. A folder
    that is not what its name or its index says, or cannot be read, neither counts nor is removed. Raises an OSError if
    the folders cannot be listed, or after all others were removed, one cannot be.
    """
    images_of: dict[Path, int] = {}
    for folder in layout.complete_checkpoints(run_dir):
        try:
            images_of[folder] = _images_of(folder, FileIdentity.of((folder / MARKER).stat()))
        except (CheckpointError, StorageError, OSError) as error:  # of a bad sector, which must not keep all others
            logger.warning("%s; it is left alone, and does not count as one of the checkpoints to keep", error)
    folders = list(images_of)
    kept, previous = set(folders[-keep_last:]), 0
    if keep_every_images is not None:
        for folder in folders:
            images = images_of[folder] // keep_every_images
            if images > previous:
                kept.add(folder)
            previous = images
    failed: OSError | None = None
    for folder in [*folders, *(run_dir / "checkpoints").glob("step_*.partial")]:
        try:
            if folder not in kept:
                _remove(folder)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


@lru_cache(maxsize=1000)
def _images_of(folder: Path, marker: FileIdentity) -> int:
    """The images seen by a checkpoint with this `marker`; an index of many ranks takes seconds to read, so only once.

    Raises a CheckpointError if the folder is not what it says.
    """
    return layout.Checkpoint(folder).progress.images


def snapshot_folder(run_dir: Path, images: int) -> Path:
    """The folder of the snapshot after `images` images."""
    return run_dir / "snapshots" / f"images_{images:012d}"


def complete_snapshots(run_dir: Path) -> dict[int, Path]:
    """All complete snapshot folders of a run by the images seen, oldest first."""
    return layout.complete_folders(run_dir / "snapshots", r"images_(\d{12,})")


def remove_snapshots_after(run_dir: Path, images: int) -> None:
    """Remove what an abandoned continuation of the run wrote after `images` images, and what interrupted saves left.

    A run goes on from its newest checkpoint, and with other settings it might pass other points than before.
    """
    for seen, folder in complete_snapshots(run_dir).items():
        if seen > images:
            logger.info("%s: newer than the checkpoint the run goes on from; removed, to be written again", folder)
            _remove(folder)
    for folder in (run_dir / "snapshots").glob("images_*"):
        if not (folder / MARKER).exists() or folder.suffix == ".partial":
            shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first: a kill during the removal leaves no folder that looks complete
    shutil.rmtree(folder)


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _file(final: Path, rank: int) -> Path:
    return _aside(final) / f"rank_{rank:05d}.safetensors"


def _bytes(fragments: Sequence[Fragment], sets: Sequence[str]) -> int:
    return 4 * len(sets) * sum(f.length for f in fragments)


def _make_room(final: Path, needed: int) -> None:
    """An empty folder beside `final` on a file system with `needed` free bytes."""
    aside = _aside(final)
    with _unwritable(final):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if needed > free:
            aside.rmdir()
            what = f"{final}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
            raise CheckpointError(f"{what}; make room, the previous checkpoint stays")


def _write(final: Path, rank: int, tensors: dict[str, torch.Tensor], writer: Writer) -> _Written:
    file = _file(final, rank)
    with _unwritable(final):
        writer(tensors, file)
        flush(file)
        return _described(file)


def _described(file: Path) -> _Written:
    return file.name, file.stat().st_size, sha256_of(file)


def _complete(
    final: Path,
    progress: Progress,
    config: Config,
    sets: Sequence[str],
    written: Sequence[_Written],
    owned: Sequence[Sequence[Fragment]],
) -> None:
    """Turn the folder beside `final`, with the files `written` of the fragments `owned` by each rank, into `final`."""
    parameters: dict[str, dict[str, Any]] = {}
    for rank, fragments in enumerate(owned):
        for f in fragments:
            entry = parameters.setdefault(f.name, {"shape": list(f.shape), "fragments": []})
            entry["fragments"].append([rank, f.offset, f.length])
    index = {
        "format": layout.FORMAT,
        "progress": asdict(progress),
        "sets": list(sets),
        "files": {name: size for name, size, _ in written},
        "sha256": {name: sha256 for name, _, sha256 in written},
        "parameters": parameters,
        "versions": {
            "python": platform.python_version(),
            "jitscale": __version__,
            "torch": torch.__version__,
            "deepspeed": version_of("deepspeed") or "unknown",
        },
    }
    aside = _aside(final)
    with _unwritable(final):
        hashes = {}
        for name, text in (("index.json", json.dumps(index)), ("config.yaml", to_yaml(config))):
            (aside / name).write_text(text)
            flush(aside / name)
            hashes[name] = sha256_of(aside / name)
        (aside / MARKER).write_text(json.dumps(hashes))
        flush(aside / MARKER)
        shutil.rmtree(final, ignore_errors=True)  # at most what an interrupted removal left
        aside.rename(final)
        flush(final.parent)


@contextmanager
def _unwritable(final: Path) -> Iterator[None]:
    """An error of the file system becomes a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{_aside(final)}: cannot be written ({error}); the previous checkpoint stays") from error
