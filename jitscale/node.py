"""What the ranks of one node do once and share."""

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
    """`call()` on the first rank of each node; the others load its picklable result, with arrays as maps of one file.

    The file is private to the user, and removed as soon as all ranks have it open. A rank that does not see it, as in a
    container of its own, calls itself. All ranks raise the first failing rank's UserError. A collective call.
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
    """A temporary file that holds `result`: sizes of its parts, the pickle, the arrays; None where there is no room."""
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
    """What `_hand_over` has written to the file `path`; its arrays are maps of it, and read-only."""
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
