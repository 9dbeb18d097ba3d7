"""Writing checkpoints, and snapshots of the power-function averages, in the form that `format` describes.

    checkpoints/step_00001000/           the whole state, pruned as `checkpoint.keep_last` says
    snapshots/images_000001048576/       power averages only, never pruned; tools/posthoc_ema.py mixes them

A snapshot's position is a function of the images seen, so that a resumed run writes those again that its checkpoint
does not know of, in their place.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jitscale import __version__, parallel
from jitscale.checkpoints.format import (
    FORMAT,
    MARKER,
    Checkpoint,
    Flats,
    Fragment,
    Progress,
    complete_checkpoints,
    whole_fragments,
)
from jitscale.checkpoints.streams import atomic_safetensors
from jitscale.config import Config, to_yaml
from jitscale.errors import CheckpointError
from jitscale.files import sha256_of
from jitscale.versions import version_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A rank's file: name, bytes, sha256, and (parameter, shape, offset, length) of each fragment in it.
_Part = tuple[str, int, str, list[tuple[str, tuple[int, ...], int, int]]]
_SNAPSHOT_FOLDER = re.compile(r"images_(\d{12,})")


class Save:
    """One checkpoint on its way to the disk. The state is copied when it is made, so that training may go on.

    Attributes:
        progress: the run's.

    Every rank makes it and calls `finish`, both of which are collective; in between each writes its own file, by
    `write` or in the background.
    """

    def __init__(
        self,
        final: Path,
        progress: Progress,
        config: Config,
        fragments: Sequence[Fragment],
        sets: Mapping[str, Flats],
        writer: Callable[[dict[str, torch.Tensor], Path], None] = save_file,
    ) -> None:
        """
        Args:
            final: the folder that it becomes.
            progress: the run's.
            config: the run's.
            fragments: of this rank.
            sets: set name -> this rank's flat tensors.
            writer: of this rank's file, from its tensors.

        Raises:
            CheckpointError: on every rank, if there is not enough room, or the folder cannot be made.
        """
        self.progress = progress
        self._writer = writer
        self._config = config
        self._final = final
        self._aside = _aside(final)
        self._file = self._aside / f"rank_{_this_rank():05d}.safetensors"
        self._set_names = list(sets)
        self._owned = [(f.name, f.shape, f.offset, f.length) for f in fragments]
        self._thread: threading.Thread | None = None
        self._result: tuple[int, str] | CheckpointError | None = None
        needed = sum(parallel.gather_objects(sum(f.length for f in fragments) * len(sets) * 4))

        def begin() -> None:
            if _this_rank() == 0:
                _make_room(self._aside, self._final, needed)

        _saving(self._aside, begin)
        # Copies, because slices of one flat tensor share its memory and training goes on in it.
        self._tensors = {
            f"{name}:{f.name}:{f.offset}": flat.detach()[f.start : f.start + f.length].to("cpu", copy=True)
            for name, flats in sets.items()
            for f in fragments
            if (flat := flats[f.flat]) is not None
        }

    def write(self) -> None:
        """Write this rank's file; `finish` says whether that worked."""
        try:
            self._writer(self._tensors, self._file)
            _flush(self._file)
            self._result = (self._file.stat().st_size, sha256_of(self._file))
        except (OSError, SafetensorError) as error:
            self._result = _unwritable(self._aside, error)
        self._tensors = {}

    def write_in_background(self) -> None:
        """`write`, while the caller goes on."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether every rank's file is written or has failed; a collective call."""
        return not parallel.any_rank(self._thread is not None and self._thread.is_alive())

    def finish(self) -> Path:
        """Wait for all files, and make the folder complete; a collective call.

        Returns:
            The complete folder.

        Raises:
            CheckpointError: on every rank, if any rank could not write. What an earlier save wrote stays.
        """
        if self._thread is not None:
            self._thread.join()

        def own() -> tuple[str, int, str]:
            assert self._result is not None
            if isinstance(self._result, CheckpointError):
                raise self._result
            return (self._file.name, *self._result)

        def complete() -> None:
            if _this_rank() == 0:
                _complete(self._aside, self._final, self.progress, self._config, self._set_names, parts)

        # Each stage ends on all ranks before the next begins, and fails on all ranks alike.
        try:
            parts = parallel.gather_objects((*_saving(self._aside, own), self._owned))
            _saving(self._aside, complete)
        except CheckpointError:
            if _this_rank() == 0:
                shutil.rmtree(self._aside, ignore_errors=True)  # a full disk needs its room
            raise
        return self._final


def write_folder(
    final: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Flats],
) -> Path:
    """Make a `Save`, write it and finish it at once; a collective call.

    Returns:
        The complete folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write. What an earlier save wrote stays.
    """
    save = Save(final, progress, config, fragments, sets)
    save.write()
    return save.finish()


