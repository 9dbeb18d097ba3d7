"""Checkpoints: one folder for each step, readable by any number of ranks in any ZeRO stage.

    checkpoints/step_00001000/
        rank_00000.safetensors ...  the fragments that each rank owned
        index.json                  where each fragment is; step, data position, versions
        config.yaml                 the run's resolved configuration
        COMPLETE                    written last; a folder without it is ignored

A fragment is a contiguous slice of one flattened parameter of the network. Its tensor has the name
`SET:PARAMETER:OFFSET`, where SET is a weight set (`model`, `ema_0.9999`, ...) or a moment of the optimizer (`exp_avg`,
`exp_avg_sq`). Stored buffers (`weights.FIXED`) are in every weight set like a parameter, and have no moments. A folder
is written under another name and renamed, so that after a kill the previous checkpoint is still usable.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from jitscale.checkpoints.index import MOST_BYTES, parse_hashes, parse_index, plain_file
from jitscale.checkpoints.streams import MappedSafetensors
from jitscale.checkpoints.weights import MOMENTS, StoredWeights
from jitscale.config import Config, load_config
from jitscale.config.cautions import start_caution
from jitscale.errors import CheckpointError, UserError, unreadable
from jitscale.files import FileIdentity, sha256_of

FORMAT = 2  # 1 had no hashes
MARKER = "COMPLETE"
T = TypeVar("T")
_VERIFIED: set[tuple[FileIdentity, str]] = set()  # files that this process has verified, with their hashes
# One rank's flat tensors of a set; None where the set has no tensor: Muon has no second moment.
Flats = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Fragment:
    """A slice of a parameter: flats[flat][start : start + length] is parameter.flatten()[offset : offset + length]."""

    name: str
    shape: tuple[int, ...]
    flat: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Progress:
    """The progress of a run. `images` + `skipped_images` is the position in the global sample sequence."""

    step: int
    images: int
    optimizer_step: int
    # Determines the sequence: seed, streams, window, manifest hash, origin of epoch 0. None before the first image.
    data: dict[str, int | str] | None
    bad_samples: int = 0  # images that could not be decoded; another sample replaced each
    skipped_steps: int = 0  # steps with gradients that were not finite
    skipped_images: int = 0  # images skipped after rollbacks
    class_names: list[str] | None = None  # classes of the training data, in the order of their numbers; None: unknown


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoint folders of a run, oldest first."""
    return list(complete_folders(run_dir / "checkpoints", r"step_(\d{8,})").values())


def complete_folders(parent: Path, name: str) -> dict[int, Path]:
    """Complete folders whose names match the pattern `name`, by the number that it captures, in ascending order."""
    matches = ((re.fullmatch(name, folder.name), folder) for folder in parent.glob("*"))
    return dict(sorted((int(match[1]), folder) for match, folder in matches if match and (folder / MARKER).exists()))


