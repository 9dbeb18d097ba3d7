"""safetensors files written in pieces, for weights that do not fit into memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from jitscale.files import appearing_whole


@contextmanager
def appearing_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[torch.Tensor], None]]:
    """A safetensors file of float32 tensors whose values come one after the other.

    The file gets its name when it is complete; an exception leaves nothing behind.

    Args:
        path: the file.
        shapes: tensor name -> shape, in the order in which the values will come.
        metadata: of the file.

    Yields:
        A function that appends the next float32 values, of any number of elements, on the CPU.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # so that the values are aligned in a mapped file
    written = 0
    with appearing_whole(path) as file:

        def append(values: torch.Tensor) -> None:
            nonlocal written
            assert values.dtype == torch.float32
            written += file.write(values.contiguous().numpy().astype("<f4", copy=False).tobytes())

        file.write(struct.pack("<Q", len(described)) + described)
        yield append
        assert written == end, f"{written} of {end} bytes of {path}"
