"""Work that one rank of a node does for all ranks of that node."""

import mmap
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from jitscale import parallel
from jitscale.parallel import World

T = TypeVar("T")

_ALIGNMENT = 64  # bytes; arrays of the file begin at multiples of it


def once_a_node(world: World, call: Callable[[], T]) -> T:
    """`call()` on the first rank of each node; the others load its picklable result. A collective call.

    They load it from a temporary file and memory-map its arrays. The file is private to the user, and is removed as
    soon as all ranks have it open. If a rank does not see the file, for example in its own container, it makes the call
    itself. All ranks raise the UserError of the first rank that fails.
    """
    is_first = world.rank == world.first_of_node
    result = parallel.raise_together(lambda: call() if is_first else None)
    path = _hand_over(result) if is_first and world.local_size > 1 else None
    try:
        shared = parallel.gather_objects(path)[world.first_of_node]
        if is_first:
            parallel.raise_together(lambda: None)
            return cast(T, result)
        return cast(T, parallel.raise_together(lambda: _take_over(shared) if shared and shared.exists() else call()))
    finally:
        if path is not None:
            path.unlink()


def _hand_over(result: object) -> Path | None:
    """A temporary file with the sizes of its parts, the pickle and the arrays; None if it cannot be written."""
    buffers: list[pickle.PickleBuffer] = []
    parts: list[bytes | memoryview] = [pickle.dumps(result, protocol=5, buffer_callback=buffers.append)]
    parts += [buffer.raw() for buffer in buffers]
    sizes = pickle.dumps([len(part) for part in parts])
    path = None
    try:
        with tempfile.NamedTemporaryFile(prefix="jitscale-", delete=False) as file:
            path = Path(file.name)
            for part in (len(sizes).to_bytes(8, "little"), sizes, *parts):
                file.write(part)
                file.write(bytes(-len(part) % _ALIGNMENT))
    except OSError:
        if path is not None:
            path.unlink()
        return None
    return path


def _take_over(path: Path) -> object:
    """The object that `_hand_over` has written to `path`. Its arrays are read-only maps of the file."""
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def part(start: int, size: int) -> tuple[memoryview, int]:
        return content[start : start + size], start + size + -size % _ALIGNMENT

    length, at = part(0, 8)
    sizes, at = part(at, int.from_bytes(length, "little"))
    parts = []
    for size in pickle.loads(sizes):
        found, at = part(at, size)
        parts.append(found)
    return pickle.loads(parts[0], buffers=parts[1:])