def write_streamed(
    final: Path,
    progress: Progress,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    sets: Sequence[str],
    tensor: Callable[[str, str], torch.Tensor],
) -> Path:
    """A checkpoint written by one process, one tensor in memory at a time.

    Args:
        final: the folder, which appears complete or not at all.
        progress: of the run.
        config: of the run.
        shapes: parameter name -> shape.
        sets: names of weight sets and moments.
        tensor: the float32 values of (set, parameter), asked for once each.

    Raises:
        CheckpointError: there is not enough room, or the folder cannot be written.
    """
    aside = _aside(final)
    file = aside / "rank_00000.safetensors"
    entries = {f"{name}:{parameter}:0": (prod(shape),) for parameter, shape in shapes.items() for name in sets}
    whole = [(f.name, f.shape, f.offset, f.length) for f in whole_fragments(shapes)]

    def write() -> Path:
        _make_room(aside, final, 4 * sum(length for (length,) in entries.values()))
        with atomic_safetensors(file, entries) as append:
            for parameter in shapes:
                for name in sets:
                    append(tensor(name, parameter))
        parts = [(file.name, file.stat().st_size, sha256_of(file), whole)]
        _complete(aside, final, progress, config, list(sets), parts)
        return final

    try:
        return write()  # by one process alone, whether there are others or not: no collective
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _unwritable(aside, error) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def prune(run_dir: Path, keep_last: int, keep_every_images: int | None = None) -> None:
    """Remove complete checkpoints, and what interrupted saves left.

    The newest `keep_last` stay, and of all the first one at or after each multiple of `keep_every_images`.
    """
    folders = complete_checkpoints(run_dir)
    kept, previous = set(folders[-keep_last:]), 0
    if keep_every_images is not None:
        for folder in folders:
            images = Checkpoint(folder).progress.images // keep_every_images
            if images > previous:
                kept.add(folder)
            previous = images
    for folder in folders:
        if folder not in kept:
            (folder / MARKER).unlink()  # first: a kill during the removal leaves no folder that looks complete
            shutil.rmtree(folder)
    for leftover in (run_dir / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(leftover)


def snapshot_folder(run_dir: Path, images: int) -> Path:
    """The folder of the snapshot after `images` images."""
    return run_dir / "snapshots" / f"images_{images:012d}"


def complete_snapshots(run_dir: Path) -> dict[int, Path]:
    """All complete snapshot folders of a run by the images seen, oldest first."""
    folders = (run_dir / "snapshots").glob("images_*")
    found = {int(m[1]): f for f in folders if (m := _SNAPSHOT_FOLDER.fullmatch(f.name)) and (f / MARKER).exists()}
    return dict(sorted(found.items()))


def remove_snapshots_after(run_dir: Path, images: int) -> None:
    """Remove what an abandoned continuation of the run wrote after `images` images, and what interrupted saves left.

    A run goes on from its newest checkpoint, and with other settings it might pass other points than before.
    """
    for seen, folder in complete_snapshots(run_dir).items():
        if seen > images:
            logger.info("%s: newer than the checkpoint the run goes on from; removed, to be written again", folder)
            (folder / MARKER).unlink()  # first, so that a kill during the removal leaves nothing that looks complete
    for folder in (run_dir / "snapshots").glob("images_*"):
        if not (folder / MARKER).exists() or folder.suffix == ".partial":
            shutil.rmtree(folder)


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _make_room(aside: Path, final: Path, needed: int) -> None:
    """An empty folder `aside` on a file system with `needed` free bytes."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    if needed > free:
        aside.rmdir()
        raise CheckpointError(
            f"{final}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; make room, the previous checkpoint "
            "stays"
        )


def _complete(
    aside: Path, final: Path, progress: Progress, config: Config, sets: list[str], parts: list[_Part]
) -> None:
    """Turn `aside`, which holds the ranks' files, into the complete checkpoint `final`."""
    _write_index(aside / "index.json", progress, sets, parts)
    (aside / "config.yaml").write_text(to_yaml(config))
    _flush(aside / "config.yaml")
    hashes = {name: sha256_of(aside / name) for name in ("index.json", "config.yaml")}
    (aside / MARKER).write_text(json.dumps(hashes))
    _flush(aside / MARKER)
    shutil.rmtree(final, ignore_errors=True)  # at most what an interrupted removal left
    aside.rename(final)
    _flush(final.parent)


def _saving(path: Path, action: Callable[[], T]) -> T:
    """One stage of a save on all ranks.

    Raises:
        CheckpointError: the file system failed on some rank.
    """

    def guarded() -> T:
        try:
            return action()
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error

    return parallel.raise_together(guarded)


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({error}); the previous checkpoint stays")


def _write_index(
    path: Path,
    progress: Progress,
    sets: list[str],
    parts: list[_Part],
) -> None:
    parameters: dict[str, dict[str, list[object]]] = {}
    for number, (_, _, _, owned) in enumerate(parts):
        for name, shape, offset, length in owned:
            entry = parameters.setdefault(name, {"shape": list(shape), "fragments": []})
            entry["fragments"].append([number, offset, length])
    index = {
        "format": FORMAT,
        "progress": asdict(progress),
        "sets": sets,
        "files": {name: size for name, size, _, _ in parts},
        "sha256": {name: sha256 for name, _, sha256, _ in parts},
        "parameters": parameters,
        "versions": dict(_versions()),
    }
    path.write_text(json.dumps(index))
    _flush(path)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "jitscale", __version__
    yield "torch", torch.__version__
    yield "deepspeed", version_of("deepspeed") or "unknown"


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk before anything depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _this_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
