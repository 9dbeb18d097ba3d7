"""Writes checkpoints, and snapshots of the power-function averages, in the format of `format`.

    checkpoints/step_00001000/           the whole state, pruned according to `checkpoint.keep_last`
    snapshots/images_000001048576/       power averages only, never pruned; tools/posthoc_ema.py mixes them

A snapshot's name is a function of the images seen. Therefore a resumed run replaces the snapshots that are newer than
its checkpoint.
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

_Written = tuple[str, int, str]  # the file of a rank: name, bytes, sha256


class Save:
    """A checkpoint that is being written: a thread writes a copy of the state while training goes on.

    Every rank constructs it and calls `finish`; both are collective calls.
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
        """Start to save this rank's `fragments` of `sets` (set name -> flat tensors) for the folder `final`.

        `writer` writes the tensors into this rank's file. Raises a CheckpointError on every rank if there is not enough
        room, or the folder cannot be made.
        """
        self.progress, self._config, self._final = progress, config, final
        self._sets, self._fragments = list(sets), fragments
        needed = sum(parallel.gather_objects(_bytes(fragments, self._sets)))
        parallel.on_main(lambda: _make_room(final, needed))
        # Copies, because training changes the flat tensors, and their slices share the same memory.
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
        """True if this rank's file is written or has failed."""
        return self._written.done()

    def finish(self) -> Path:
        """Wait for all files, and complete the folder; returns it. A collective call.

        Raises a CheckpointError on every rank if any rank could not write. Earlier checkpoints stay.
        """
        # All ranks end a stage before the next one begins. If a stage fails on one rank, it fails on all.
        try:
            written = parallel.gather_objects(parallel.raise_together(self._written.result))
            owned = parallel.gather_objects(self._fragments)
            parallel.on_main(lambda: _complete(self._final, self.progress, self._config, self._sets, written, owned))
        except CheckpointError:
            if parallel.this_rank() == 0:
                shutil.rmtree(_aside(self._final), ignore_errors=True)  # frees room if the disk is full
            raise
        return self._final


def write_folder(
    final: Path, progress: Progress, config: Config, fragments: Sequence[Fragment], sets: Mapping[str, Flats]
) -> Path:
    """A synchronous `Save`, with the same arguments and errors; returns the folder. A collective call."""
    return Save(final, progress, config, fragments, sets).finish()


def write_streamed(
    final: Path,
    progress: Progress,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    sets: Sequence[str],
    tensor: Callable[[str, str], torch.Tensor],
) -> Path:
    """Write a checkpoint from a single process (no collective call), with one tensor in memory at a time.

    The folder `final` appears complete or not at all. It holds all parameters of `shapes` (name -> shape) in all
    `sets`, moments included. `tensor(set, parameter)` is called once for the float32 values of each pair, except for
    moments of `FIXED` buffers, which do not exist. Raises a CheckpointError if a run cannot have one of the sets, there
    is not enough room, or the folder cannot be written.
    """
    if wrong := strange_sets(sets):
        what = f"{final}: a run has a model and averages, no weight set {wrong[0]!r}"
        raise CheckpointError(f"{what}; make it the model: tools/convert_checkpoint.py --to run --weights {wrong[0]}")
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
    """Remove old complete checkpoints, and the remains of interrupted saves.

    The newest `keep_last` checkpoints stay, and so does the first one at or after each multiple of `keep_every_images`.
    A folder is neither counted nor removed if it cannot be read, or does not match its name or its index. Raises an
    OSError if the folders cannot be listed, or if one cannot be removed (after all others were).
    """
    images_of: dict[Path, int] = {}
    for folder in layout.complete_checkpoints(run_dir):
        try:
            images_of[folder] = _images_of(folder, FileIdentity.of((folder / MARKER).stat()))
        except (CheckpointError, StorageError, OSError) as error:  # one bad folder must not keep all others on the disk
            logger.warning("%s; it is not removed, and does not count as one of the checkpoints to keep", error)
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
    """The images seen by a checkpoint with this `marker`; cached, because an index of many ranks takes seconds to read.

    Raises a CheckpointError if the folder is damaged or does not match its name.
    """
    return layout.Checkpoint(folder).progress.images


def snapshot_folder(run_dir: Path, images: int) -> Path:
    """The folder of the snapshot after `images` images."""
    return run_dir / "snapshots" / f"images_{images:012d}"


def complete_snapshots(run_dir: Path) -> dict[int, Path]:
    """All complete snapshot folders of a run by the images seen, oldest first."""
    return layout.complete_folders(run_dir / "snapshots", r"images_(\d{12,})")


def remove_snapshots_after(run_dir: Path, images: int) -> None:
    """Remove snapshots that the run wrote after `images` images, and the remains of interrupted saves.

    The run resumes from an older checkpoint. With other settings it may write snapshots at other points than before.
    """
    for seen, folder in complete_snapshots(run_dir).items():
        if seen > images:
            logger.info("%s: removed, because it is newer than the checkpoint; the run writes it again", folder)
            _remove(folder)
    for folder in (run_dir / "snapshots").glob("images_*"):
        if not (folder / MARKER).exists() or folder.suffix == ".partial":
            shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first, so that after a kill the rest does not look complete
    shutil.rmtree(folder)


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _file(final: Path, rank: int) -> Path:
    return _aside(final) / f"rank_{rank:05d}.safetensors"


def _bytes(fragments: Sequence[Fragment], sets: Sequence[str]) -> int:
    return 4 * len(sets) * sum(f.length for f in fragments)


def _make_room(final: Path, needed: int) -> None:
    """Make an empty folder next to `final`. Raises a CheckpointError if less than `needed` bytes are free."""
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
    """Complete the folder next to `final` and rename it to `final`.

    `written` has the file of each rank, `owned` the fragments of each rank.
    """
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
        shutil.rmtree(final, ignore_errors=True)  # at most the remains of an interrupted removal
        aside.rename(final)
        flush(final.parent)


@contextmanager
def _unwritable(final: Path) -> Iterator[None]:
    """Turns an error of the file system into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{_aside(final)}: cannot be written ({error}); the previous checkpoint stays") from error
