"""Writes and reads safetensors files in pieces, for weights that do not fit into memory."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from jitscale.files import atomic_write

MOST_MAPPED = 2**30  # bytes


class TensorFile(Protocol):
    """Named tensors of one weight set, in one or several files. Methods raise an OSError or a SafetensorError."""

    path: Path
    stem: str  # the file's name without .safetensors
    metadata: dict[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor, a copy, in its own precision."""


class MappedSafetensors:
    """A safetensors file that is read in pieces, and never holds much more than `MOST_MAPPED` bytes of memory.

    While the file is mapped, the pages that were read count as the process's memory. Therefore it is mapped again after
    every `MOST_MAPPED` bytes. The constructor and every method raise an OSError or a SafetensorError if the file cannot
    be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stem = path, path.stem
        self._mapped = 0
        path.open("rb").close()  # raises the true OSError: safe_open reports every error as "No such file"
        self._file = safe_open(path, framework="pt")
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorFile`."""
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> torch.Tensor:
        """See `TensorFile`."""
        return self._copied(self._file.get_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one tensor, a copy."""
        return self._copied(self._file.get_slice(name)[start:stop])

    def _copied(self, mapped: torch.Tensor) -> torch.Tensor:
        copy = mapped.clone()
        self._mapped += copy.nbytes
        if self._mapped > MOST_MAPPED:
            self._file, self._mapped = safe_open(self.path, framework="pt"), 0
        return copy


@contextmanager
def atomic_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Writes a safetensors file of float32 tensors in pieces; the file appears whole or not at all.

    Yields a function that appends the next float32 values from the CPU, any number of them, in the order of `shapes`
    (tensor name -> shape). Raises an OSError if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # aligns the values in a mapped file
    written = 0
    with atomic_write(path) as file:

        def append(values: torch.Tensor) -> None:
            nonlocal written
            assert values.dtype == torch.float32
            written += file.write(values.contiguous().numpy().astype("<f4", copy=False).tobytes())

        file.write(struct.pack("<Q", len(described)) + described)
        yield append
        assert written == end, f"{written} of {end} bytes of {path}"