class Checkpoint(StoredWeights):
    """A complete checkpoint on disk, read in slices. A file is verified before its first read in this process."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, and check everything except the content of the weights.

        Raises a CheckpointError if the marker or a file is missing, index.json or config.yaml has changed, a file has
        another size, the folder's name says another step, or the format is unknown.
        """
        self.path = folder
        if not (folder / MARKER).exists():
            raise CheckpointError(f"{folder}: no complete checkpoint (no file {MARKER}); choose another step")
        hashes = self._parse(MARKER, parse_hashes)
        for name in ("index.json", "config.yaml"):
            if name not in hashes:
                raise self._damaged(MARKER, f"has no hash of {name}")
            self._check_content(name, hashes[name])
        index = self._parse("index.json", lambda text: parse_index(text, folder, FORMAT))
        try:
            self.progress = Progress(**index.progress)
        except TypeError as error:
            raise self._damaged("index.json", error) from error
        self.class_names = self.progress.class_names
        self.sets = index.sets  # moments included
        self.weight_sets = [name for name in self.sets if name not in MOMENTS]
        self.shapes, self._fragments = index.shapes, index.fragments
        self._files, self._sha256 = list(index.files), index.sha256
        self._opened: dict[int, MappedSafetensors] = {}
        self._identities = {name: self._identity(name) for name in self._files}
        for name, size in index.files.items():
            if (found := self._identities[name].size) != size:
                raise self._damaged(name, f"{found} bytes where the index says {size}")
        self._check_name()

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """See `StoredWeights`: every `shares`-th file, from number `share` on."""
        for number, name in enumerate(self._files):
            # Recorded with its identity at opening: if the file has changed since, it is verified again before a read.
            if number % shares == share:
                self._check_content(name, self._sha256[name])
            _VERIFIED.add((self._identities[name], self._sha256[name]))

    def caution(self, set_name: str) -> str | None:
        """See `StoredWeights`."""
        if self.progress.optimizer_step > self.progress.step:
            return None  # upgraded: the averages began before this run
        return start_caution(self.config, set_name, self.progress.step)

    def _check_content(self, name: str, sha256: str) -> None:
        self._identity(name)
        try:
            found = sha256_of(self.path / name)
        except OSError as error:
            raise self._damaged(name, error) from error
        if found != sha256:
            raise self._damaged(name, "its content has changed since it was written")

    def _check_name(self) -> None:
        """Refuse a folder that was copied to another number: the run would resume from it and prune newer ones."""
        numbers = {"step": self.progress.step, "images": self.progress.images}
        match = re.fullmatch(r"(step|images)_(\d{8,})", self.path.name)
        if match and int(match[2]) != numbers[match[1]]:
            what = f"belongs to {match[1]} {numbers[match[1]]}, but the folder's name says {int(match[2])}"
            raise self._damaged("index.json", what)

    def _parse(self, name: str, parse: Callable[[str], T]) -> T:
        if self._identity(name).size > MOST_BYTES:
            raise self._damaged(name, f"is larger than {MOST_BYTES} bytes")
        try:
            return parse((self.path / name).read_text())
        except CheckpointError:  # another format, not damage
            raise
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error

    def _identity(self, name: str) -> FileIdentity:
        """The current identity of a file. Raises a CheckpointError if it is not a regular file inside the folder."""
        try:
            return FileIdentity.of(plain_file(self.path, name))
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error

    @cached_property
    def config(self) -> Config:  # type: ignore[override]
        """The configuration of the run that wrote the checkpoint."""
        return load_config(self.path / "config.yaml", stored=True)

    @property
    def default(self) -> str:  # type: ignore[override]
        """The run's `evaluation.weights`."""
        return self.config.evaluation.weights

    @property
    def optimizer_step(self) -> int:  # type: ignore[override]
        """Updates that AdamW's moments have seen; 0 for Muon, whose moments only this run itself can use."""
        return self.progress.optimizer_step if self.config.optim.name == "adamw" else 0

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """See `StoredWeights`. Raises a CheckpointError if a file is damaged, or if elements are missing."""
        out, filled = torch.empty(stop - start), 0
        for number, offset, length in self._fragments[parameter]:
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                file, name = self._open(number), f"{set_name}:{parameter}:{offset}"
                try:
                    values = file.rows(name, low - offset, high - offset)
                    if values.shape != (high - low,) or values.dtype != torch.float32:
                        raise ValueError(f"{name} holds {tuple(values.shape)} of {values.dtype}")
                except (OSError, SafetensorError, ValueError) as error:
                    raise self._damaged(self._files[number], error) from error
                out[low - start : high - start] = values
                filled += high - low
        if filled != stop - start:
            raise self._damaged("", f"{filled} of {stop - start} elements of {parameter}")
        return out

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        shape = self.shapes[parameter]
        return self.read(set_name, parameter, 0, prod(shape)).view(shape)

    def _damaged(self, file: str, what: object) -> UserError:
        one_line = f"{self.path / file}: {' '.join(str(what).split())}"
        fall_back = f"remove {self.path} to fall back to the checkpoint before it"
        lasting = f"start again when the storage works; if only this file stays unreadable, {fall_back}"
        return unreadable(self.path / file, what, f"{one_line}; the file is damaged, {fall_back}", lasting)

    def _open(self, number: int) -> MappedSafetensors:
        if number not in self._opened:
            name = self._files[number]
            verified = (self._identity(name), self._sha256[name])
            if verified not in _VERIFIED:
                self._check_content(name, self._sha256[name])
                _VERIFIED.add(verified)
            try:
                self._opened[number] = MappedSafetensors(self.path / name)
            except (OSError, SafetensorError) as error:
                raise self._damaged(name, error) from error
        return self._opened[number]


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    complete = complete_checkpoints(run_dir)
    return Checkpoint(complete[-1]) if complete else None


@torch.no_grad()
def load_fragments(source: StoredWeights, fragments: Sequence[Fragment], sets: Mapping[str, Flats]) -> None:
    """Fill this rank's slices of all `sets` (set name -> flat tensors) from `source`."""
    for name, flats in sets.items():
        for f in fragments:
            flat = flats[f.flat]
            if flat is not None:
                flat[f.start : f.start + f.length].copy_(source.read(name, f.name, f.offset, f.offset + f.length))


def whole_fragments(shapes: Mapping[str, tuple[int, ...]]) -> list[Fragment]:
    """Fragments that hold whole parameters, the i-th parameter in the i-th flat tensor."""
    return [Fragment(name, shape, i, 0, prod(shape), 0) for i, (name, shape) in enumerate(shapes.items())]
