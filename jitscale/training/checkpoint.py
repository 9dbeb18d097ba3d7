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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jitscale import parallel
from jitscale.config import Config, load_config, to_yaml
from jitscale.errors import CheckpointError

T = TypeVar("T")

FORMAT = 1
MARKER = "COMPLETE"
MOMENTS = ("exp_avg", "exp_avg_sq")
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
    """How far a run is. `images` is also the position in the global sample sequence.

    `data` holds what fixes that sequence (seed, streams, window, manifest hash, and the position where its epoch 0
    begins); None before the first image. `bad_samples` counts the undecodable images that others stood in for,
    `skipped_steps` the steps whose gradients were not finite.
    """

    step: int
    images: int
    optimizer_step: int
    data: dict[str, int | str] | None
    bad_samples: int = 0
    skipped_steps: int = 0


def write_checkpoint(
    run_dir: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Sequence[torch.Tensor]],
) -> Path:
    """Write this rank's fragments of all `sets` (set name -> flat tensors); a collective call.

    Returns:
        The complete folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write.
    """
    return write_folder(step_folder(run_dir, progress.step), progress, config, fragments, sets)


def write_folder(
    final: Path,
    progress: Progress,
    config: Config,
    fragments: Sequence[Fragment],
    sets: Mapping[str, Sequence[torch.Tensor]],
) -> Path:
    """`write_checkpoint` into the folder `final`, which appears complete or not at all."""
    aside = final.with_name(f"{final.name}.partial")
    rank = _this_rank()
    file = aside / f"rank_{rank:05d}.safetensors"
    # Copies, because slices of one flat tensor share its memory and training goes on in it.
    tensors = {
        f"{name}:{f.name}:{f.offset}": flats[f.flat].detach()[f.start : f.start + f.length].to("cpu", copy=True)
        for name, flats in sets.items()
        for f in fragments
    }
    owned = [(f.name, f.shape, f.offset, f.length) for f in fragments]

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> int:
        save_file(tensors, file)
        _flush(file)
        return file.stat().st_size

    def finish() -> None:
        if rank == 0:
            _write_index(aside / "index.json", progress, list(sets), parts)
            (aside / "config.yaml").write_text(to_yaml(config))
            _flush(aside / "config.yaml")
            (aside / MARKER).write_text("")
            _flush(aside / MARKER)
            shutil.rmtree(final, ignore_errors=True)  # at most what an interrupted removal left
            aside.rename(final)
            _flush(final.parent)

    # Each stage ends on all ranks before the next begins, and fails on all ranks alike.
    _saving(aside, begin)
    parts = parallel.gather_objects((file.name, _saving(file, write), owned))
    _saving(aside, finish)
    return final


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoint folders of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    found = [(int(m[1]), f) for f in folders if (m := _STEP_FOLDER.fullmatch(f.name)) and (f / MARKER).exists()]
    return [folder for _, folder in sorted(found)]


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all complete checkpoints but the newest `keep_last`, and what interrupted saves left."""
    for folder in complete_checkpoints(run_dir)[:-keep_last]:
        (folder / MARKER).unlink()  # first, so that a kill during the removal leaves no folder that looks complete
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
        self._fragments: dict[str, list[list[int]]] = {
            name: entry["fragments"] for name, entry in index["parameters"].items()
        }

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
                    piece = self._open(number).get_slice(f"{set_name}:{parameter}:{offset}")
                    out[low - start : high - start] = piece[low - offset : high - offset]
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
        differing = [
            f"{name}: {self.shapes.get(name, 'absent')} there, {shapes.get(name, 'absent')} in this network"
            for name in sorted({*shapes, *self.shapes})
            if self.shapes.get(name) != shapes.get(name)
        ]
        if differing:
            shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise CheckpointError(
                f"{self.folder}: a checkpoint of another network ({shown}); restore the model settings of its "
                "config.yaml, or choose another run.dir"
            )

    def _open(self, file: int) -> safe_open:
        if file not in self._handles:
            self._handles[file] = safe_open(self.folder / self._files[file], framework="pt")
        return self._handles[file]

    @cached_property
    def _handles(self) -> dict[int, safe_open]:
        return {}


def _damaged(path: Path, folder: Path, what: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {' '.join(str(what).split())}; the file is damaged, remove {folder} to fall back to the checkpoint "
        "before it"
    )


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    complete = complete_checkpoints(run_dir)
    return Checkpoint(complete[-1]) if complete else None


@torch.no_grad()
def load_fragments(
    checkpoint: Checkpoint, fragments: Sequence[Fragment], sets: Mapping[str, Sequence[torch.Tensor]]
) -> None:
    """Fill this rank's slices of all `sets` (set name -> flat tensors) from the checkpoint."""
    for name, flats in sets.items():
        for f in fragments:
            flats[f.flat][f.start : f.start + f.length].copy_(
                checkpoint.read(name, f.name, f.offset, f.offset + f.length)
            )


def whole_fragments(shapes: Mapping[str, tuple[int, ...]]) -> list[Fragment]:
    """Fragments that hold whole parameters, the i-th parameter in the i-th flat tensor."""
    return [Fragment(name, shape, i, 0, prod(shape), 0) for i, (name, shape) in enumerate(shapes.items())]


def _saving(path: Path, action: Callable[[], T]) -> T:
    """One stage of a save on all ranks.

    Raises:
        CheckpointError: the file system failed on some rank.
    """

    def guarded() -> T:
        try:
            return action()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be written ({error}); the previous checkpoint stays") from error

    return parallel.together(guarded)


def _write_index(
    path: Path,
    progress: Progress,
    sets: list[str],
    parts: list[tuple[str, int, list[tuple[str, tuple[int, ...], int, int]]]],
) -> None:
    parameters: dict[str, dict[str, list[object]]] = {}
    for number, (_, _, owned) in enumerate(parts):
        for name, shape, offset, length in owned:
            entry = parameters.setdefault(name, {"shape": list(shape), "fragments": []})
            entry["fragments"].append([number, offset, length])
    index = {
        "format": FORMAT,
        "progress": asdict(progress),
        "sets": sets,
        "files": {name: size for name, size, _ in parts},
        "parameters": parameters,
        "versions": dict(_versions()),
    }
    path.write_text(json.dumps(index))
    _flush(path)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in ("jitscale", "torch", "deepspeed"):
        yield package, version(package)


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk before anything depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _this_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
