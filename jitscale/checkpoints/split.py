"""Weight sets in a folder of safetensors files; a set may be split over several files with an index.

NAME.safetensors
NAME-00001-of-00003.safetensors ..., NAME.safetensors.index.json   split by transformers or diffusers
NAME.VARIANT-00001-of-00003.safetensors ..., NAME.safetensors.index.VARIANT.json   a variant of diffusers
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from jitscale.checkpoints.streams import MappedSafetensors, TensorFile
from jitscale.checkpoints.weights import open_safetensors
from jitscale.errors import CheckpointError, first_line, unreadable

_INDEX = re.compile(r"(.+)\.safetensors\.index((?:\.\w+)?)\.json")
_PART = re.compile(r"-\d+-of-\d+\.safetensors")


class SplitSafetensors:
    """One weight set in several files, each compared with the index. One file at a time is mapped."""

    def __init__(self, index: Path, stem: str) -> None:
        """Open the files that `index` names; `stem` is the name that a single file would have.

        Raises a CheckpointError if the index is invalid, or a file or tensor is missing, not in the index, or there
        twice.
        """
        self.path, self.stem = index, stem
        self._file_of = _weight_map(index)
        self._shapes: dict[str, tuple[int, ...]] = {}
        holders: dict[str, str] = {}
        for name in self.files:
            if not (index.parent / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which is missing; copy the folder again")
            file = open_safetensors(index.parent / name)
            for tensor, shape in file.shapes().items():
                if tensor in holders:
                    what = f"{index}: {tensor} is in {holders[tensor]} and in {name}"
                    raise CheckpointError(f"{what}; keep one of them")
                holders[tensor], self._shapes[tensor] = name, shape
        self.metadata = open_safetensors(index.parent / self.files[0]).metadata
        for tensor in sorted({*self._file_of, *holders}):
            said, found = self._file_of.get(tensor, "no file"), holders.get(tensor, "no file")
            if said != found:
                what = f"{index}: says that {tensor} is in {said}, but it is in {found}"
                raise CheckpointError(f"{what}; give the index that was written with these files")
        self._mapped: tuple[str, MappedSafetensors] | None = None

    @property
    def files(self) -> list[str]:
        """The names of the files."""
        return sorted(set(self._file_of.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorFile`."""
        return self._shapes

    def tensor(self, name: str) -> torch.Tensor:
        """See `TensorFile`."""
        file = self._file_of[name]
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = file, MappedSafetensors(self.path.parent / file)
        return self._mapped[1].tensor(name)


def tensor_files(folder: Path) -> list[TensorFile]:
    """The weight sets in `folder`, sorted by name; a split set counts as one.

    Raises a CheckpointError as `SplitSafetensors` does, and if a part of a set belongs to no index or to two.
    """
    indexes = [(path, found) for path in folder.iterdir() if (found := _INDEX.fullmatch(path.name))]
    split = [SplitSafetensors(path, found[1] + found[2]) for path, found in sorted(indexes)]
    claims = Counter(name for file in split for name in file.files)
    if twice := [name for name, count in claims.items() if count > 1]:
        raise CheckpointError(f"{folder}: {twice[0]} belongs to two indexes; keep the one that was written with it")
    single = sorted(path for path in folder.glob("*.safetensors") if path.name not in claims)
    if left_over := [path for path in single if _PART.search(path.name)]:
        what = f"{left_over[0]}: is one part of several, but no index (.safetensors.index.json) in the folder names it"
        raise CheckpointError(f"{what}; copy the whole folder, and remove files of another save")
    return sorted([*split, *map(open_safetensors, single)], key=lambda file: file.stem)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Raises a CheckpointError if `index` is invalid, a StorageError if its storage fails."""
    try:
        found = json.loads(index.read_text(), object_pairs_hook=_without_twins)["weight_map"]
        if not isinstance(found, dict) or not found:
            raise ValueError("weight_map names no tensors")
        for tensor, file in found.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{tensor} is in {str(file)[:60]!r}, which is not a .safetensors file in this folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        damage = f"{index}: is not an index of safetensors files ({reason}); copy it again"
        raise unreadable(index, error, damage) from error
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} appears twice")
    return dict(pairs)
