"""Checkpoints: one folder a step, readable by any number of ranks in any ZeRO stage.

    checkpoints/step_00001000/
        rank_00000.safetensors ...  the fragments that each rank owned
        index.json                  what lies where; step, data position, versions
        config.yaml                 the run's resolved configuration
        COMPLETE                    written last; a folder without it does not count

A fragment is a contiguous slice of one flattened parameter, in the coordinates of the parameter as the network defines
it. Its tensor is called `SET:PARAMETER:OFFSET`, where SET is a weight set (`model`, `ema_0.9999`, ...) or a moment of
the optimizer (`exp_avg`, `exp_avg_sq`). Folders are written aside and renamed, so that a kill during a save leaves
the previous one usable.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jitscale import __version__, parallel
from jitscale.config import Config, load_config, to_yaml
from jitscale.errors import CheckpointError
from jitscale.files import sha256_of
from jitscale.streamed_safetensors import MappedSafetensors, appearing_safetensors
from jitscale.versions import version_of

T = TypeVar("T")

FORMAT = 2  # 1 had no hashes
MARKER = "COMPLETE"
MOMENTS = ("exp_avg", "exp_avg_sq")
# One rank's flat tensors of a set; None where the set has nothing, as Muon has no second moment.
Flats = Sequence[torch.Tensor | None]
# A rank's file: name, bytes, sha256, and (parameter, shape, offset, length) of each fragment in it.
_Part = tuple[str, int, str, list[tuple[str, tuple[int, ...], int, int]]]
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Fragment:
    """Where a slice of a parameter lies: flats[flat][start : start + length] is parameter.flatten()[offset : ...]."""

    name: str
    shape: tuple[int, ...]
    flat: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Progress:
    """How far a run is. `images` + `skipped_images` is the position in the global sample sequence.

    `data` holds what fixes that sequence (seed, streams, window, manifest hash, and the position where its epoch 0
    begins); None before the first image. `bad_samples` counts the undecodable images that others stood in for,
    `skipped_steps` the steps whose gradients were not finite, `skipped_images` what was jumped over after rolling back.
    """

    step: int
    images: int
    optimizer_step: int
    data: dict[str, int | str] | None
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_images: int = 0


def write_checkpoint(
    run_dir: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Flats],
) -> Path:
    """Write this rank's fragments of all `sets` (set name -> flat tensors); a collective call.

    Returns:
        The complete folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write. What an earlier save wrote stays.
    """
    return write_folder(step_folder(run_dir, progress.step), progress, config, fragments, sets)


def write_folder(
    final: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Flats],
) -> Path:
    """`write_checkpoint` into the folder `final`, which appears complete or not at all."""
    save = Save(final, progress, config, fragments, sets)
    save.write()
    return save.finish()


class Save:
    """One checkpoint on its way to the disk. The state is copied when it is made, so that training may go on.

    Attributes:
        progress: the run's.
        file: what this rank writes.

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
    ) -> None:
        """
        Args:
            final: the folder that it becomes.
            progress: the run's.
            config: the run's.
            fragments: of this rank.
            sets: set name -> this rank's flat tensors.

        Raises:
            CheckpointError: on every rank, if there is not enough room, or the folder cannot be made.
        """
        self.progress = progress
        self._config = config
        self._final = final
        self._aside = _aside(final)
        self.file = self._aside / f"rank_{_this_rank():05d}.safetensors"
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
            save_file(self._tensors, self.file)
            _flush(self.file)
            self._result = (self.file.stat().st_size, sha256_of(self.file))
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
            return (self.file.name, *self._result)

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
        with appearing_safetensors(file, entries) as append:
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


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoint folders of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    found = [(int(m[1]), f) for f in folders if (m := _STEP_FOLDER.fullmatch(f.name)) and (f / MARKER).exists()]
    return [folder for _, folder in sorted(found)]


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


class Checkpoint:
    """A complete checkpoint on disk, verified when opened, read by slices.

    Attributes:
        folder: where it lies.
        progress: the run's progress when it was written.
        shapes: parameter name -> shape.
        sets: names of the stored sets, moments included.
    """

    def __init__(self, folder: Path) -> None:
        """Open and verify.

        Raises:
            CheckpointError: the marker is missing, a file is missing or has another size, or the format is unknown.
        """
        self.folder = folder
        if not (folder / MARKER).exists():
            raise CheckpointError(f"{folder}: no complete checkpoint (no file {MARKER}); choose another step")
        try:
            for name, sha256 in json.loads((folder / MARKER).read_text() or "{}").items():
                if sha256_of(folder / name) != sha256:
                    raise _damaged(folder / name, folder, "its content is not what was written")
            index = json.loads((folder / "index.json").read_text())
            self._read_index(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise _damaged(folder / "index.json", folder, error) from error
        for name, size in index["files"].items():
            file = folder / name
            found = file.stat().st_size if file.exists() else 0
            if found != size:
                raise _damaged(file, folder, f"{found} bytes where the index says {size}")

    def _read_index(self, index: dict[str, Any]) -> None:
        folder = self.folder
        if index["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: checkpoint format {index['format']}, this version reads format {FORMAT}; "
                "use the version of jitscale that wrote it"
            )
        self.progress = Progress(**index["progress"])
        self.sets: list[str] = index["sets"]
        self.shapes = {name: tuple(entry["shape"]) for name, entry in index["parameters"].items()}
        self._files = list(index["files"])
        self._sha256: dict[str, str] = index["sha256"]
        self._fragments: dict[str, list[list[int]]] = {
            name: entry["fragments"] for name, entry in index["parameters"].items()
        }

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare the content of every `shares`-th file, from number `share` on, with what was written.

        Raises:
            CheckpointError: a file is damaged.
        """
        for name in self._files[share::shares]:
            try:
                found = sha256_of(self.folder / name)
            except OSError as error:
                raise _damaged(self.folder / name, self.folder, error) from error
            if found != self._sha256[name]:
                raise _damaged(self.folder / name, self.folder, "its content is not what was written")

    @cached_property
    def config(self) -> Config:
        """The configuration of the run that wrote it."""
        return load_config(self.folder / "config.yaml")

    @property
    def weight_sets(self) -> list[str]:
        """The stored weight sets, without the optimizer's moments."""
        return [name for name in self.sets if name not in MOMENTS]

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter in one set: (stop - start,) float32.

        Raises:
            CheckpointError: a file is damaged, or no file holds some of the elements.
        """
        out, filled = torch.empty(stop - start), 0
        for number, offset, length in self._fragments[parameter]:
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                try:
                    name = f"{set_name}:{parameter}:{offset}"
                    out[low - start : high - start] = self._open(number).rows(name, low - offset, high - offset)
                except (OSError, SafetensorError) as error:
                    raise _damaged(self.folder / self._files[number], self.folder, error) from error
                filled += high - low
        if filled != stop - start:
            raise _damaged(self.folder, self.folder, f"{filled} of {stop - start} elements of {parameter}")
        return out

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """One whole parameter in one set, in its shape, float32."""
        shape = self.shapes[parameter]
        return self.read(set_name, parameter, 0, prod(shape)).view(shape)

    def state_dict(self, set_name: str) -> dict[str, torch.Tensor]:
        """All parameters of one set.

        Raises:
            CheckpointError: there is no such set.
        """
        if set_name not in self.weight_sets:
            raise CheckpointError(
                f"{self.folder}: no weight set {set_name!r}; choose one of {', '.join(self.weight_sets)}"
            )
        return {name: self.tensor(set_name, name) for name in self.shapes}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with the parameters of a network.

        Raises:
            CheckpointError: naming every parameter that differs.
        """
        check_shapes(self.folder, self.shapes, shapes)

    def _open(self, file: int) -> MappedSafetensors:
        if file not in self._handles:
            self._handles[file] = MappedSafetensors(self.folder / self._files[file])
        return self._handles[file]

    @cached_property
    def _handles(self) -> dict[int, MappedSafetensors]:
        return {}


def check_shapes(where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the parameters stored at `where` with those of a network.

    Raises:
        CheckpointError: naming parameters that differ.
    """
    differing = shape_differences(found, expected)
    if differing:
        raise CheckpointError(
            f"{where}: weights of another network ({differing}); restore the model settings of its config, or choose "
            "another run.dir"
        )


def shape_differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between the parameters of two networks, in one line; empty where nothing does."""
    differing = [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} in this network"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    return "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")


def _damaged(path: Path, folder: Path, what: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {' '.join(str(what).split())}; the file is damaged, remove {folder} to fall back to the checkpoint "
        "before it"
    )


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    complete = complete_checkpoints(run_dir)
    return Checkpoint(complete[-1]) if complete else None


class ReadableSets(Protocol):
    """Stored sets of tensors, read by slices of flattened parameters."""

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter in one set: (stop - start,) float32."""


@torch.no_grad()
def load_fragments(source: ReadableSets, fragments: Sequence[Fragment], sets: Mapping[str, Flats]) -> None:
    """Fill this rank's slices of all `sets` (set name -> flat tensors) from `source`."""
    for name, flats in sets.items():
        for f in fragments:
            flat = flats[f.flat]
            if flat is not None:
                flat[f.start : f.start + f.length].copy_(source.read(name, f.name, f.offset, f.offset + f.length))


def whole_fragments(shapes: Mapping[str, tuple[int, ...]]) -> list[Fragment]:
    """Fragments that hold whole parameters, the i-th parameter in the i-th flat tensor."""
    return [Fragment(name, shape, i, 0, prod(shape), 0) for i, (name, shape) in enumerate(shapes.items())]


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

    return parallel.together(guarded)


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
